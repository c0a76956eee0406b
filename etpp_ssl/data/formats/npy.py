"""numpy's files, and arrays in memory: (H, W), (H, W, C), or as `data.axes` says.

Of an archive (.npz), the only array of two or more axes, or the one that `data.array` names.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from typing import IO

import numpy as np
from PIL import Image

from etpp_ssl.data.formats.arrays import axes_of, check_claim, check_numbers, named_array, picture_of_array
from etpp_ssl.data.formats.base import (
    Channels,
    Format,
    Picture,
    Reading,
    UnreadableImage,
    check_pixels,
    one_line_reasons,
)


def from_array(array: np.ndarray, reading: Reading, *, on_disk: bool = False) -> Picture:
    """An array as a picture.

    Args:
        array: (H, W) or (H, W, C), or as `reading.axes` says.
        reading: says how many channels, and whether values keep their depth.
        on_disk: whether it is a file that is mapped.

    Raises:
        UnreadableImage: for another shape, or values that cannot be read so.
    """
    return picture_of_array(array, reading, on_disk=on_disk)


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


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an array at the start of a stream, which is left where its values begin.

    Raises:
        UnreadableImage: for another file.
    """
    with one_line_reasons("its header is damaged or incomplete"):
        version = np.lib.format.read_magic(stream)
        header_1, header_2 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, _, dtype = (header_1 if version == (1, 0) else header_2)(stream)
    return shape, dtype


def check_values(shape: tuple[int, ...], dtype: np.dtype, there: int) -> None:
    """Check that a file has the numbers that it claims: numpy itself makes room for them first.

    Raises:
        UnreadableImage: if it has not.
    """
    if dtype.hasobject:
        raise UnreadableImage("its values are Python's objects, a pickle, which is not read")
    check_numbers(dtype)
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > there:
        raise UnreadableImage(f"its values take {claimed:,} bytes, but it has {there:,}")


def _check(data: bytes, max_pixels: int) -> None:
    file = io.BytesIO(data)
    shape, dtype = read_header(file)
    if len(shape) >= 2:
        check_pixels((shape[1], shape[0]), max_pixels)
    check_values(shape, dtype, len(data) - file.tell())


def _open(data: bytes, reading: Reading) -> Picture:
    # Of other axes the first two may be no sides; `from_array` checks those that are.
    _check(data, reading.max_pixels if reading.axes is None else 1 << 62)
    return from_array(np.load(io.BytesIO(data), allow_pickle=False), reading)


def _open_path(path: str | os.PathLike[str], reading: Reading) -> Picture:
    with open(path, "rb") as file:
        shape, dtype = read_header(file)
        check_values(shape, dtype, os.fstat(file.fileno()).st_size - file.tell())
    # numpy maps no file without values.
    axes_of(shape, reading)
    return from_array(np.load(path, mmap_mode="r", allow_pickle=False), reading, on_disk=True)


FORMAT = Format(frozenset({".npy"}), (b"\x93NUMPY",), _open, _check, _open_path)


_ARCHIVE_FAULT = "it is a ZIP archive that is damaged or incomplete"


def _open_archive(data: bytes, reading: Reading) -> Picture:
    with one_line_reasons(_ARCHIVE_FAULT), zipfile.ZipFile(io.BytesIO(data)) as archive:
        shapes = {}
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as stream:
                    shapes[member.removesuffix(".npy")] = read_header(stream)[0]
        name = named_array([n for n, shape in shapes.items() if len(shape) > 1], reading.array, "an .npz")
        with archive.open(f"{name}.npy") as stream:
            shape, dtype = read_header(stream)
            check_claim(shape, reading)
            check_values(shape, dtype, archive.getinfo(stream.name).file_size - stream.tell())
        with archive.open(f"{name}.npy") as stream:
            return from_array(np.lib.format.read_array(stream, allow_pickle=False), reading)


def _check_archive(data: bytes, max_pixels: int) -> None:
    with one_line_reasons(_ARCHIVE_FAULT), zipfile.ZipFile(io.BytesIO(data)) as archive:
        if not any(name.endswith(".npy") for name in archive.namelist()):
            raise UnreadableImage("it is a ZIP archive without arrays of numpy")


ARCHIVE = Format(frozenset({".npz"}), (b"PK\x03\x04",), _open_archive, _check_archive)
