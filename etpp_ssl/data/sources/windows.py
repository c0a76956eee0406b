"""Parts of files: windows of large images, and frames of files with several (slices, pages, times).

Each is an image of its own, addressed by index and read without its file's rest. Their number follows from
the files' headers, which are read once. Windows at the right and the lower edge are shifted inwards, so that
all have the same size. Neighbours may overlap or show the same thing, so that a part of the data
(`data.holdout`, `data.label_share`, `data.labels_per_class`) is drawn by file.

Legend: F files.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from abc import ABC
from copy import copy
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import field_validator, model_validator

from etpp_ssl.config import UserError, as_pair, legal_size, show_size
from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Picture,
    Place,
    Reading,
    Region,
    UnreadableImage,
    place_of,
    reads_parts,
)
from etpp_ssl.data.formats.pictures import FramedPicture, frames_of
from etpp_ssl.data.sources.base import DataConfig, ImageSource

MAX_OPEN = 16
"""Files that one worker keeps open."""
MOST_KNOWN = 8
"""Data sets whose headers one process remembers."""
SAID_EVERY_SECONDS = 10.0
"""How often a start says how many headers it has read."""


class TiledConfig(DataConfig, ABC):
    """Settings of sources whose files can be read in parts."""

    tile: int | tuple[int, int] | None = None
    """Pixels of a window of a file, one number or [height, width]: each window is then an image of its own.
    `holdout`, `label_share` and `labels_per_class` count files all the same, as windows overlap; `num_images`
    counts windows. Needs `range`."""
    stride: int | tuple[int, int] | None = None
    """Pixels from one window to the next, one number or [down, right]; None is the tile's, without overlap.
    Windows at an edge are shifted inwards."""
    overviews: Literal["auto", "never"] = "auto"
    """`auto`: with `range` and `decode: reduced`, training crops are read from the smaller copies that a file
    has of itself (its pyramid) where those keep enough pixels, if a check of a few files at the start says
    that they are averages. `never` reads full resolution."""
    frames: Literal["one", "all"] = "one"
    """`one`: a file is an image; of an animation its first frame, and a stack is refused. `all`: each slice,
    page, time or frame is an image, with all its channels: whatever lies along other axes than h, w and c
    (`axes`: `zhw`, `nhwc`). `holdout`, `label_share` and `labels_per_class` count files all the same;
    `num_images` counts frames, or windows of them."""

    @field_validator("tile", "stride")
    @classmethod
    def _sizes(cls, size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        return None if size is None else legal_size(size)

    @model_validator(mode="after")
    def _windows(self) -> TiledConfig:
        if self.frames == "all" and self.axes == "pages":
            raise ValueError("axes=pages makes pages channels, and frames=all images: give one of them")
        if self.frames == "all" and self.reader == "rasterio":
            raise ValueError("frames=all needs reader=auto: GDAL tells bands only")
        if self.tile is None:
            if self.stride is not None:
                raise ValueError("stride needs tile, the size of the windows")
            return self
        height, width = as_pair(self.tile)
        if self.range is None:
            raise ValueError("tile needs range, which is [0, 255] for values of 8 bits (`etpp inspect`)")
        if height * width > self.max_pixels:
            raise ValueError(f"tile has {height * width:,} pixels, more than max_pixels {self.max_pixels:,}")
        return self

    @property
    def reads_overviews(self) -> bool:
        """Whether training crops may come from overviews, if a check allows it."""
        return self.overviews == "auto" and self.decode == "reduced" and self.range is not None

    def reading(self, in_chans: int) -> Reading:
        """See `DataConfig.reading`."""
        return replace(super().reading(in_chans), frames=self.frames == "all")

    def parts(self, source: ImageSource) -> ImageSource:
        """The windows or frames of a source's files, or the source itself without `tile` and `frames`.

        Raises:
            UserError: if a file is smaller than a window.
        """
        if self.tile is None:
            return PartSource(source, None, None) if self.frames == "all" else source
        tile = as_pair(self.tile)
        return PartSource(source, tile, tile if self.stride is None else as_pair(self.stride))


class Part(NamedTuple):
    """What of a file is an image."""

    file: int
    """Its number among the files."""
    row: int
    """Upper edge, in pixels of the file."""
    column: int
    """Left edge."""
    frame: int
    """Number of the frame in the file."""


class PartSource:
    """The parts of a source's images, in the order of the images: frame by frame, row by row.

    Args:
        source: the files, of which only headers are read here.
        tile: (height, width) of a window; None for whole frames.
        stride: (down, right) from one window to the next.

    Raises:
        UserError: if an image is smaller than a window.
    """

    def __init__(
        self, source: ImageSource, tile: tuple[int, int] | None, stride: tuple[int, int] | None
    ) -> None:
        self.source = source
        self.tile = tile
        self.stride = stride
        self.classes = source.classes
        self._headers = _headers_of(source)
        sizes, frames = self._headers.sizes, self._headers.num_frames
        counts = np.ones((len(sizes), 2), np.int64)
        unreadable = (sizes == 0).any(axis=1)
        if tile is not None and stride is not None:
            small = np.flatnonzero(~unreadable & (sizes < tile).any(axis=1))
            if len(small):
                height, width = sizes[small[0]]
                more = f", and {len(small) - 1:,} more are smaller than the tile" if len(small) > 1 else ""
                raise UserError(
                    f"data.tile is {show_size(tile)}, but {source.name(int(small[0]))!r} has {height} x "
                    f"{width} pixels (height x width){more}: use a smaller tile, or leave such files out"
                )
            # What cannot be read is one image, which is met, named and replaced as any unreadable one is.
            counts = np.where(unreadable[:, None], 1, -(-(sizes - tile) // stride) + 1)
        self._counts = np.column_stack([frames, counts])
        """int64 (F, 3): frames, and windows down and across each."""
        self._starts = np.concatenate([[0], np.cumsum(self._counts.prod(axis=1, dtype=np.int64))])
        self._held = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        # Open files mean nothing to another process, and one process must not move another's place in them.
        return {**self.__dict__, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = threading.local()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def part(self, index: int) -> Part:
        """Which part of which file an image is."""
        if not 0 <= index < len(self):
            raise IndexError(f"part {index} of {len(self)}")
        file = int(np.searchsorted(self._starts, index, "right")) - 1
        number, (_, down, across) = index - int(self._starts[file]), self._counts[file].tolist()
        if self.tile is None or self.stride is None:
            return Part(file, 0, 0, number)
        last = np.maximum(self._headers.sizes[file] - self.tile, 0).tolist()
        frame, row, column = number // (down * across), number // across % down, number % across
        return Part(file, min(row * self.stride[0], last[0]), min(column * self.stride[1], last[1]), frame)

    def open(self, index: int) -> Picture:
        """A part that is read when its pixels are asked for; see `ImageSource.open`."""
        file, row, column, frame = self.part(index)
        whole = self._opened(file)
        height, width = self._headers.sizes[file]
        if (*whole.size, frames_of(whole)) != (width, height, self._headers.num_frames[file]):
            raise UnreadableImage("its size is not what it was when the run began")
        # A copy: whether a value lies outside of the range is told part by part.
        picture = whole.frame(frame) if isinstance(whole, FramedPicture) else copy(whole)
        if self.tile is None:
            return picture
        return WindowPicture(picture, (column, row, column + self.tile[1], row + self.tile[0]))

    def label(self, index: int) -> int:
        """That of the file."""
        return self.source.label(self.part(index).file)

    def all_labels(self) -> np.ndarray | None:
        """See `ImageSource.all_labels`."""
        labels = self.source.all_labels()
        return None if labels is None else np.repeat(labels, np.diff(self._starts))

    def name(self, index: int) -> str:
        """The file's, and which part of it: `scene.tif#row,column`, `scan.nii#frame`, or all three."""
        file, row, column, frame = self.part(index)
        places = [frame] * self.has_frames + [row, column] * (self.tile is not None)
        return f"{self.source.name(file)}#{','.join(map(str, places))}"

    @property
    def has_frames(self) -> bool:
        """Whether a file has more than one."""
        return bool((self._headers.num_frames > 1).any())

    def place(self, index: int) -> Place | None:
        """Where a part lies on the earth, if its file says so."""
        file, row, column, _ = self.part(index)
        transform = self._headers.transforms[file]
        if np.isnan(transform).any():
            return None
        return Place(tuple(transform.tolist()), self._headers.crs[self._headers.crs_numbers[file]]).at(
            column, row
        )

    def num_parts(self, file: int) -> int:
        """Of a file, by its number."""
        return int(self._starts[file + 1] - self._starts[file])

    def fingerprint(self) -> str:
        """Hash of the files' own, their sizes and frames, and the size and distance of the windows."""
        settings = repr((self.source.fingerprint(), self.tile, self.stride)).encode()
        digest = hashlib.blake2b(settings, digest_size=12)
        digest.update(self._headers.sizes.astype("<i4").tobytes())
        if self.has_frames:
            digest.update(self._headers.num_frames.astype("<i8").tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """Their number, their size and where they come from."""
        text = f"{self.source.describe()}{self._headers.note}"
        num_frames = int(self._headers.num_frames.sum())
        if self.has_frames or self.tile is None:
            text = f"{num_frames:,} frame{'s' * (num_frames != 1)} of {text}"
        if self.tile is None or self.stride is None:
            return text
        apart = "" if self.stride == self.tile else f", {show_size(self.stride)} apart"
        plural = "" if len(self) == 1 else "s"
        return f"{len(self):,} window{plural} of {show_size(self.tile)} pixels{apart}, of {text}"

    def _opened(self, file: int) -> Picture:
        """The file's picture, kept open for this thread's next parts of it."""
        held = self._held
        # A forked process shares the places in its parent's files.
        if getattr(held, "process", None) != os.getpid():
            held.process, held.pictures = os.getpid(), {}
        picture: Picture = held.pictures.pop(file, None) or self.source.open(file)
        if reads_parts(picture):
            held.pictures[file] = picture
            if len(held.pictures) > MAX_OPEN:
                # The one that was used longest ago; its file closes with it.
                held.pictures.pop(next(iter(held.pictures)))
        return picture


class WindowPicture:
    """A part of a picture, as a picture.

    Args:
        picture: that of the whole file.
        box: (left, top, right, bottom) in it.
    """

    def __init__(self, picture: Picture, box: tuple[int, int, int, int]) -> None:
        self._picture = picture
        self._box = box
        self.deep = picture.deep
        self.size = (box[2] - box[0], box[3] - box[1])

    @property
    def outside(self) -> bool:
        """Whether a value outside the range has been read."""
        return bool(getattr(self._picture, "outside", False))

    @property
    def place(self) -> Place | None:
        """Where it lies on the earth, if its file says so."""
        whole = place_of(self._picture)
        return None if whole is None else whole.at(*self._box[:2])

    def channels(self) -> Channels:
        """See `Picture.channels`."""
        return tuple(channel.crop(self._box) for channel in self._picture.channels())

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """That of the file, at the window's place; see `Picture.region`."""
        left, top = self._box[:2]
        part = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
        return self._picture.region(part, at_least, decoder)


class _Headers(NamedTuple):
    """What the headers of F files say."""

    sizes: np.ndarray
    """int32 (F, 2): height and width, 0 where a header cannot be read."""
    num_frames: np.ndarray
    """int64 (F,): of each file, 1 where a header cannot be read."""
    transforms: np.ndarray
    """float64 (F, 6), see `Place`; NaN where a file does not say where it lies."""
    crs_numbers: np.ndarray
    """int32 (F,): which of `crs`."""
    crs: list[str]
    complete: bool
    """Whether all could be read."""
    note: str
    """What else there is to say of them; empty for nothing."""


_KNOWN: dict[str, _Headers] = {}


def _headers_of(source: ImageSource) -> _Headers:
    """What they say, read once while the files stay as they are: a run opens its data several times."""
    stamp: str | None = source.stamp() if hasattr(source, "stamp") else None
    found = _KNOWN.get(stamp) if stamp else None
    if found is None:
        found = _read_headers(source)
        # What cannot be read now can perhaps be read later.
        if stamp and found.complete:
            _KNOWN[stamp] = found
            if len(_KNOWN) > MOST_KNOWN:
                _KNOWN.pop(next(iter(_KNOWN)))
    return found


def _read_headers(source: ImageSource) -> _Headers:
    num_files = len(source)
    sizes, num_frames = np.zeros((num_files, 2), np.int32), np.ones(num_files, np.int64)
    transforms = np.full((num_files, 6), np.nan)
    crs_numbers = np.zeros(num_files, np.int32)
    known: dict[str, int] = {"": 0}
    num_faults, first_fault, slow = 0, "", ""
    said = time.monotonic()
    for file in range(num_files):
        if time.monotonic() - said > SAID_EVERY_SECONDS and os.environ.get("RANK", "0") == "0":
            said = time.monotonic()
            print(f"data: {file:,} of {num_files:,} headers read", file=sys.stderr, flush=True)
        try:
            picture = source.open(file)
        except UnreadableImage as error:
            first_fault = first_fault or f"{source.name(file)!r}: {error}"
            num_faults += 1
            continue
        sizes[file], num_frames[file] = picture.size[::-1], frames_of(picture)
        if num_frames[file] > 1 and not reads_parts(picture):
            slow = (
                slow or f"; {source.name(file)!r} and files like it are read whole for each of their frames"
            )
        place = place_of(picture)
        if place is not None:
            transforms[file] = place.transform
            crs_numbers[file] = known.setdefault(place.crs, len(known))
    fault = f"; {num_faults:,} cannot be read, as {first_fault}" if num_faults else ""
    return _Headers(sizes, num_frames, transforms, crs_numbers, list(known), not num_faults, f"{fault}{slow}")
