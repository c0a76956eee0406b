"""TIFFs: plain ones of 8 bits through Pillow, all others through tifffile.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import io
import os
import re
import struct
from importlib.util import find_spec
from typing import Any, BinaryIO

from etpp_ssl.data.formats import pillow
from etpp_ssl.data.formats.base import (
    Format,
    Picture,
    Reading,
    check_pixels,
)
from etpp_ssl.data.formats.tiff_pages import MASK, REDUCED, by_tifffile, is_copy, is_narrow
from etpp_ssl.files import read_regular

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _DESCRIPTION = 254, 256, 257, 258, 259, 262, 270
_SAMPLES, _STRIP_BYTES, _PLANES, _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT = 277, 279, 284, 325, 338, 339
_GDAL_METADATA, _GDAL_NODATA = 42112, 42113
_READ = frozenset(
    (
        _SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _DESCRIPTION, _SAMPLES, _STRIP_BYTES,
        _PLANES, _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT, _GDAL_METADATA,
    )
)  # fmt: skip
"""Tags whose values the choice of a reader needs."""
_LETTERS = {1: "B", 2: "s", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_PILLOWS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946, 50000, 50001))
"""Compressions."""
_PLAIN: dict[int, set[tuple[int, tuple[int, ...]]]] = {
    0: {(1, ())},
    1: {(1, ()), (2, (2,))},
    2: {(3, ()), (4, ()), (4, (0,)), (4, (1,)), (4, (2,))},
    3: {(1, ())},
    5: {(4, ())},
    6: {(3, ())},
    8: {(3, ())},
}
"""What Pillow reads right of 8 bits: by PhotometricInterpretation (samples, ExtraSamples)."""
_NAMED = re.compile(rb"<\?xml|<OME|ImageJ=|\{")
"""Begin descriptions that tell what the pages are."""

Tags = dict[int, tuple[Any, ...]]
"""By number; values of those not read are ()."""


def _open(data: bytes, reading: Reading) -> Picture:
    if _is_plain(io.BytesIO(data), reading):
        return pillow.FORMAT.open(data, reading)
    return by_tifffile(lambda: io.BytesIO(data), reading)


def _open_path(path: str | os.PathLike[str], reading: Reading) -> Picture:
    with open(path, "rb") as file:
        if not _is_plain(file, reading) or (_tifffile_has_the_same(file, reading) and find_spec("tifffile")):
            return by_tifffile(lambda: open(path, "rb"), reading, in_parts=True)
    return pillow.FORMAT.open(read_regular(path, 1 << 40), reading)


def _check(data: bytes, max_pixels: int) -> None:
    try:
        (first,) = _directories(io.BytesIO(data), 1)
        check_pixels((first[_WIDTH][0], first[_HEIGHT][0]), max_pixels)
    except (struct.error, LookupError, ValueError):
        pillow.FORMAT.check(data, max_pixels)


def _is_plain(file: BinaryIO, reading: Reading) -> bool:
    """Whether Pillow reads all of it right, or says best what is wrong with it."""
    try:
        pages = _directories(file, reading.in_chans + pillow.MORE_PAGES)
        # Of big-endian BigTIFF Pillow knows nothing.
        file.seek(0)
        return not pages or (file.read(4) != b"MM\0+" and _all_plain(pages, reading))
    except (struct.error, LookupError):
        return True


def _all_plain(pages: list[Tags], reading: Reading) -> bool:
    first = pages[0]
    bits = set(first.get(_BITS) or (1,))
    samples, extra = first.get(_SAMPLES, (1,))[0], first.get(_EXTRA, ())
    colours = first.get(_COLOURS, (1,))[0]
    size = (first[_WIDTH][0], first[_HEIGHT][0])
    kinds = [page.get(_SUBFILE, (0,))[0] for page in pages]
    images = [page for page, kind in zip(pages, kinds, strict=True) if not kind & (REDUCED | MASK)]
    if (
        bits not in ({8}, {1}, *(() if reading.deep else ({2}, {4})))
        or not set(first.get(_SAMPLE_FORMAT, (1,))) <= {1, 4}
        or (samples, extra) not in _PLAIN.get(colours, ())
        or first.get(_COMPRESSION, (1,))[0] not in _PILLOWS
        or any(0 in page.get(tag, ()) for page in images for tag in (_STRIP_BYTES, _TILE_BYTES))
        or _GDAL_NODATA in first
        or any(kind & MASK for kind in kinds)
        or images[:1] != pages[:1]
        # Pillow knows colours only: it divides them by alpha, drops a fourth band, shows a palette's.
        or reading.channels is not None
        or reading.axes is not None
        or (extra in ((0,), (1,)) and reading.in_chans == 4)
        or (extra in ((0,), (2,)) and reading.deep)
        or (colours == 3 and reading.deep and reading.in_chans != 3)
        or (reading.deep and re.search(rb'role="(scale|offset)"', first.get(_GDAL_METADATA, (b"",))[0]))
    ):
        return False
    if len(images) == 1:
        return True
    sizes = [(page[_WIDTH][0], page[_HEIGHT][0]) for page in images]
    as_channels = samples == 1 and len(images) == 3 == reading.in_chans
    named = _NAMED.match(first.get(_DESCRIPTION, (b"",))[0])
    return not (is_narrow(size) or as_channels or named or any(is_copy(size, other) for other in sizes))


def _tifffile_has_the_same(file: BinaryIO, reading: Reading) -> bool:
    """Whether tifffile gives what Pillow gives of a plain file, and not all of it at once."""
    try:
        page, *others = _directories(file, pillow.MORE_PAGES)
        if not all(other.get(_SUBFILE, (0,))[0] & REDUCED for other in others):
            return False
        colours, samples = page.get(_COLOURS, (1,))[0], page.get(_SAMPLES, (1,))[0]
        as_stored = colours in (1, 2) or (colours, page.get(_COMPRESSION)) == (6, (7,))
        whole = page.get(_PLANES, (1,)) == (1,) and page.get(_BITS) == (8,) * samples
        return as_stored and whole and samples == (reading.in_chans or samples)
    except (struct.error, LookupError, ValueError):
        return False


def _directories(file: BinaryIO, most: int) -> list[Tags]:
    """The tags of the first pages, by a look at no more than them.

    Raises:
        struct.error: where the file breaks off.
    """
    file.seek(0)
    head = file.read(16)
    order = "<" if head.startswith(b"II") else ">"
    large = head[2:4] in (b"+\0", b"\0+")
    (offset,) = struct.unpack(f"{order}Q", head[8:]) if large else struct.unpack(f"{order}I", head[4:8])
    count, entry, pointer = ("Q", "HHQ8s", "Q") if large else ("H", "HHI4s", "I")
    pages: list[Tags] = []
    seen: set[int] = set()
    while offset and offset not in seen and len(pages) < most:
        seen.add(offset)
        file.seek(offset)
        (number,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
        body = file.read(min(number, 1 << 16) * struct.calcsize(order + entry))
        following = file.read(struct.calcsize(order + pointer))
        tags: Tags = {}
        for tag, kind, length, place in struct.iter_unpack(order + entry, body):
            letter = _LETTERS.get(kind)
            tags[tag] = ()
            if tag in _READ and letter:
                size = min(length, 1 << 20) * struct.calcsize(letter)
                if size > len(place):
                    file.seek(struct.unpack(order + pointer, place)[0])
                    place = file.read(size)
                tags[tag] = struct.unpack(f"{order}{size // struct.calcsize(letter)}{letter}", place[:size])
        pages.append(tags)
        # The last page of a file that breaks off here is found broken by its reader.
        offset = struct.unpack(order + pointer, following)[0] if following else 0
    return pages


_EXTENSIONS = frozenset({".tif", ".tiff", ".btf", ".tf8", ".svs"})
_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

FORMAT = Format(_EXTENSIONS, _SIGNATURES, _open, _check, _open_path)
