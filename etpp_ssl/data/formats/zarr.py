"""Zarr 2 and 3 (.zarr, a folder), and OME-NGFF in it: an array, of which the chunks of a region are read.

The image is the full resolution of a group with OME's `multiscales` (NGFF 0.4 or 0.5, of which the axes are
used), the folder's only array of two or more axes, or the one that `data.array` names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from etpp_ssl.config import listed
from etpp_ssl.data.formats.arrays import conventions, letters_of, named_array, picture_of_array
from etpp_ssl.data.formats.base import Format, Picture, Reading, UnreadableImage, imported, one_line_reasons


def _open_path(path: str | os.PathLike[str], reading: Reading) -> Picture:
    zarr = imported("zarr", "Zarr", "zarr")
    with one_line_reasons("its metadata of Zarr is damaged"):
        try:
            node = zarr.open(os.fspath(path), mode="r")
        except FileNotFoundError as error:
            raise UnreadableImage("it has no metadata of Zarr: neither an array nor a group") from error
        return _picture(zarr, node, reading)


def _picture(zarr: Any, node: Any, reading: Reading) -> Picture:
    ome: Mapping[str, Any] = {}
    name = (reading.array or "").strip("/")
    if name and isinstance(node, zarr.Group):
        above = name.rpartition("/")[0]
        ome = _ome(node.get(above, node) if above else node)
        node = _member(node, name)
    copies: list[Any] = []
    if isinstance(node, zarr.Group):
        ome = _ome(node)
        if ome.get("multiscales"):
            levels = [_member(node, level["path"]) for level in ome["multiscales"][0]["datasets"]]
            node, copies = levels[0], levels[1:] if reading.overviews else []
        else:
            node = _only_array(zarr, node, ome)
    own = getattr(node.metadata, "dimension_names", None) or node.attrs.get("_ARRAY_DIMENSIONS") or ()
    axes = _ome_axes(ome["multiscales"][0], node.ndim) if ome.get("multiscales") else letters_of(own)
    nodata, scale = conventions(node.attrs)
    names = _channel_names(ome)
    return picture_of_array(
        node, reading, axes, names=names, nodata=nodata, scale=scale, on_disk=True, copies=copies
    )


def _ome(group: Any) -> Mapping[str, Any]:
    """OME's attributes of a group, which NGFF 0.5 keeps together."""
    attributes = group.attrs.asdict()
    found: Mapping[str, Any] = attributes.get("ome", attributes)
    return found


def _member(group: Any, name: str) -> Any:
    if name not in group:
        there = listed(sorted(repr(key) for key, _ in group.members())) or "nothing"
        raise UnreadableImage(f"it has no array {name!r} of data.array; it has {there}")
    return group[name]


def _only_array(zarr: Any, group: Any, attributes: Mapping[str, Any]) -> Any:
    if "plate" in attributes or "well" in attributes:
        kind, example = ("plate", "A/1/0") if "plate" in attributes else ("well", "0")
        raise UnreadableImage(
            f"it is OME's {kind} of several images: data.array names one, such as {example}"
        )
    members = dict(group.members())
    arrays = [key for key, node in members.items() if isinstance(node, zarr.Array) and node.ndim > 1]
    if not arrays and any(isinstance(node, zarr.Group) for node in members.values()):
        groups = listed(sorted(map(repr, members)))
        raise UnreadableImage(
            f"it has no array of its own: data.array names one of its groups ({groups}) or an array in them"
        )
    return group[named_array(arrays, None, "a Zarr group")]


def _ome_axes(scales: Mapping[str, Any], num_axes: int) -> str:
    """Of NGFF 0.4 and 0.5; before, they were strings or always t, c, z, y and x."""
    axes = scales.get("axes") or "tczyx"
    found = letters_of([axis["name"] if isinstance(axis, Mapping) else axis for axis in axes])
    if found is None or len(found) != num_axes:
        raise UnreadableImage(f"its axes {list(axes)} are not those of OME-NGFF, or not of its {num_axes}")
    return found


def _channel_names(ome: Mapping[str, Any]) -> tuple[str, ...]:
    channels = ome.get("omero", {}).get("channels", [])
    names = tuple(str(channel.get("label", "")) for channel in channels)
    return names if len(set(names)) == len(names) else ()


def _open(data: bytes, reading: Reading) -> Picture:
    raise UnreadableImage("a Zarr array is a folder, of which this is one file")


def _check(data: bytes, max_pixels: int) -> None:
    _open(data, Reading(1))


FORMAT = Format(frozenset({".zarr"}), (), _open, _check, _open_path, is_folder=True)
