"""JPEGs, decoded when their pixels are asked for and at a resolution that suffices.

The decoder computes 1/2, 1/4 or 1/8 of the resolution from the lower frequencies of each block of 8 x 8,
which is cheaper than all of them and aliases less than dropping pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from etpp_ssl.data.formats import pillow
from etpp_ssl.data.formats.base import (
    Box,
    Channels,
    Decoder,
    Format,
    Picture,
    Reading,
    Region,
    one_line_reasons,
    pixels_of,
    starts_or_ends_on_pixels,
    whole_pixels,
)
from etpp_ssl.data.formats.pillow import from_picture, open_image, orientation

REDUCTIONS = (8, 4, 2)
"""What a JPEG can be reduced by at decoding. There are n/8 too, slower than no reduction above 1/2."""

_AGAINST = {2: (1, 0), 3: (1, 1), 4: (0, 1), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
"""Upright axes (x, y) that run against those of the file, by EXIF orientation."""


class JpegPicture:
    """A JPEG of mode L or RGB whose header has been read.

    Args:
        data: the file.
        image: Pillow's picture of it, not yet loaded.
        reading: of 1 or 3 channels; its header has been checked against it.
    """

    deep = False

    def __init__(self, data: bytes, image: Image.Image, reading: Reading) -> None:
        self._data = data
        self._reading = reading
        # Pillow decodes a picture once, at one resolution: this one serves the first region.
        self._unused: Image.Image | None = image
        self._mode = image.mode
        self._file_size = image.size
        self.orientation = orientation(image)
        self.size = image.size[::-1] if self.orientation >= 5 else image.size

    def channels(self) -> Channels:
        """See `Picture.channels`."""
        with one_line_reasons():
            return from_picture(self._image(), self._reading)

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """At the lowest resolution that serves; see `Picture.region`."""
        return self.at(*reduction(self.size, self.orientation, box, at_least), decoder)

    def at(self, factor: int, box: Box, decoder: Decoder = "pillow") -> Region:
        """A region at a reduction of its own.

        Args:
            factor: 1, or one of `REDUCTIONS`.
            box: in pixels of that reduction; see `box_at`.
            decoder: see `Picture.region`.
        """
        outer, inner = whole_pixels(box)
        if decoder == "simplejpeg" and self.orientation == 1:
            pixels = self._by_simplejpeg(factor)
            if pixels is not None:
                return Region(pixels[outer[1] : outer[3], outer[0] : outer[2]], inner)
        with one_line_reasons():
            image = self._image()
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            (picture,) = from_picture(image, self._reading)
            return Region(pixels_of((picture.crop(outer),)), inner)

    def _image(self) -> Image.Image:
        # Reading the header a second time is a sixth of the work for a JPEG of 32 x 32.
        image, self._unused = self._unused or open_image(self._data, self._reading.max_pixels), None
        return image

    def _by_simplejpeg(self, factor: int) -> np.ndarray | None:
        """The file's pixels, or None for what Pillow does otherwise or is more patient with."""
        if self._mode != ("L" if self._reading.in_chans == 1 else "RGB"):
            return None
        import simplejpeg

        width, height = (-(-side // factor) for side in self._file_size)
        try:
            pixels: np.ndarray = simplejpeg.decode_jpeg(
                self._data,
                colorspace="GRAY" if self._reading.in_chans == 1 else "RGB",
                min_height=height if factor > 1 else 0,
                min_width=width if factor > 1 else 0,
                min_factor=factor,
            )
        except ValueError:
            return None
        return pixels if pixels.shape == (height, width, self._reading.in_chans) else None


def reduction(
    size: tuple[int, int], orientation: int, box: tuple[int, int, int, int], at_least: tuple[int, int]
) -> tuple[int, Box]:
    """The reduction that a region is decoded at, and its box there.

    A box that falls between pixels costs a slow resize. That eats up what half the resolution saves, so 2 is
    taken only for boxes that it can be resized out of fast.

    Args:
        size: (width, height) of the upright picture.
        orientation: EXIF's.
        box, at_least: see `Picture.region`.
    """
    possible = [
        factor
        for factor in REDUCTIONS
        if box[2] - box[0] >= factor * at_least[0] and box[3] - box[1] >= factor * at_least[1]
    ]
    boxes = [(factor, box_at(factor, size, orientation, box)) for factor in possible]
    fast = [(factor, found) for factor, found in boxes if starts_or_ends_on_pixels(found)]
    slow = [(factor, found) for factor, found in boxes if factor > 2]
    return (*fast, *slow, (1, box))[0]


def box_at(factor: int, size: tuple[int, int], orientation: int, box: Box) -> Box:
    """A box of the upright picture in pixels of a reduction; see `reduction`."""
    # The reduced size is rounded up. In the file the surplus lies right and below, so on an axis that runs
    # against the file's it lies before the picture.
    surplus_x, surplus_y = (
        against * (-side % factor)
        for against, side in zip(_AGAINST.get(orientation, (0, 0)), size, strict=True)
    )
    left, top, right, bottom = box
    return (
        (left + surplus_x) / factor,
        (top + surplus_y) / factor,
        (right + surplus_x) / factor,
        (bottom + surplus_y) / factor,
    )


def _open(data: bytes, reading: Reading) -> Picture:
    if reading.in_chans in (0, 1, 3):
        image = open_image(data, reading.max_pixels)
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            return JpegPicture(data, image, reading)
    return pillow.FORMAT.open(data, reading)


_EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"})

FORMAT = Format(_EXTENSIONS, signatures=(b"\xff\xd8",), open=_open, check=open_image)
