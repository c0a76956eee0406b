"""Whatever GDAL reads, by windows, through rasterio: for `data.reader=rasterio`.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np

from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Format,
    Picture,
    Place,
    Reading,
    Region,
    UnreadableImage,
    check_pixels,
    imported,
    one_line_reasons,
)
from etpp_ssl.data.formats.values import channel_numbers


class GdalPicture:
    """Bands of a dataset, of which a region reads its window.

    Args:
        dataset: opened by rasterio.
        reading: says which bands.
        memory: what has to be kept as long as the dataset is read.

    Raises:
        UnreadableImage: for bands that are not those asked for, or differ in type.
    """

    deep = True

    def __init__(self, dataset: Any, reading: Reading, memory: Any = None) -> None:
        if dataset.count == 0:
            parts = ", ".join(str(part).rpartition(":")[2] for part in dataset.subdatasets[:3]) or "nothing"
            raise UnreadableImage(f"it has no bands, and holds {parts}: convert one with gdal_translate")
        self.size = (dataset.width, dataset.height)
        check_pixels(self.size, reading.max_pixels)
        self._dataset, self._memory = dataset, memory
        self.place, self.reads_parts = _place(dataset), memory is None
        self._colours: np.ndarray | None = None
        self._alpha = False
        self._white = dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        self._bits = int(
            dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", np.dtype(dataset.dtypes[0]).itemsize * 8)
        )
        self._bands = self._chosen(reading)
        if len({dataset.dtypes[band - 1] for band in self._bands}) > 1:
            raise UnreadableImage(
                f"its bands differ in type ({', '.join(dataset.dtypes)}): data.channels chooses"
            )
        steps = np.array([(dataset.scales[band - 1], dataset.offsets[band - 1]) for band in self._bands]).T
        self._steps = steps if reading.deep and (steps != [[1.0], [0.0]]).any() else None

    def _chosen(self, reading: Reading) -> list[int]:
        """Numbers of the bands, from 1."""
        dataset, bands = self._dataset, list(range(1, self._dataset.count + 1))
        kinds = [kind.name for kind in dataset.colorinterp]
        if reading.channels is None:
            if bands == [1] and reading.in_chans == 3 and kinds == ["palette"] and not self._white:
                entries = dataset.colormap(1)
                self._colours = colours = np.zeros((max(entries) + 1, 3), np.uint8)
                for value, colour in entries.items():
                    colours[value] = colour[:3]
                return bands
            if bands == [1] and reading.in_chans == 3 and not reading.deep:
                return bands * 3
            if kinds[-1] == "alpha" and reading.in_chans in (0, len(bands) - 1):
                self._alpha = reading.deep
                return bands[:-1]
        numbers = channel_numbers(len(bands), reading, [name or "" for name in dataset.descriptions])
        return bands if numbers is None else [bands[number] for number in numbers]

    def channels(self) -> Channels:
        """Not of 8 bits."""
        raise TypeError("a deep picture has regions only")

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """Always full resolution; see `Picture.region`."""
        with one_line_reasons():
            rasterio = _library()
            flag_names = rasterio.enums.MaskFlags
            left, top, right, bottom = box
            window = rasterio.windows.Window(left, top, right - left, bottom - top)
            values = np.ascontiguousarray(self._dataset.read(self._bands, window=window).transpose(1, 2, 0))
            flags = {flag for band in self._bands for flag in self._dataset.mask_flag_enums[band - 1]}
            valid = None
            if flag_names.all_valid not in flags and (flag_names.alpha not in flags or self._alpha):
                valid = (self._dataset.read_masks(self._bands, window=window) > 0).all(axis=0)
            if self._white:
                most = values.dtype.type(2**self._bits - 1) if values.dtype.kind == "u" else -1
                values = (most - values).astype(values.dtype)
            if self._colours is not None:
                values = self._colours[values[:, :, 0]]
            if self._steps is not None:
                values = (values * self._steps[0] + self._steps[1]).astype(np.float32)
            part = (0, 0, right - left, bottom - top)
            return Region(values, part, None if valid is None or valid.all() else valid)


def _place(dataset: Any) -> Place | None:
    crs = "" if dataset.crs is None else dataset.crs.to_string()
    return None if dataset.transform.is_identity and not crs else Place(dataset.transform.to_gdal(), crs)


def _library() -> Any:
    library = imported("rasterio", "files by data.reader=rasterio", "rasterio")
    # GDAL's lines about odd metadata, and about what it is about to raise.
    logging.getLogger("rasterio").setLevel(logging.CRITICAL + 1)
    return library


def _open(data: bytes, reading: Reading) -> Picture:
    if data[:200].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"<", b"{"):
        # A virtual dataset names other files, anywhere; bytes of a shard may be anyone's.
        raise UnreadableImage("it is text that describes other files, which are read from a folder only")
    file = _library().MemoryFile(data)
    return GdalPicture(file.open(), reading, file)


def _open_path(path: str | os.PathLike[str], reading: Reading) -> Picture:
    return GdalPicture(_library().open(os.path.abspath(path)), reading)


def _check(data: bytes, max_pixels: int) -> None:
    with _library().MemoryFile(data) as file, file.open() as dataset:
        check_pixels((dataset.width, dataset.height), max_pixels)


_EXTENSIONS = frozenset(
    (
        ".asc", ".bil", ".bt", ".dem", ".dt0", ".dt1", ".dt2", ".ers", ".gen", ".gpkg", ".grb", ".grb2",
        ".grd", ".grib2", ".hgt", ".img", ".kro", ".mrf", ".nc", ".ntf", ".pix", ".rst", ".sdat", ".ter",
        ".vrt", ".xyz",
    )
)  # fmt: skip
"""Of GDAL's own formats, beside those of the other readers."""

FORMAT = Format(_EXTENSIONS, (b"",), _open, _check, _open_path)
"""Not among the formats that know their files: it is asked for."""
