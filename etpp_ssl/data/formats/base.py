"""What an image file holds: a picture that is decoded when its pixels are asked for, and the limits on it.

A new format is a file beside this one with a `Format`, and one line in `__init__.py`.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

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


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says why, without the image's name."""


class Region(NamedTuple):
    """Part of a picture, at the resolution it was decoded to."""

    pixels: np.ndarray
    """uint8 (H, W, C)."""
    box: Box
    """The part asked for, in pixels of `pixels`; less than a pixel lies outside of it on each side."""


class Picture(Protocol):
    """An image whose size is known before it is decoded."""

    size: tuple[int, int]
    """(width, height) in pixels, upright."""

    def channels(self) -> Channels:
        """The whole image at full resolution.

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


class DecodedPicture:
    """A picture that is decoded already.

    Args:
        channels: its pixels.
    """

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self.size = channels[0].size

    def channels(self) -> Channels:
        """See `Picture.channels`."""
        return self._channels

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """Always full resolution; see `Picture.region`."""
        part = (0, 0, box[2] - box[0], box[3] - box[1])
        return Region(pixels_of(tuple(channel.crop(box) for channel in self._channels)), part)


class Format(NamedTuple):
    """A file format."""

    extensions: frozenset[str]
    """File names that count as images, in lower case with the dot."""
    signatures: tuple[bytes, ...]
    """What its files can begin with."""
    open: Callable[[bytes, int, int], Picture]
    """From a file's bytes, the number of channels wanted and the largest number of pixels to the picture. May
    raise anything: `one_line_reasons` is around it."""
    check: Callable[[bytes, int], object]
    """Reads the header only, from a file's bytes and the largest number of pixels; may raise anything."""


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
def one_line_reasons() -> Iterator[None]:
    """Turn whatever a decoder raises inside into an `UnreadableImage` with one line of reason.

    Its warnings are dropped: most of them are about broken metadata around a sound picture.
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
        raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


def starts_or_ends_on_pixels(box: tuple[float, float, float, float]) -> bool:
    """Whether torch can resize it: on each axis the start or the end is the border of a pixel."""
    left, top, right, bottom = box
    return (left % 1 == 0 or right % 1 == 0) and (top % 1 == 0 or bottom % 1 == 0)
