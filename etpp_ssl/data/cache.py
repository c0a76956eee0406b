"""`data.cache`: training images of 8 bits, decoded once and kept as arrays that all data workers read.

Their pixels are those that decoding gives each time, at each reduction that a crop may ask a JPEG for, so no
result changes. What is no such image (deeper, unreadable, read in parts) is opened as without a cache.

Legend: n images, C channels, H, W pixels.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import psutil
from filelock import FileLock
from PIL import Image

from etpp_ssl.config import UserError, shown_bytes
from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Picture,
    Region,
    UnreadableImage,
    whole_pixels,
)
from etpp_ssl.data.formats.jpeg import REDUCTIONS, JpegPicture, reduction
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.views import TrainView, intermediate_size
from etpp_ssl.files import replaced

LEVELS = (1, *sorted(REDUCTIONS))
"""Reductions whose pixels are kept, where a crop may be decoded at them."""
SAMPLE = 200
"""Images whose headers tell how much room all of them take."""
AT_ONCE = 256
"""Images that are decoded before they are written."""
MARGIN = 1.1
"""Of the estimate."""


class Row(NamedTuple):
    """Where an image's pixels lie; of one that is not kept all numbers are 0."""

    width: int
    height: int
    channels: int
    orientation: int
    """EXIF's, of a JPEG; 0 of other files, which have no reductions."""
    num_levels: int
    """How many of `LEVELS` are there, one behind the other."""
    offset: int


