"""TIFFs: plain ones of 8 bits through Pillow; of all others, which pages are the image and what its channels.

Their values are `tiff_values.py`, through tifffile.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import re
import struct
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np

from etpp_ssl.data.formats import pillow
from etpp_ssl.data.formats.base import (
    Format,
    Picture,
    Reading,
    UnreadableImage,
    check_pixels,
    imported,
)
from etpp_ssl.data.formats.pictures import FramedPicture
from etpp_ssl.data.formats.tiff_values import PALETTE, Page, TiffPicture, place_of_page, prepare, size_of
from etpp_ssl.data.formats.values import channel_numbers, check_channels
from etpp_ssl.files import read_regular

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _DESCRIPTION = 254, 256, 257, 258, 259, 262, 270
_SAMPLES, _STRIP_BYTES, _PLANES, _TILE_BYTES, _EXTRA, _SAMPLE_FORMAT = 277, 279, 284, 325, 338, 339
_ORIENTATION, _GDAL_METADATA, _GDAL_NODATA = 274, 42112, 42113
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
    return not (
        reading.frames
        or is_narrow(size)
        or as_channels
        or named
        or any(is_copy(size, other) for other in sizes)
    )


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


MOST_PAGES = 10_000
"""Of a file: each costs a tenth of a millisecond."""
REDUCED, MASK = 1, 4
"""Bits of the tag SubfileType."""
_NARROW = 16
_ITEM = re.compile(r"<Item\b([^>]*)>([^<]*)</Item>")
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def by_tifffile(opened: Callable[[], BinaryIO], reading: Reading, *, in_parts: bool = False) -> Picture:
    """A file as a picture, of which the tags are read here.

    Args:
        opened: opens the file.
        reading: says which channels.
        in_parts: whether that is one on disk.

    Raises:
        UnreadableImage: where it is not sure which pages and samples are the image and its channels, and for
            values that are not read.
    """
    tifffile = imported("tifffile", "this kind of TIFF", "tiff")
    imported("imagecodecs", "this kind of TIFF", "tiff")
    # It writes about broken metadata around a sound picture.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    with opened() as file, tifffile.TiffFile(file, _multifile=False) as found:
        found.pages.cache = True  # Series would read them again.
        pages = list(itertools.islice(found.pages, MOST_PAGES + 1))
        if len(pages) > MOST_PAGES:
            raise UnreadableImage(f"it has more than {MOST_PAGES:,} pages")
        # A thumbnail may come first, and the picture behind it.
        below = [sub for page in pages if page.subfiletype & REDUCED and page.subifds for sub in page.pages]
        images = _whole([page for page in (*pages, *below) if not page.subfiletype & (REDUCED | MASK)])
        for page in images:
            check_channels(page.samplesperpixel)
            prepare(page, reading)
        size = size_of(images[0])
        check_pixels(size, reading.max_pixels)
        images, num_channels, names = _in_order(found, images, reading)
        bands, alpha = _bands(images[:num_channels], reading, names)
        masks = [page for page in pages if page.subfiletype & (REDUCED | MASK) == MASK]
        starts = range(0, len(images), num_channels)
        scales, *others = (
            [_scale(images[start + page], sample) for page, sample in bands] for start in starts
        )
        if others and (masks or any(other != scales for other in others)):
            raise UnreadableImage(
                "its pages have masks or scales of their own: write each to a file of its own"
            )
        first = TiffPicture(
            opened,
            [images, *_levels(images, pages)],
            bands,
            reading,
            scales,
            mask=next((page for page in masks if size_of(page) == size), None),
            alpha=alpha,
            place=place_of_page(images[0]),
            reads_parts=in_parts,
        )
        if len(starts) == 1:
            return first
        return FramedPicture(first, len(starts), lambda number: first.from_page(starts[number]))


def _whole(images: list[Page]) -> list[Page]:
    """The pages that are not a smaller copy of another one."""
    if not images:
        raise UnreadableImage("it holds reduced copies of an image, and not the image")
    largest = max(map(size_of, images), key=math.prod)
    images = [page for page in images if not is_copy(size_of(page), largest)]
    sizes = list(dict.fromkeys(map(size_of, images)))
    if len(sizes) > 1:
        some = ", ".join(f"{width:,} x {height:,}" for width, height in sizes[:3])
        raise UnreadableImage(f"its pages differ in size ({some}), and no tag says which one is the image")
    if len({(str(p.dtype), p.samplesperpixel, int(p.photometric)) for p in images}) > 1:
        raise UnreadableImage("its pages differ in the type of their values, in channels or in colours")
    if len({(p.tags.valueof(_ORIENTATION), p.tags.valueof(_GDAL_NODATA)) for p in images}) > 1:
        raise UnreadableImage("its pages differ in orientation, or in the value that stands for no data")
    return images


def _in_order(found: Any, images: list[Page], reading: Reading) -> tuple[list[Page], int, list[str]]:
    """The pages in the order of images and their channels, pages an image, and the channels' names or [].

    Raises:
        UnreadableImage: for several pages of which it is not sure what they are.
    """
    number, page, as_images = len(images), images[0], reading.frames and reading.axes is None
    series, extents = _series(found) if number > 1 or not found.is_ome else [], {}
    if series:
        axes = zip(series[0].axes, series[0].shape, strict=True)
        extents = {a: n for a, n in axes if a not in "YXS" and n > 1}
        alike = all((other.axes, other.shape) == (series[0].axes, series[0].shape) for other in series)
        series = series if as_images and alike else series[:1]
    planes = math.prod(extents.values()) * max(1, len(series))
    if extents and planes != number and reading.axes is None:
        plural = "s" * (number > 1)
        raise UnreadableImage(
            f"its description tells of {planes} planes, and it has {number} page{plural}: write each plane "
            f"to a page"
        )
    if number == 1:
        return images, 1, _described(page, "description")
    frames = "data.frames=all makes images of them"
    out = f"{frames}, data.axes=pages makes them channels, of which data.channels chooses"
    if reading.axes not in (None, "pages", "chw"):
        remedy = "data.axes is for arrays: leave it out" if reading.frames else out
        raise UnreadableImage(f"it has {number} pages, and data.axes is {reading.axes}: {remedy}")
    if extents and reading.axes is None and (reading.frames or extents.keys() == {"C"}):
        by_index = {page.index: page for page in images}
        indices = [page.index for one in series for page in one.pages]
        order = np.array(indices).reshape([len(series), *extents.values()])
        if "C" in extents:
            order = np.moveaxis(order, 1 + [*extents].index("C"), -1)
        num_channels = extents.get("C", 1)
        names = re.findall(r'<Channel\b[^>]*\bName="([^"]*)"', found.ome_metadata or "")
        own = names[:num_channels]
        named = page.samplesperpixel == 1 and len(own) == num_channels and names == own * len(series)
        return [by_index[index] for index in order.flat], num_channels, own if named else []
    if as_images:
        return images, 1, []
    if page.samplesperpixel > 1:
        raise UnreadableImage(f"it has {number} pages of {page.samplesperpixel} channels: {frames}")
    if reading.axes is None and not extents.keys() <= {"I", "Q"}:
        stack = ", ".join(f"{axis} {extent}" for axis, extent in extents.items())
        raise UnreadableImage(f"it is a stack of {number} pages ({stack}) and not one image: {out}")
    if reading.axes is None and number != reading.in_chans:
        width, height = size_of(page)
        narrow = is_narrow((width, height))
        wanted = f", but in_chans is {reading.in_chans}" if reading.in_chans else ""
        reason = f"it has 1 channel and {number} pages{wanted}"
        if narrow:
            reason = (
                f"it has {number} pages of {height} x {width} values, as tifffile writes an array "
                f"({number}, {height}, {width}): write that again with planarconfig='contig'. For pages that "
                f"are meant"
            )
        raise UnreadableImage(f"{reason}{',' if narrow else ':'} {out}")
    return images, number, []


def _series(found: Any) -> list[Any]:
    """What whoever wrote the file says that its pages are; [] where they say nothing."""
    if not (found.is_ome or found.is_imagej or found.is_shaped or found.is_stk):
        return []
    try:
        return list(found.series)
    except Exception:
        # Another program has changed the pages and left the description.
        return []


def _levels(images: list[Page], pages: list[Page]) -> list[list[Page]]:
    """Smaller copies of the images, by powers of two, in lists like theirs."""
    below = [list(page.pages) if page.subifds else [] for page in images]
    if len(images) == 1:
        below[0] += [page for page in pages if page.subfiletype & (REDUCED | MASK) == REDUCED]
    full, found = images[0], []
    for copies in zip(*below, strict=False):
        factor = round(full.imagewidth / max(1, copies[0].imagewidth))
        size = (math.ceil(full.imagewidth / max(1, factor)), math.ceil(full.imagelength / max(1, factor)))
        kinds = {(size_of(c), c.dtype, c.samplesperpixel, c.photometric) for c in copies}
        same = kinds == {(size, full.dtype, full.samplesperpixel, full.photometric)}
        if factor > 1 and factor.bit_count() == 1 and same:
            found.append(list(copies))
    return found


def _bands(
    images: list[Page], reading: Reading, names: list[str]
) -> tuple[list[tuple[int, int]], int | None]:
    """(page, sample) of each channel that is taken, and the sample that is alpha and is not.

    Raises:
        UnreadableImage: if they are others in number than `Reading.in_chans`.
    """
    page = images[0]
    bands = [(i, sample) for i in range(len(images)) for sample in range(page.samplesperpixel)]
    if reading.channels is None:
        # For colours: those of a palette, and without a range gray.
        if len(bands) == 1 and reading.in_chans == 3 and (page.photometric == PALETTE or not reading.deep):
            return bands if page.photometric == PALETTE else bands * 3, None
        if tuple(page.extrasamples) == (2,) and reading.in_chans in (0, len(bands) - 1):
            return bands[:-1], bands[-1][1] if reading.deep else None
    numbers = channel_numbers(len(bands), reading, names)
    return bands if numbers is None else [bands[number] for number in numbers], None


def _described(page: Page, role: str, default: str = "") -> list[str]:
    """What GDAL's metadata say of each band; [] where they say nothing of it."""
    found = {}
    for attributes, text in _ITEM.findall(str(page.tags.valueof(_GDAL_METADATA) or "")):
        own = dict(_ATTRIBUTE.findall(attributes))
        if own.get("role") == role and own.get("sample", "").isdigit():
            found[int(own["sample"])] = text
    return [found.get(sample, default) for sample in range(page.samplesperpixel)] if found else []


def _scale(page: Page, sample: int) -> tuple[float, float]:
    """(scale, offset) of a band."""
    scales, offsets = _described(page, "scale", "1"), _described(page, "offset", "0")
    return float(scales[sample] if scales else 1), float(offsets[sample] if offsets else 0)


def is_copy(size: tuple[int, int], of: tuple[int, int]) -> bool:
    """Whether a (width, height) is another one, reduced to two thirds or less."""
    (width, height), (full_width, full_height) = size, of
    return 3 * width <= 2 * full_width and abs(width * full_height - height * full_width) <= max(of)


def is_narrow(size: tuple[int, int]) -> bool:
    """Whether the columns of (width, height) may be channels that were taken for columns."""
    return size[0] <= _NARROW and size[0] < size[1]


_EXTENSIONS = frozenset({".tif", ".tiff", ".btf", ".tf8", ".svs"})
_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

FORMAT = Format(_EXTENSIONS, _SIGNATURES, _open, _check, _open_path)
