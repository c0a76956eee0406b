"""numpy's file format (.npy), and arrays in memory: (H, W) or (H, W, C) of uint8 or uint16.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from etpp_ssl.data.formats.base import (
    Channels,
    DecodedPicture,
    Format,
    Picture,
    UnreadableImage,
    check_pixels,
)


def from_array(array: np.ndarray, in_chans: int) -> Channels:
    """An array's channels.

    Args:
        array: (H, W) or (H, W, C), uint8 or uint16, of which the high byte is kept.
        in_chans: C.

    Raises:
        UnreadableImage: for another shape or type.
    """
    shape = array.shape
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != in_chans or 0 in shape:
        raise UnreadableImage(f"its shape is {shape}, not (height, width, {in_chans})")
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = array >> 8
    elif array.dtype != np.uint8:
        raise UnreadableImage(f"its values are {array.dtype}, not uint8 or uint16")
    array = array.astype(np.uint8)
    if in_chans == 3:
        return (Image.fromarray(np.ascontiguousarray(array)),)
    return tuple(Image.fromarray(np.ascontiguousarray(array[:, :, c])) for c in range(in_chans))


def _check(data: bytes, max_pixels: int) -> None:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(file)
    if len(shape) >= 2:
        check_pixels((shape[1], shape[0]), max_pixels)
    # numpy itself makes room for what the header claims.
    claimed, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if claimed > there:
        raise UnreadableImage(f"its values take {claimed:,} bytes, but it has {there:,}")


def _open(data: bytes, in_chans: int, max_pixels: int) -> Picture:
    _check(data, max_pixels)
    return DecodedPicture(from_array(np.load(io.BytesIO(data), allow_pickle=False), in_chans))


FORMAT = Format(frozenset({".npy"}), (b"\x93NUMPY",), _open, _check)
