"""The values of a TIFF's pages, read by the strips or tiles that a region touches, and what tags say of them.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, BinaryIO

import numpy as np

from etpp_ssl.data.formats import jpeg2000
from etpp_ssl.data.formats.base import (
    MAX_PIXELS,
    Channels,
    Decoder,
    Place,
    Reading,
    Region,
    UnreadableImage,
    level_for,
    one_line_reasons,
    whole_pixels,
)
from etpp_ssl.data.formats.pillow import ROTATED
from etpp_ssl.data.formats.values import without_data

Page = Any
"""A `tifffile.TiffPage`."""
IntBox = tuple[int, int, int, int]
"""(left, top, right, bottom)."""

WHITE_IS_ZERO, PALETTE = 0, 3
# 1 gray, 2 RGB, 4 of masks, 5 CMYK.
_KNOWN_COLOURS = frozenset((WHITE_IS_ZERO, 1, 2, PALETTE, 4, 5))
_YCBCR = 6
_COLOUR_CODECS = frozenset((6, 7, 33003, 33005))
"""Compressions whose decoders make RGB of YCbCr."""
_JPEGS, _JPEG_2000, _LERC = frozenset((6, 7)), frozenset((33003, 33004, 33005, 34712)), 34887
_ORIENTATION, _COLOUR_MAP, _NODATA = 274, 320, 42113
_PIXEL_SCALE, _TIE_POINTS, _TRANSFORM, _GEO_KEYS = 33550, 33922, 34264, 34735
_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED, _POINTS, _USER_DEFINED = 1025, 2048, 3072, 2, 32767
"""GeoTIFF's keys: numbers below the last are those of EPSG."""


class TiffPicture:
    """Channels of a TIFF, of which a region reads no more than the strips or tiles that it touches.

    Args:
        opened: opens the file.
        levels: the pages whose samples are channels, each prepared (see `prepare`), then the same for each
            smaller copy of the image; behind them those of other images in the file.
        bands: (page, sample) per channel; of a single one with a palette, its colours are shown.
        reading: says how deep.
        scales: per channel (scale, offset), which make the stored values the ones that are meant.
        mask: a page that is 0 where there is no data.
        alpha: the sample of the one page that is 0 where there is no data.
        place: where it lies on the earth.
        reads_parts: whether `opened` opens a file on disk.

    Raises:
        UnreadableImage: for values that are not read, or strips too large to be.
    """

    deep = True

    def __init__(
        self,
        opened: Callable[[], BinaryIO],
        levels: list[list[Page]],
        bands: list[tuple[int, int]],
        reading: Reading,
        scales: Sequence[tuple[float, float]],
        mask: Page | None = None,
        alpha: int | None = None,
        place: Place | None = None,
        reads_parts: bool = False,
    ) -> None:
        page = levels[0][0]
        self._turn = ROTATED.get(page.tags.valueof(_ORIENTATION))
        # Those of a mask may lie anywhere in the file.
        self._levels = levels if reading.overviews and mask is None and self._turn is None else levels[:1]
        for other in (*(page for level in self._levels[1:] for page in level), *([mask] if mask else [])):
            prepare(other, reading)
        self.place, self.reads_parts = (place if self._turn is None else None), reads_parts
        self._opened, self._bands, self._mask, self._alpha = opened, bands, mask, alpha
        self._sizes = [size_of(level[0]) for level in self._levels]
        turned = page.tags.valueof(_ORIENTATION, 1) >= 5 and self._turn is not None
        self.size = self._sizes[0][::-1] if turned else self._sizes[0]
        self._nodata = _number(page.tags.valueof(_NODATA))
        self._colours = None
        if page.photometric == PALETTE and reading.in_chans == 3 and len(bands) == 1:
            entries = np.asarray(page.tags.valueof(_COLOUR_MAP), np.uint16).reshape(3, -1).T
            self._colours = entries if page.bitspersample > 8 else (entries >> 8).astype(np.uint8)
        self._white = page.photometric == WHITE_IS_ZERO
        steps = np.array(scales).T
        self._steps = steps if reading.deep and (steps != [[1.0], [0.0]]).any() else None
        self._start = 0

    def from_page(self, start: int) -> TiffPicture:
        """Another image of the file, whose pages begin at this one."""
        other = copy(self)
        other._start = start
        return other

    def channels(self) -> Channels:
        """Not of 8 bits."""
        raise TypeError("a deep picture has regions only")

    def region(self, box: IntBox, at_least: tuple[int, int], decoder: Decoder = "pillow") -> Region:
        """At full resolution, or from a smaller copy; see `Picture.region`."""
        with one_line_reasons():
            number, part = level_for(self._sizes, box, at_least)
            outer, inner = whole_pixels(part)
            if self._turn is None:
                values, gaps = self._values(self._levels[number], outer)
            else:
                # Few are turned: they are read whole.
                whole, missing = self._values(self._levels[0], (0, 0, *self._sizes[0]))
                rows, columns = slice(outer[1], outer[3]), slice(outer[0], outer[2])
                values = np.ascontiguousarray(self._turn(whole)[rows, columns])
                gaps = self._turn(missing[:, :, None])[rows, columns, 0]
            return Region(values, inner, ~gaps if gaps.any() else None)

    def _values(self, pages: list[Page], box: IntBox) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, C), and bool (H, W) where there is no data."""
        pages = pages[self._start :]
        parts, missing = [], np.zeros((box[3] - box[1], box[2] - box[0]), bool)
        with self._opened() as file:
            for page, samples in self._runs(pages):
                parts.append(_read(file, page, samples, box, missing))
            if self._mask is not None:
                missing |= (_read(file, self._mask, [0], box, missing) == 0)[:, :, 0]
            if self._alpha is not None:
                missing |= (_read(file, pages[0], [self._alpha], box, missing) == 0)[:, :, 0]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        if self._nodata is not None:
            missing |= without_data(values, self._nodata)
        if self._white:
            bits = pages[0].bitspersample
            values = ~values if values.dtype.kind in "ib" else values.dtype.type(2**bits - 1) - values
        if self._colours is not None:
            values = self._colours[values[:, :, 0]]
        if values.dtype == bool:
            values = values * np.uint8(255)
        if self._steps is not None:
            values = (values * self._steps[0] + self._steps[1]).astype(np.float32)
        return values, missing

    def _runs(self, pages: list[Page]) -> list[tuple[Page, list[int]]]:
        """Each page with the samples that are taken of it, in the order of the channels."""
        runs: list[tuple[Page, list[int]]] = []
        for number, sample in self._bands:
            if runs and runs[-1][0] is pages[number]:
                runs[-1][1].append(sample)
            else:
                runs.append((pages[number], [sample]))
        return runs


def size_of(page: Page) -> tuple[int, int]:
    """(width, height)."""
    return page.imagewidth, page.imagelength


def _number(text: object) -> float | None:
    """Of GDAL's nodata tag, None where it is none."""
    for kind in (int, float):
        try:
            return kind(str(text).strip(" \0").replace(",", "."))
        except ValueError:
            continue
    return None


