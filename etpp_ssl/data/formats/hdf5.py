"""HDF5 (.h5, .hdf5), read by h5py: the only array of two or more axes, or the one that `data.array` names."""

from __future__ import annotations

import importlib
import io
import os
from contextlib import suppress
from types import ModuleType
from typing import Any

from etpp_ssl.data.formats.arrays import conventions, letters_of, named_array, picture_of_array
from etpp_ssl.data.formats.base import Format, Picture, Reading, UnreadableImage, imported, one_line_reasons

_FAULT = "it is an HDF5 file that is damaged or incomplete"


def _open(data: bytes, reading: Reading) -> Picture:
    return _picture(io.BytesIO(data), reading)


def _open_path(path: str | os.PathLike[str], reading: Reading) -> Picture:
    return _picture(path, reading)


def _picture(source: str | os.PathLike[str] | io.BytesIO, reading: Reading) -> Picture:
    file = _opened(source)
    try:
        with one_line_reasons(_FAULT):
            return _picture_in(file, reading, on_disk=not isinstance(source, io.BytesIO))
    except BaseException:
        file.close()
        raise


def _picture_in(file: Any, reading: Reading, *, on_disk: bool) -> Picture:
    h5py, name = _library(), reading.array
    if name is None or not isinstance(file.get(name), h5py.Dataset):
        arrays: list[str] = []

        def note(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset) and len(node.shape or ()) > 1:
                arrays.append(name)

        # It follows no links, and so meets nothing twice.
        file.visititems(note)
        name = named_array(arrays, name, "an HDF5 file")
    dataset = file[name]
    if dataset.is_virtual or dataset.external or dataset.file.filename != file.filename:
        raise UnreadableImage(f"the values of {name!r} lie in other files: name those")
    _require_filters(h5py, dataset)
    nodata, scale = conventions(dataset.attrs)
    # netCDF names axes by a data set of coordinates for each.
    dimensions = [d.label or (d[0].name.rpartition("/")[2] if len(d) else "") for d in dataset.dims]
    return picture_of_array(
        dataset, reading, letters_of(dimensions), nodata=nodata, scale=scale, on_disk=on_disk
    )


def _require_filters(h5py: ModuleType, dataset: Any) -> None:
    properties = dataset.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            with suppress(ImportError):
                importlib.import_module("hdf5plugin")
        if not h5py.h5z.filter_avail(code):
            raise UnreadableImage(
                f"its values are compressed by the HDF5 filter {code} ({name.decode('ascii', 'replace')!r}), "
                f"which h5py has not: pip install hdf5plugin"
            )


def _check(data: bytes, max_pixels: int) -> None:
    _opened(io.BytesIO(data)).close()


def _opened(source: str | os.PathLike[str] | io.BytesIO) -> Any:
    h5py = _library()
    with one_line_reasons(_FAULT):
        return h5py.File(source, "r")


def _library() -> ModuleType:
    return imported("h5py", "HDF5", "hdf5")


FORMAT = Format(frozenset({".h5", ".hdf5"}), (b"\x89HDF\r\n\x1a\n",), _open, _check, _open_path)
