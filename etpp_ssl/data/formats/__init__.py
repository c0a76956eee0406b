"""What an image file holds, one file per format; here its bytes are opened, whatever their format.

The bytes may be anyone's: what they claim is checked before it is decoded, and none of it is executed.
"""

from __future__ import annotations

import os

from etpp_ssl.data.formats import jpeg, npy, pillow
from etpp_ssl.data.formats.base import (
    MAX_PIXELS,
    Channels,
    Format,
    Picture,
    UnreadableImage,
    one_line_reasons,
)
from etpp_ssl.files import read_regular

FORMATS = (npy.FORMAT, jpeg.FORMAT, pillow.FORMAT)
"""In this order; the first whose signature fits opens a file. One line here makes a new format known."""
EXTENSIONS = frozenset().union(*(form.extensions for form in FORMATS))
"""File names that count as images, in lower case: of every format that can be read."""


def open_picture(data: bytes, in_chans: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """A file's bytes as a picture of `in_chans` channels of uint8.

    EXIF orientation is applied, of an animation (GIF, PNG, WebP) only the first frame is used, colour
    profiles are ignored, 16-bit values keep their high byte. Gray, palette, RGBA and CMYK become RGB for
    3 channels and luma for 1 (alpha is dropped). Other channel counts are read from the channels of the
    file, from the pages of a TIFF, or from a numpy array (H, W, C) of uint8 or uint16. 32-bit integers
    and floats have no agreed range and are refused.

    Plain gray and colour JPEGs are decoded when their pixels are asked for; everything else is decoded here.

    Args:
        data: the file's bytes.
        in_chans: C, at least 1.
        max_pixels: larger images are refused, before they are decoded.

    Raises:
        UnreadableImage: for anything that cannot be read so, with the reason.
    """
    with one_line_reasons():
        return _format_of(data).open(data, in_chans, max_pixels)


def check_header(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Check that a file's bytes begin as those of an image do; no pixel is decoded.

    Raises:
        UnreadableImage: for what is not an image, or claims more than `max_pixels`.
    """
    with one_line_reasons():
        _format_of(data).check(data, max_pixels)


def _format_of(data: bytes) -> Format:
    return next(form for form in FORMATS if data.startswith(form.signatures))


def read_file(path: str | os.PathLike[str], at_most: int) -> bytes:
    """A file's bytes, as they are stored.

    Raises:
        UnreadableImage: if the file cannot be read, is none (a named pipe, a device), or has more bytes.
    """
    try:
        return read_regular(path, at_most)
    except (OSError, ValueError) as error:
        # ValueError: a path can hold a null byte.
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error


def open_file(path: str | os.PathLike[str], in_chans: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """A file as a picture; see `open_picture` and `read_file`."""
    return open_picture(read_file(path, most_bytes(max_pixels, in_chans)), in_chans, max_pixels)


def decode(data: bytes, in_chans: int, max_pixels: int = MAX_PIXELS) -> Channels:
    """The channels of a file's bytes; see `open_picture`."""
    return open_picture(data, in_chans, max_pixels).channels()


def most_bytes(max_pixels: int, in_chans: int) -> int:
    """No image of so many pixels takes more in a file: 16 bits per channel, and room for metadata."""
    return max_pixels * 2 * max(4, in_chans) + (64 << 20)