def _segment(page: Page) -> tuple[int, int]:
    """(width, height) of a tile or a strip."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength)


def _has_plain_rows(page: Page) -> bool:
    """Whether any row of a strip can be read by itself."""
    return bool(
        not page.is_tiled
        and (page.compression, page.predictor, page.fillorder) == (1, 1, 1)
        and page.dtype.kind in "uif"
        and page.bitspersample == page.dtype.itemsize * 8
    )


def prepare(page: Page, reading: Reading) -> None:
    """Check that a page can be read, and find its decoder, for which the file has to be open.

    Raises:
        UnreadableImage: if it cannot.
    """
    if page.dtype is None or page.dtype.kind not in "uifb":
        bits = page.bitspersample
        raise UnreadableImage(f"its values, of {bits} bits, are neither integers nor floats that can be read")
    if not reading.deep and page.dtype not in (np.uint8, np.uint16, np.bool_):
        kind = f"{page.dtype.itemsize * 8}-bit {'floats' if page.dtype.kind == 'f' else 'integers'}"
        raise UnreadableImage(f"its values are {kind}, not 8 or 16 bits: data.range reads them")
    if page.photometric == WHITE_IS_ZERO and page.dtype.kind == "f":
        raise UnreadableImage("it has floats of which white is 0, and nothing says which value is black")
    if page.compression in _JPEG_2000 and max(np.atleast_1d(page.bitspersample)) > 24:
        raise UnreadableImage(
            "it is JPEG 2000 of more than 24 bits, which OpenJPEG does not decode exactly: write it with "
            "deflate"
        )
    if page.imagedepth > 1:
        raise UnreadableImage("it is a volume: write each plane to a file of its own")
    by_codec = page.photometric == _YCBCR and page.compression in _COLOUR_CODECS
    if page.photometric not in _KNOWN_COLOURS and not by_codec:
        name = getattr(page.photometric, "name", page.photometric)
        raise UnreadableImage(f"its colours are {name}, which are not read: convert it to RGB")
    width, height = _segment(page)
    depth = page.samplesperpixel if page.planarconfig == 1 else 1
    if not _has_plain_rows(page) and width * height * depth > 4 * MAX_PIXELS:
        raise UnreadableImage(
            f"its strips or tiles are {width:,} x {height:,} pixels of {depth} channels, too many to decode "
            f"at once: write it in tiles"
        )
    page.decode  # noqa: B018


def _read(file: BinaryIO, page: Page, samples: list[int], box: IntBox, missing: np.ndarray) -> np.ndarray:
    """The samples of a part of a page, (H, W, samples); where its file holds nothing, `missing` is set."""
    left, top, right, bottom = box
    width, height = _segment(page)
    across, down = math.ceil(page.imagewidth / width), math.ceil(page.imagelength / height)
    planar = page.planarconfig == 2 and page.samplesperpixel > 1
    values = np.zeros((bottom - top, right - left, len(samples)), page.dtype)
    every: Any = slice(None)
    taken: Any = every if samples == list(range(page.samplesperpixel)) else samples
    for plane, into, which in [(s, k, 0) for k, s in enumerate(samples)] if planar else [(0, every, taken)]:
        for row in range(top // height, math.ceil(bottom / height)):
            for column in range(left // width, math.ceil(right / width)):
                x, y = column * width, row * height
                inside = (max(x, left), max(y, top), min(x + width, right), min(y + height, bottom))
                here = np.s_[inside[1] - top : inside[3] - top, inside[0] - left : inside[2] - left]
                index = (plane * down + row) * across + column
                part = _decoded(file, page, index, (inside[1] - y, inside[3] - y))
                if part is None:
                    missing[here] = True
                else:
                    values[here][:, :, into] = part[:, inside[0] - x : inside[2] - x][:, :, which]
    return values


def _decoded(file: BinaryIO, page: Page, index: int, rows: tuple[int, int]) -> np.ndarray | None:
    """Rows of a strip or a tile, (H, W, samples); None for one that is not in the file.

    Raises:
        UnreadableImage: if the file breaks off.
    """
    if index >= min(len(page.databytecounts), len(page.dataoffsets)):
        raise UnreadableImage("it has fewer strips or tiles than its size needs")
    offset, count = page.dataoffsets[index], page.databytecounts[index]
    if count == 0 or offset == 0:
        return None
    depth = page.samplesperpixel if page.planarconfig == 1 else 1
    plain = _has_plain_rows(page)
    if plain:
        stride = page.imagewidth * depth * page.dtype.itemsize
        offset, count = offset + rows[0] * stride, min((rows[1] - rows[0]) * stride, count - rows[0] * stride)
    file.seek(offset)
    data = file.read(count)
    if len(data) < count or (plain and count < (rows[1] - rows[0]) * stride):
        raise UnreadableImage(f"it breaks off in the middle of strip or tile {index}")
    if plain:
        stored = page.dtype.newbyteorder(page.parent.byteorder)
        return np.frombuffer(data, stored).reshape(rows[1] - rows[0], page.imagewidth, depth)
    claimed = _claimed(page, data)
    if math.prod(claimed) > 2 * math.prod(_segment(page)):
        raise UnreadableImage(
            f"strip or tile {index} claims {claimed[0]:,} x {claimed[1]:,} pixels, not its own"
        )
    own = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
    values: np.ndarray = page.decode(data, index, **own)[0][0]
    return values[rows[0] : rows[1]]


def _claimed(page: Page, data: bytes) -> tuple[int, int]:
    """(width, height) by a compressed strip's or tile's own header, where its codec makes room for that."""
    if page.compression in _JPEG_2000:
        return jpeg2000.header_of(data).size
    if page.compression == _LERC and data.startswith(b"Lerc2 "):
        rows, columns = struct.unpack_from("<2i", data, 14 if data[6] > 2 else 10)
        return columns, rows
    place = 2
    while page.compression in _JPEGS and place + 9 <= len(data) and data[place] == 0xFF:
        if 0xC0 <= data[place + 1] <= 0xCF and data[place + 1] not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0, 0


def place_of_page(page: Page) -> Place | None:
    """Where a GeoTIFF says that it lies; None for what is none, or says so by several points."""
    scale, points = page.tags.valueof(_PIXEL_SCALE), page.tags.valueof(_TIE_POINTS)
    matrix = page.tags.valueof(_TRANSFORM)
    if matrix is not None and len(matrix) == 16:
        x_column, x_row, _, x, y_column, y_row, _, y = matrix[:8]
    elif scale is not None and points is not None and len(points) == 6 and len(scale) >= 2:
        x_column, x_row, y_column, y_row = scale[0], 0.0, 0.0, -scale[1]
        x, y = points[3] - points[0] * x_column, points[4] - points[1] * y_row
    else:
        return None
    keys = page.tags.valueof(_GEO_KEYS) or ()
    # (key, where its value is, 0 for here, how many, the value) each, behind a header of the same size.
    here = {keys[i]: keys[i + 3] for i in range(4, len(keys) - 3, 4) if keys[i + 1] == 0}
    number = here.get(_PROJECTED) or here.get(_GEOGRAPHIC) or _USER_DEFINED
    place = Place(
        (x, x_column, x_row, y, y_column, y_row), f"EPSG:{number}" if number < _USER_DEFINED else ""
    )
    # The transform may be that of the centres of pixels.
    return place.at(-0.5, -0.5) if here.get(_RASTER_TYPE) == _POINTS else place