class KeptPicture:
    """A picture whose pixels are in memory.

    Args:
        levels: uint8 (H, W, C) at each reduction that is kept.
        size, orientation: see `Row`; (width, height) upright.
        original: opens the file, for a reduction that is not kept.
    """

    deep = False

    def __init__(
        self,
        levels: dict[int, np.ndarray],
        size: tuple[int, int],
        orientation: int,
        original: Callable[[], Picture],
    ) -> None:
        self._levels = levels
        self.size = size
        self._orientation = orientation
        self._original = original

    def channels(self) -> Channels:
        """See `Picture.channels`."""
        pixels = self._levels[1]
        if pixels.shape[2] == 3:
            return (Image.fromarray(pixels),)
        return tuple(Image.fromarray(pixels[:, :, c]) for c in range(pixels.shape[2]))

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """At the reduction that the file would be decoded at; see `Picture.region`."""
        factor, part = 1, (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
        if self._orientation:
            factor, part = reduction(self.size, self._orientation, box, at_least)
        if factor not in self._levels:
            return self._original().region(box, at_least, decoder)
        (left, top, right, bottom), inner = whole_pixels(part)
        return Region(self._levels[factor][top:bottom, left:right], inner)


class KeptImages:
    """An image source whose pictures come from kept pixels, where there are some.

    Args:
        source: the images.
        table: int64 (n, 6), a `Row` each.
        file: their pixels, by any name that other processes of this machine open them by.
        held: keeps the file there.
    """

    def __init__(self, source: ImageSource, table: np.ndarray, file: str, held: object = None) -> None:
        self.source = source
        self.table = table
        self.file = file
        self._held = held

    def __getstate__(self) -> dict[str, object]:
        # Another process maps the file itself.
        return {"source": self.source, "table": self.table, "file": self.file, "_held": None}

    @cached_property
    def _pixels(self) -> np.ndarray:
        # A private mapping: torch takes no array that cannot be written to. Slices of a memmap are slow.
        return np.asarray(np.memmap(self.file, dtype=np.uint8, mode="c"))

    @property
    def classes(self) -> list[str] | None:
        """See `ImageSource.classes`."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def open(self, index: int) -> Picture:
        """See `ImageSource.open`."""
        row = Row(*self.table[index].tolist())
        original = partial(self.source.open, index)
        if not row.num_levels:
            return original()
        levels, offset = {}, row.offset
        for factor in LEVELS[: row.num_levels]:
            shape = (-(-row.height // factor), -(-row.width // factor), row.channels)
            levels[factor] = self._pixels[offset : offset + shape[0] * shape[1] * shape[2]].reshape(shape)
            offset += levels[factor].size
        return KeptPicture(levels, (row.width, row.height), row.orientation, original)

    def label(self, index: int) -> int:
        """See `ImageSource.label`."""
        return self.source.label(index)

    def all_labels(self) -> np.ndarray | None:
        """See `ImageSource.all_labels`."""
        return self.source.all_labels()

    def name(self, index: int) -> str:
        """See `ImageSource.name`."""
        return self.source.name(index)

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        return self.source.fingerprint()

    def describe(self) -> str:
        """See `ImageSource.describe`."""
        return self.source.describe()


class Keeping(NamedTuple):
    """What is kept of a picture, and how it is decoded."""

    at_least: tuple[int, int]
    """(width, height): the smallest size that a crop is resized to in the run; see `Picture.region`."""
    decoder: Decoder

    def num_levels(self, size: tuple[int, int], *, jpeg: bool) -> int:
        """How many of `LEVELS` a crop may be decoded at."""
        if not jpeg:
            return 1
        sides = list(zip(size, self.at_least, strict=True))
        return max(1, sum(all(side >= factor * least for side, least in sides) for factor in LEVELS))

    def decode(self, open_image: Callable[[], Picture]) -> tuple[Row, list[np.ndarray]]:
        """A picture's row, without its place, and its pixels at each level."""
        try:
            picture = open_image()
            if not isinstance(picture, JpegPicture | DecodedPicture):
                return Row(0, 0, 0, 0, 0, 0), []
            jpeg = isinstance(picture, JpegPicture)
            count = self.num_levels(picture.size, jpeg=jpeg)
            orientation = picture.orientation if isinstance(picture, JpegPicture) else 0
            levels = []
            for factor in LEVELS[:count]:
                whole = (0, 0, -(-picture.size[0] // factor), -(-picture.size[1] // factor))
                if isinstance(picture, JpegPicture):
                    levels.append(picture.at(factor, whole, self.decoder).pixels)
                else:
                    levels.append(picture.region(whole, picture.size).pixels)
        except UnreadableImage:
            # Whoever opens it is told.
            return Row(0, 0, 0, 0, 0, 0), []
        return Row(*picture.size, levels[0].shape[2], orientation, count, 0), levels

    def room(self, source: ImageSource) -> int:
        """Bytes that a source's pixels take, from the headers of some of its images."""
        numbers = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).astype(np.int64))
        total = 0
        for index in numbers.tolist():
            row, levels = self.decode(partial(source.open, index))
            total += sum(level.size for level in levels) if row.num_levels else 0
        return int(MARGIN * total / len(numbers) * len(source))


def keeping(view: TrainView, bandwidths: Sequence[tuple[int, int]]) -> Keeping:
    """What a run keeps.

    Args:
        view: the training view.
        bandwidths: (height, width) of its stages.
    """
    if view.decode == "full":
        return Keeping((sys.maxsize, sys.maxsize), view.decoder)
    heights, widths = zip(*(intermediate_size(shown, view.image_size) for shown in bandwidths), strict=True)
    return Keeping((min(widths), min(heights)), view.decoder)


def keep(
    source: ImageSource,
    keeping: Keeping,
    where: Literal["ram", "disk"],
    *,
    num_threads: int,
    say: Callable[[str], None],
) -> KeptImages:
    """Decode images and keep their pixels, or take what an earlier run has left on disk.

    Args:
        source: the images.
        keeping: what is kept.
        where: `ram`, of this process and its data workers; `disk`, a file that all runs of this user share.
        num_threads: that decode.
        say: told what is kept and where.

    Raises:
        UserError: if there is no room, said before anything is decoded, or if of images on disk nobody could
            tell later whether they have changed.
    """
    if where == "ram":
        file = _in_memory()
        _check_room(source, keeping, psutil.virtual_memory().available, "memory", "this machine")
        table = _fill(file, source, keeping, num_threads)
        kept = KeptImages(source, table, _name_of(file), file)
        say(_told(kept, "in memory"))
        return kept
    folder = cache_folder() / _key(source, keeping)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            free = shutil.disk_usage(folder.parent).free
            _check_room(source, keeping, free, "disk space", repr(str(folder.parent)))
            with replaced(folder) as aside:
                with (aside / "pixels").open("wb") as file:
                    table = _fill(file, source, keeping, num_threads)
                np.save(aside / "table.npy", table)
    kept = KeptImages(source, np.load(folder / "table.npy"), str(folder / "pixels"))
    say(_told(kept, f"in {str(folder)!r}"))
    return kept


def cache_folder() -> Path:
    """Where files of `disk` lie: below `XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "etpp_ssl" / "images"


def _in_memory() -> BinaryIO:
    """An open file of no disk where the system has such, else one that goes with the process."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("etpp-images"), "w+b")
    return tempfile.NamedTemporaryFile(prefix="etpp-images-")  # type: ignore[return-value]


def _name_of(file: BinaryIO) -> str:
    # Data workers are other processes, and of some start methods no copies of this one.
    return f"/proc/{os.getpid()}/fd/{file.fileno()}" if isinstance(file.name, int) else file.name


def _key(source: ImageSource, keeping: Keeping) -> str:
    stamp: str | None = source.stamp() if hasattr(source, "stamp") else None
    if stamp is None:
        raise UserError(
            "data.cache is disk, which files of images can use, whose sizes and times tell whether they have "
            "changed; use data.cache=ram"
        )
    libraries = [version("pillow"), *([version("simplejpeg")] if keeping.decoder == "simplejpeg" else [])]
    return hashlib.blake2b(repr((stamp, keeping, libraries, 1)).encode(), digest_size=12).hexdigest()


def _check_room(source: ImageSource, keeping: Keeping, free: int, what: str, of: str) -> None:
    need = keeping.room(source)
    if need > free:
        raise UserError(
            f"data.cache: {len(source):,} decoded images take about {shown_bytes(need)}, but {of} has "
            f"{shown_bytes(free)} of {what} free; use data.cache=off"
        )


def _fill(file: BinaryIO, source: ImageSource, keeping: Keeping, num_threads: int) -> np.ndarray:
    """Write all pixels; returns the table."""
    table, offset = np.zeros((len(source), len(Row._fields)), dtype=np.int64), 0
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        for first in range(0, len(source), AT_ONCE):
            for index, (row, levels) in enumerate(_decoded(pool, source, keeping, first), first):
                table[index] = row._replace(offset=offset) if row.num_levels else row
                for level in levels:
                    offset += file.write(np.ascontiguousarray(level).data)
    if not offset:
        # Nothing cannot be mapped.
        file.write(bytes(mmap.PAGESIZE))
    file.flush()
    return table


def _decoded(
    pool: ThreadPoolExecutor, source: ImageSource, keeping: Keeping, first: int
) -> Iterator[tuple[Row, list[np.ndarray]]]:
    indices = range(first, min(first + AT_ONCE, len(source)))
    return pool.map(lambda index: keeping.decode(partial(source.open, index)), indices)


def _told(kept: KeptImages, where: str) -> str:
    count = int((kept.table[:, Row._fields.index("num_levels")] > 0).sum())
    size = shown_bytes(os.stat(kept.file).st_size)
    return f"data.cache: {count:,} of {len(kept):,} images are kept decoded {where}, {size}"
