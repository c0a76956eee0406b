"""What an image file holds: a picture that is decoded when its pixels are asked for, and the limits on it.

A new format is a file beside this one with a `Format`, and one line in `__init__.py`.

Without `data.range` a picture is 8 bits deep, as Pillow has it. With it, formats give values as the file
has them, an `ArrayPicture` for instance, and `values.ValuePicture` makes float32 of them.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from etpp_ssl.config import NotAtHand

MAX_PIXELS = 178_956_970
"""Largest image by default, Pillow's own: half a gigabyte in three channels."""

Channels = tuple[Image.Image, ...]
"""One decoded image: a single picture of mode L or RGB for 1 or 3 channels, otherwise one picture of mode L
per channel, all of one size."""
Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""
Interpolation = Literal["bicubic", "bilinear", "box"]
"""Kernel of a resize, widened where it shrinks (Pillow's kernels)."""
Decoder = Literal["pillow", "simplejpeg"]
"""Library that decodes JPEGs; both stand on libjpeg-turbo."""


Reader = Literal["auto", "rasterio"]
"""Who reads files; see `data.reader`."""


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says why, without the image's name."""


class WithoutData(UnreadableImage):
    """An image that shows too little data, of which nothing is broken: windows of a scene have such."""


@dataclass(frozen=True)
class Reading:
    """How files become pictures: what a recipe's `data` says of it."""

    in_chans: int
    """C; 0, of raw values, is as many as a file has."""
    max_pixels: int = MAX_PIXELS
    """Larger images are refused, before they are decoded."""
    range: Literal["dtype", "raw"] | tuple[tuple[float, float], ...] | None = None
    """(low, high) per channel, which become 0 and 1; `dtype` divides integers by the largest of their type;
    None reads 8 bits. See `data.range`. `raw` gives each picture as its format has it, of 8 bits or deep, for
    counts of what files hold (`etpp_ssl.data.statistics`)."""
    clip: bool = False
    """Whether values outside the range become its nearer end."""
    nodata: float | None = None
    """The value that stands for a pixel without data, beside NaN and what the file itself states."""
    fill: tuple[float, ...] = ()
    """Per channel, in [0, 1] of the range: what a pixel without data is filled with, for the resize."""
    axes: str | None = None
    """See `data.axes`."""
    channels: tuple[int | str, ...] | None = None
    """See `data.channels`."""
    array: str | None = None
    """See `data.array`."""
    reader: Reader = "auto"
    """See `data.reader`."""
    sampled: bool = False
    """Whether a file may have more channels, of which a view shows C; see `data.channel_sampling`."""
    overviews: bool = False
    """Whether a file's smaller copies of itself may serve regions that need few pixels; see `level_for`."""
    frames: bool = False
    """Whether a file may hold several images, which are then the frames of its picture; see `data.frames`."""

    @property
    def deep(self) -> bool:
        """Whether values keep their depth."""
        return self.range is not None

    @property
    def stored(self) -> Reading:
        """What a format is asked for: all channels of the file, where the view chooses among them."""
        return replace(self, in_chans=0) if self.sampled else self

    @property
    def of_one(self) -> Reading:
        """Of images that are no part of a file: one frame is given at a time."""
        axes = self.axes and "".join(axis for axis in self.axes if axis in "hwc" or not self.frames)
        return replace(self, frames=False, axes=axes)

    def settings(self) -> dict[str, Any]:
        """What turns raw values into a model's input, for the config of an export; empty for 8 bits."""
        own = {key: getattr(self.of_one, key) for key in _OF_VALUES}
        return {key: value for key, value in own.items() if value != getattr(Reading, key)}

    @classmethod
    def of_settings(cls, settings: dict[str, Any], mean: tuple[float, ...]) -> Reading:
        """The reverse of `settings`, as JSON has it; `mean` is the channels', in [0, 1] of the range."""
        own = {key: settings[key] for key in _OF_VALUES if key in settings}
        if own.get("range") not in (None, "dtype"):
            own["range"] = tuple((float(low), float(high)) for low, high in own["range"])
        if own.get("channels") is not None:
            own["channels"] = tuple(own["channels"])
        return cls(len(mean), fill=mean, **own)

    def described(self) -> str:
        """How values become 0 to 1, in words."""
        if self.range == "dtype":
            return "integers divided by the largest value of their type"
        assert self.range != "raw"
        pairs = ((0.0, 255.0),) if self.range is None else self.range
        scaled = ", ".join(f"{low:g} to {high:g}" for low, high in pairs)
        return f"values of {scaled} scaled to [0, 1]{' and clipped' if self.clip else ''}"

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), float64 (C,) each: what becomes 0 and 1, of the values that a view has."""
        if self.range is None:
            return np.zeros(self.in_chans), np.full(self.in_chans, 255.0)
        assert self.range != "raw"
        pairs = ((0.0, 1.0),) if self.range == "dtype" else self.range
        low, high = np.broadcast_to(np.array(pairs), (self.in_chans, 2)).T
        return low, high


_OF_VALUES = ("range", "clip", "nodata", "axes", "channels", "array", "reader", "sampled")


class Region(NamedTuple):
    """Part of a picture, at the resolution it was decoded to."""

    pixels: np.ndarray
    """(H, W, C): uint8, and of deep pictures any numbers in this machine's byte order."""
    box: Box
    """The part asked for, in pixels of `pixels`; less than a pixel lies outside of it on each side."""
    valid: np.ndarray | None = None
    """bool (H, W): False where there is no data; None where there is everywhere."""


