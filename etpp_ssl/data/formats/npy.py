"""numpy's file format (.npy), and arrays in memory: (H, W), (H, W, C), or as `data.axes` says.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

from etpp_ssl.data.formats.base import (
    ArrayPicture,
    Channels,
    Format,
    Picture,
    Reading,
    UnreadableImage,
    check_pixels,
    laid_out,
)


def from_array(array: np.ndarray, reading: Reading) -> Picture:
    """An array as a picture.

    Args:
        array: (H, W) or (H, W, C), or as `reading.axes` says.
        reading: says how many channels, and whether values keep their depth.

    Raises:
        UnreadableImage: for another shape, or values that cannot be read so.
    """
    axes, shape = reading.axes or ("hw" if array.ndim == 2 else "hwc"), array.shape
    fits = len(shape) in (2, 3) and 0 not in shape
    asked = fits and (reading.channels is not None or reading.in_chans in ((*shape, 1)[2], 0))
    if reading.axes is None and not asked:
        hint = "; data.axes=chw reads it" if fits and shape[0] == reading.in_chans else ""
        raise UnreadableImage(f"its shape is {shape}, not (height, width, {reading.in_chans}){hint}")
    return ArrayPicture(laid_out(array, axes, reading))


def eight_bits(values: np.ndarray) -> Channels:
    """(H, W, C) of uint8, or of uint16, of which the high byte is kept.

    Raises:
        UnreadableImage: for another type.
    """
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        values = values >> 8
    elif values.dtype != np.uint8:
        raise UnreadableImage(f"its values are {values.dtype}, not uint8 or uint16: data.range reads them")
    values = values.astype(np.uint8)
    if values.shape[2] == 3:
        return (Image.fromarray(np.ascontiguousarray(values)),)
    return tuple(Image.fromarray(np.ascontiguousarray(values[:, :, c])) for c in range(values.shape[2]))


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


def _open(data: bytes, reading: Reading) -> Picture:
    _check(data, reading.max_pixels)
    return from_array(np.load(io.BytesIO(data), allow_pickle=False), reading)


FORMAT = Format(frozenset({".npy"}), (b"\x93NUMPY",), _open, _check)
