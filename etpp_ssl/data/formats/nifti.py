"""NIfTI 1 and 2 (.nii, .nii.gz): what nibabel says of the header, in its closest canonical orientation.

The axes are then x to the right, y to the front and z up, whatever the file's own. x is the width and y the
height of an image; of an image of two other axes, the first of them is the width.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from typing import Any

import numpy as np

from etpp_ssl.data.formats.arrays import Scale, check_claim, picture_of_array
from etpp_ssl.data.formats.base import (
    Format,
    Picture,
    Reading,
    UnreadableImage,
    check_pixels,
    imported,
    one_line_reasons,
)

_GZIP = b"\x1f\x8b"
_SIGNATURES = {struct.pack(f"{order}i", length): length for order in "<>" for length in (348, 540)}
"""A header's first number is its length, in the byte order of the file: NIfTI 1 and 2."""
_MAGIC = {348: (344, b"n+1\0"), 540: (4, b"n+2\0")}
"""Where a header of each length says what it is, and what."""


def _open(data: bytes, reading: Reading) -> Picture:
    header = _header(data[:540])
    shape, dtype = _layout(header)
    _require(shape, dtype, header, len(data))
    values = np.frombuffer(data, dtype, math.prod(shape), header.get_data_offset())
    return _picture(values.reshape(shape, order="F"), header, reading)


def _open_path(path: str | os.PathLike[str], reading: Reading) -> Picture:
    with open(path, "rb") as file:
        header = _header(file.read(540))
    shape, dtype = _layout(header)
    _require(shape, dtype, header, os.stat(path).st_size)
    values = np.memmap(path, dtype, "r", header.get_data_offset(), shape, order="F")
    return _picture(values, header, reading, on_disk=True)


def _open_packed(data: bytes, reading: Reading) -> Picture:
    """All of it, as no place in it can be found without what comes before."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        try:
            start = stream.read(540)
            header = _header(start)
            shape, dtype = _layout(header)
            check_claim(shape, reading)
            end = header.get_data_offset() + math.prod(shape) * dtype.itemsize
            # Reading beyond the values makes gzip compare its checksum.
            unpacked = start + stream.read(max(0, end - len(start)) + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UnreadableImage(f"its compression is damaged or incomplete: {error}") from error
    return _open(unpacked, reading)


def _header(start: bytes) -> Any:
    length = _SIGNATURES.get(start[:4])
    if length is None:
        raise UnreadableImage("it is compressed, but not a NIfTI file")
    if len(start) < length:
        raise UnreadableImage("it is incomplete: its header is cut off")
    place, magic = _MAGIC[length]
    if not start[place:].startswith(magic):
        raise UnreadableImage("it is in no known image format, or a NIfTI header without its values")
    nifti = imported("nibabel", "NIfTI", "nifti")
    # Its own check would log what it repairs.
    kind = nifti.Nifti1Header if length == 348 else nifti.Nifti2Header
    return kind(start[:length], check=False)


def _layout(header: Any) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of what is stored; colours are its first axis."""
    with one_line_reasons("its header is damaged"):
        dtype = header.get_data_dtype()
        shape = tuple(int(length) for length in header.get_data_shape())
    if dtype.names:
        return (len(dtype.names), *shape), np.dtype(dtype[0])
    return shape, dtype


def _require(shape: tuple[int, ...], dtype: np.dtype, header: Any, there: int) -> None:
    claimed = math.prod(shape) * dtype.itemsize
    left = max(0, there - header.get_data_offset())
    if min(shape, default=0) < 1 or claimed > left:
        raise UnreadableImage(f"its values, of shape {shape}, take {claimed:,} bytes, but it has {left:,}")


def _picture(values: np.ndarray, header: Any, reading: Reading, *, on_disk: bool = False) -> Picture:
    orientations = imported("nibabel.orientations", "NIfTI", "nifti")
    with one_line_reasons("its orientation or scale is damaged"):
        affine, (slope, intercept) = header.get_best_affine(), header.get_slope_inter()
        orientation = orientations.io_orientation(affine)
    colours = ""
    if header.get_data_dtype().names:
        # Transparency, the fourth, is dropped.
        values, colours = np.moveaxis(values[:3], 0, -1), "c"
    num_axes = values.ndim - len(colours)
    for axis in range(num_axes, 3):
        values = np.expand_dims(values, axis)
    with one_line_reasons("its orientation is damaged"):
        # Of views, so that no value is read here.
        values = orientations.apply_orientation(values, orientation)
    long = [axis for axis in range(3) if values.shape[axis] > 1]
    width, height = (*long, *(axis for axis in range(3) if axis not in long))[:2]
    names = list("xyztuvs"[: values.ndim - len(colours)] + colours)
    for axis, letter in ((min(width, height), "w"), (max(width, height), "h")):
        names[axis] = letter
    scale: Scale = (1.0, 0.0) if slope is None or colours else (slope, intercept)
    return picture_of_array(values, reading, "".join(names), scale=scale, on_disk=on_disk)


def _check_packed(data: bytes, max_pixels: int) -> None:
    try:
        start = gzip.GzipFile(fileobj=io.BytesIO(data)).read(540)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableImage(f"its compression is damaged or incomplete: {error}") from error
    _check(start, max_pixels)


def _check(data: bytes, max_pixels: int) -> None:
    shape = (*_header(data[:540]).get_data_shape(), 1, 1)
    check_pixels((int(shape[0]), int(shape[1])), max_pixels)


FORMAT = Format(frozenset({".nii"}), tuple(_SIGNATURES), _open, _check, _open_path)
PACKED = Format(frozenset({".nii.gz"}), (_GZIP,), _open_packed, _check_packed)