class Place(NamedTuple):
    """Where a picture lies on the earth."""

    transform: tuple[float, float, float, float, float, float]
    """GDAL's order: the upper left corner's x, x per column, x per row; its y, y per column, y per row."""
    crs: str
    """Coordinate system of x and y: `EPSG:32633`, or WKT; empty where the file does not tell."""

    def at(self, column: float, row: float) -> Place:
        """That of a part whose upper left corner is that of a pixel."""
        x, x_column, x_row, y, y_column, y_row = self.transform
        corner = (x + column * x_column + row * x_row, y + column * y_column + row * y_row)
        return Place((corner[0], x_column, x_row, corner[1], y_column, y_row), self.crs)


class Picture(Protocol):
    """An image whose size is known before it is decoded.

    Pictures of files that say where they lie have a `place`, too, and those that read only what is asked for
    have `reads_parts`; see the functions of these names. Of several images in a file one is a picture, and
    `FramedPicture` knows the others.
    """

    size: tuple[int, int]
    """(width, height) in pixels, upright."""

    deep: bool
    """Whether it has values as its file has them, which `region` gives, and not `channels`."""

    def channels(self) -> Channels:
        """The whole image at full resolution, 8 bits deep.

        Raises:
            UnreadableImage: if it cannot be decoded.
        """

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """Decode a part at full or, where the format can, at a lower resolution.

        Args:
            box: (left, top, right, bottom) in pixels of the full resolution, within `size`.
            at_least: (width, height) in pixels that the part keeps, unless `box` itself has fewer.
            decoder: library that decodes JPEGs.

        Raises:
            UnreadableImage: if it cannot be decoded.
        """


def place_of(picture: Picture) -> Place | None:
    """Where a picture lies on the earth, if its file says so."""
    place: Place | None = getattr(picture, "place", None)
    return place


def reads_parts(picture: Picture) -> bool:
    """Whether a picture reads only what is asked for, so that it is small and worth keeping."""
    return bool(getattr(picture, "reads_parts", False))


