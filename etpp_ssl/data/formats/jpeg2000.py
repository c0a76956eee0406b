"""JPEG 2000: photographs of 8 bits through Pillow, other values at their own depth through imagecodecs.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from etpp_ssl.data.formats import pillow
from etpp_ssl.data.formats.base import Format, Picture, Reading, UnreadableImage, check_pixels, imported
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.formats.values import chosen

_STREAM = b"\xff\x4f\xff\x51"
"""Begins the compressed image, with its size."""
MOST_BITS = 24
"""OpenJPEG gives back others with errors."""
_ALPHA = 1


class Header(NamedTuple):
    """What is known before anything is decoded."""

    size: tuple[int, int]
    """(width, height)."""
    bits: list[int]
    """Of each component."""
    signed: bool
    """Whether one of them is."""
    alpha: bool
    """Whether the last of them is alpha."""


def _open(data: bytes, reading: Reading) -> Picture:
    header = header_of(data)
    if header.signed and not reading.deep:
        raise UnreadableImage("its values have signs, which 8 bits cannot tell: data.range reads them")
    eight_bits = set(header.bits) == {8} and not header.signed and len(header.bits) <= 4
    if not reading.deep or (eight_bits and reading.channels is None):
        # Pillow stretches 10 to 15 bits over 16, and knows no signs.
        return pillow.FORMAT.open(data, reading)
    check_pixels(header.size, reading.max_pixels)
    if max(header.bits) > MOST_BITS:
        raise UnreadableImage(f"it has more than {MOST_BITS} bits, which OpenJPEG does not decode exactly")
    imagecodecs = imported("imagecodecs", "JPEG 2000 of more than 8 bits", "tiff")
    values = imagecodecs.jpeg2k_decode(data)
    values = values.reshape(*values.shape[:2], -1)
    if header.alpha and reading.channels is None and reading.in_chans in (0, values.shape[2] - 1):
        values = values[:, :, :-1]
    return ArrayPicture(chosen(values, reading))


def header_of(data: bytes) -> Header:
    """What a file says of itself, or a compressed image within another file.

    Raises:
        ValueError, struct.error: if it is none.
    """
    start = data.index(_STREAM)
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    (number,) = struct.unpack_from(">H", data, start + 40)
    depths = [data[start + 42 + 3 * component] for component in range(number)]
    # A box of (component, kind, colour), two bytes each.
    place = data.find(b"cdef", 0, start)
    kinds = dict(
        struct.unpack_from(">HH", data, place + 6 + 6 * i) for i in range(number if place > 0 else 0)
    )
    return Header(
        (right - left, bottom - top),
        [(depth & 0x7F) + 1 for depth in depths],
        any(depth & 0x80 for depth in depths),
        kinds.get(number - 1) == _ALPHA,
    )


def _check(data: bytes, max_pixels: int) -> None:
    check_pixels(header_of(data).size, max_pixels)


_EXTENSIONS = frozenset({".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"})

FORMAT = Format(_EXTENSIONS, (b"\0\0\0\x0cjP  \r\n\x87\n", _STREAM), _open, _check)
