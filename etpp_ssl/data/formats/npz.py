"""numpy's archives (.npz): the only array of two or more axes, or the one that `data.array` names."""

from __future__ import annotations

import io
import zipfile

import numpy as np

from etpp_ssl.data.formats.arrays import check_claim, named_array
from etpp_ssl.data.formats.base import Format, Picture, Reading, UnreadableImage
from etpp_ssl.data.formats.npy import check_length, from_array, read_header


def _open(data: bytes, reading: Reading) -> Picture:
    with _archive(data) as archive:
        shapes = {}
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as stream:
                    shapes[member.removesuffix(".npy")] = read_header(stream)[0]
        name = named_array([n for n, shape in shapes.items() if len(shape) > 1], reading.array, "an .npz")
        with archive.open(f"{name}.npy") as stream:
            shape, dtype = read_header(stream)
            check_claim(shape, reading)
            check_length(shape, dtype, archive.getinfo(stream.name).file_size - stream.tell())
        with archive.open(f"{name}.npy") as stream:
            return from_array(np.lib.format.read_array(stream, allow_pickle=False), reading)


def _check(data: bytes, max_pixels: int) -> None:
    with _archive(data) as archive:
        if not any(name.endswith(".npy") for name in archive.namelist()):
            raise UnreadableImage("it is a ZIP archive without arrays of numpy")


def _archive(data: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise UnreadableImage("it is a ZIP archive that is damaged or incomplete") from error


FORMAT = Format(frozenset({".npz"}), (b"PK\x03\x04",), _open, _check)
