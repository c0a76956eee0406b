"""Pictures that are in memory, that are decoded late, or that a file has several of.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Picture,
    Region,
    one_line_reasons,
    pixels_of,
    place_of,
    reads_parts,
)


class DecodedPicture:
    """A picture of 8 bits that is decoded already.

    Args:
        channels: its pixels.
    """

    deep = False

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


class ArrayPicture:
    """Values that are in memory already.

    Args:
        values: (H, W, C) of any numbers, in this machine's byte order.
        valid: bool (H, W), False where there is no data; None where there is everywhere.
    """

    deep = True

    def __init__(self, values: np.ndarray, valid: np.ndarray | None = None) -> None:
        self._values = values
        self._valid = valid
        self.size = (values.shape[1], values.shape[0])

    def channels(self) -> Channels:
        """Not of 8 bits."""
        raise TypeError("a deep picture has regions only")

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """Always full resolution; see `Picture.region`."""
        left, top, right, bottom = box
        part = (slice(top, bottom), slice(left, right))
        valid = None if self._valid is None else self._valid[part]
        return Region(self._values[part], (0, 0, right - left, bottom - top), valid)


class LazyPicture:
    """A picture that is decoded once, when its pixels are asked for: a start looks at many headers.

    Args:
        size: (width, height), upright.
        deep: whether its values keep their depth.
        decode: gives its pixels.
    """

    def __init__(self, size: tuple[int, int], deep: bool, decode: Callable[[], Picture]) -> None:
        self.size = size
        self.deep = deep
        self._decode = decode
        self._decoded: Picture | None = None

    def channels(self) -> Channels:
        """Of 8 bits; see `Picture.channels`."""
        if self.deep:
            raise TypeError("a deep picture has regions only")
        return self._picture().channels()

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """See `Picture.region`."""
        return self._picture().region(box, at_least, decoder)

    def _picture(self) -> Picture:
        if self._decoded is None:
            with one_line_reasons():
                self._decoded = self._decode()
        return self._decoded


class FramedPicture:
    """A file of several images of one size: the first of them as a picture, and the way to the others.

    Args:
        first: the picture of the first.
        num_frames: how many there are.
        frame: from a number below that to the picture.
    """

    def __init__(self, first: Picture, num_frames: int, frame: Callable[[int], Picture]) -> None:
        self.num_frames = num_frames
        self.frame = frame
        self.size, self.deep = first.size, first.deep
        self.place, self.reads_parts = place_of(first), reads_parts(first)
        self.channels, self.region = first.channels, first.region


def frames_of(picture: Picture) -> int:
    """Number of images in a picture's file."""
    return picture.num_frames if isinstance(picture, FramedPicture) else 1