def level_for(
    levels: Sequence[tuple[int, int]], box: tuple[int, int, int, int], at_least: tuple[int, int]
) -> tuple[int, Box]:
    """Which copy of a picture serves a region: the smallest that keeps what it must.

    Args:
        levels: (width, height) of the picture, and of smaller copies that show all of it.
        box, at_least: see `Picture.region`.

    Returns:
        The number of the copy, and the box in its pixels, which may lie between them.
    """
    number, part = 0, (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    for other, size in enumerate(levels):
        # Divided last, which is exact where the result is a number of pixels.
        left, top, right, bottom = (box[i] * size[i % 2] / levels[0][i % 2] for i in range(4))
        enough = right - left >= at_least[0] and bottom - top >= at_least[1]
        if enough and size[0] < levels[number][0]:
            number, part = other, (left, top, right, bottom)
    return number, part


def whole_pixels(box: Box) -> tuple[tuple[int, int, int, int], Box]:
    """The whole pixels around a box (left, top, right, bottom), and the box in them."""
    left, top, right, bottom = box
    x, y = math.floor(left), math.floor(top)
    return (x, y, math.ceil(right), math.ceil(bottom)), (left - x, top - y, right - x, bottom - y)


class Format(NamedTuple):
    """A file format."""

    extensions: frozenset[str]
    """File names that count as images, in lower case with the dot."""
    signatures: tuple[bytes, ...]
    """What its files can begin with."""
    open: Callable[[bytes, Reading], Picture]
    """From a file's bytes to the picture, deep where `Reading.deep`. May raise anything: `one_line_reasons`
    is around it."""
    check: Callable[[bytes, int], object]
    """Reads the header only, from a file's bytes and the largest number of pixels; may raise anything."""
    open_path: Callable[[str | os.PathLike[str], Reading], Picture] | None = None
    """The same from a file or a folder on disk, of which only what is asked for is read; None where a file is
    read whole."""
    signature_at: int = 0
    """Bytes before the signature."""
    is_folder: bool = False
    """Whether an image is a folder of such a name, and no file."""


def require_library(key: str, library: str, extra: str) -> None:
    """Check that an optional library is installed.

    Args:
        key: of the recipe, with its value, which needs it.
        library: its module.
        extra: of etpp-ssl, which brings it.

    Raises:
        NotAtHand: if it is not.
    """
    if importlib.util.find_spec(library) is None:
        raise NotAtHand(f"{key} needs {library}, which is not installed: pip install 'etpp-ssl[{extra}]'")


def imported(module: str, what: str, extra: str) -> ModuleType:
    """An optional library, imported where a file needs it.

    Args:
        module: its name.
        what: it reads.
        extra: of etpp-ssl, which brings it.

    Raises:
        UnreadableImage: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise UnreadableImage(
            f"reading {what} needs {library}, which is not installed: pip install 'etpp-ssl[{extra}]'"
        ) from error


def pixels_of(channels: Channels) -> np.ndarray:
    """uint8 (H, W, C), writable, as torch wants it."""
    return np.concatenate([np.atleast_3d(np.asarray(channel)) for channel in channels], axis=2)


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Check the (width, height) that a file claims, before it is decoded.

    Raises:
        UnreadableImage: if that is more than `max_pixels`.
    """
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImage(
            f"it claims {width:,} x {height:,} pixels, more than data.max_pixels {max_pixels:,} allows"
        )


@contextmanager
def one_line_reasons(fault: str = "") -> Iterator[None]:
    """Turn whatever a decoder raises inside into an `UnreadableImage` with one line of reason.

    Its warnings are dropped: most of them are about broken metadata around a sound picture.

    Args:
        fault: what it means, said before the decoder's own words.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage:
        raise
    except Exception as error:
        # Decoders meet arbitrary bytes here and raise anything (SyntaxError, struct.error,
        # DecompressionBombError ...): each of them means one unreadable image.
        reason = f"{fault}: {error}" if fault else f"{type(error).__name__}: {error}"
        raise UnreadableImage(" ".join(reason.split())) from error


def starts_or_ends_on_pixels(box: tuple[float, float, float, float]) -> bool:
    """Whether torch can resize it: on each axis the start or the end is the border of a pixel."""
    left, top, right, bottom = box
    return (left % 1 == 0 or right % 1 == 0) and (top % 1 == 0 or bottom % 1 == 0)
