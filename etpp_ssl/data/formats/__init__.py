"""What an image file holds, one file per format; here its bytes are opened, whatever their format.

The bytes may be anyone's: what they claim is checked before it is decoded, and none of it is executed.
"""

from __future__ import annotations

import os
from dataclasses import replace

from etpp_ssl.data.formats import (
    dicom,
    hdf5,
    jpeg,
    jpeg2000,
    nifti,
    npy,
    pillow,
    rasterio,
    tiff,
    zarr,
)
from etpp_ssl.data.formats.base import (
    MAX_PIXELS,
    Channels,
    Format,
    Picture,
    Reader,
    Reading,
    UnreadableImage,
    one_line_reasons,
)
from etpp_ssl.data.formats.pictures import DecodedPicture, FramedPicture, LazyPicture
from etpp_ssl.data.formats.url import is_url, read_url
from etpp_ssl.data.formats.values import ValuePicture
from etpp_ssl.files import read_head, read_regular

FORMATS = (
    npy.FORMAT,
    jpeg.FORMAT,
    tiff.FORMAT,
    jpeg2000.FORMAT,
    npy.ARCHIVE,
    hdf5.FORMAT,
    zarr.FORMAT,
    nifti.FORMAT,
    nifti.PACKED,
    dicom.FORMAT,
    pillow.FORMAT,
)
"""In this order; the first whose signature fits opens a file. One line here makes a new format known."""
EXTENSIONS = frozenset().union(*(form.extensions for form in FORMATS))
"""File names that count as images, in lower case: of every format that can be read."""
FOLDER_EXTENSIONS = frozenset().union(*(form.extensions for form in FORMATS if form.is_folder))
"""Those of them that are names of folders."""
ANY_PIXELS = 1 << 62
"""More than any file has."""
_HEAD_BYTES = 1 << 12
"""Of a file, which tell its format."""


def extensions_of(reader: Reader) -> frozenset[str]:
    """File names that count as images for a `data.reader`, in lower case."""
    return EXTENSIONS | rasterio.FORMAT.extensions if reader == "rasterio" else EXTENSIONS


def open_picture(data: bytes, reading: Reading) -> Picture:
    """A file's bytes as a picture of `reading.in_chans` channels.

    EXIF orientation is applied, colour profiles are ignored. Gray, palette, RGBA and CMYK of 8 bits become
    RGB for 3 channels and luma for 1 (alpha is dropped). Other channel counts are read from the channels of
    the file, from the pages of a TIFF, or from a numpy array. Of an animation (GIF, PNG, WebP, AVIF) the
    first frame is used; with `reading.frames` the picture of a file of several images is a `FramedPicture`.

    Without `reading.range` values are 8 bits: 16-bit ones keep their high byte, and others, which have no
    agreed range, are refused. With it values keep their depth; see `ValuePicture`.

    Most are decoded when their pixels are asked for.

    Raises:
        UnreadableImage: for anything that cannot be read so, with the reason.
    """
    with one_line_reasons():
        return finished(_format_of(data, reading.reader).open(data, reading.stored), reading)


def finished(picture: Picture, reading: Reading) -> Picture:
    """A picture of the depth that is asked for; of raw values, the picture as its format has it.

    Raises:
        UnreadableImage: where 8 bits are asked for and cannot tell what it holds.
    """
    if reading.range == "raw":
        return picture
    if isinstance(picture, FramedPicture):
        frame = picture.frame

        def later(number: int) -> Picture:
            if reading.deep:
                return finished(frame(number), reading)
            return LazyPicture(picture.size, False, lambda: finished(frame(number), reading))

        return FramedPicture(later(0), picture.num_frames, later)
    if reading.deep:
        return ValuePicture(picture, reading)
    if not picture.deep:
        return picture
    whole = picture.region((0, 0, *picture.size), picture.size)
    if whole.valid is not None and not whole.valid.all():
        raise UnreadableImage("it has pixels without data, which 8 bits cannot tell: give data.range")
    return DecodedPicture(npy.eight_bits(whole.pixels))


def check_header(data: bytes, max_pixels: int = MAX_PIXELS, reader: Reader = "auto") -> None:
    """Check that a file's bytes begin as those of an image do; no pixel is decoded.

    `reader` is that of `Reading`.

    Raises:
        UnreadableImage: for what is not an image, or claims more than `max_pixels`.
    """
    with one_line_reasons():
        _format_of(data, reader).check(data, max_pixels)


def _format_of(data: bytes, reader: Reader) -> Format:
    if reader == "rasterio":
        return rasterio.FORMAT
    return next(form for form in FORMATS if data.startswith(form.signatures, form.signature_at))


def read_file(path: str | os.PathLike[str], at_most: int) -> bytes:
    """A file's bytes, as they are stored; `path` may be a URL, see `etpp_ssl.data.formats.url`.

    Raises:
        UnreadableImage: if the file cannot be read, is none (a named pipe, a device), or has more bytes.
        RunFault: if a URL cannot be read, and perhaps could another time.
    """
    if is_url(os.fspath(path)):
        return read_url(os.fspath(path), at_most)
    try:
        return read_regular(path, at_most)
    except (OSError, ValueError) as error:
        # ValueError: a path can hold a null byte.
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error


def open_file(path: str | os.PathLike[str], reading: Reading, *, in_parts: bool = False) -> Picture:
    """A file, or a folder of a format whose images are folders, as a picture; see `open_picture`.

    Where values are deep, formats that can read only what is asked for do so; folders are always read so.

    Args:
        path: of the file, or its URL, of which all bytes are read.
        reading: how it becomes a picture.
        in_parts: whether only parts of it will be asked for, of at most `reading.max_pixels`: a file of a
            format that reads those alone may then have any number of pixels and bytes.

    Raises:
        UnreadableImage: for anything that cannot be read so, a named pipe or a device among it.
    """
    at_most = None if in_parts or reading.frames else most_bytes(reading)
    deep = reading.deep or reading.frames
    by_path = not is_url(os.fspath(path)) and (deep or os.path.isdir(path))
    form = _format_at(path, at_most, reading.reader) if by_path else None
    if form is None or form.open_path is None:
        return open_picture(read_file(path, most_bytes(reading)), reading)
    with one_line_reasons():
        reading_parts = replace(reading, max_pixels=ANY_PIXELS) if in_parts else reading
        return finished(form.open_path(path, reading_parts.stored), reading)


def _format_at(path: str | os.PathLike[str], at_most: int | None, reader: Reader) -> Format | None:
    """The format of a file with at most so many bytes, or of a folder; None for another folder."""
    try:
        if os.path.isdir(path):
            extension = os.path.splitext(os.path.normpath(path))[1].lower()
            return next((form for form in FORMATS if form.is_folder and extension in form.extensions), None)
        return _format_of(read_head(path, _HEAD_BYTES, at_most), reader)
    except (OSError, ValueError) as error:
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error


def decode(data: bytes, reading: Reading) -> Channels:
    """The channels of a file's bytes, 8 bits deep; see `open_picture`."""
    return open_picture(data, reading).channels()


def most_bytes(reading: Reading) -> int:
    """No image of so many pixels takes more in a file: 64 bits per channel, and room for metadata."""
    depth = 8 if reading.deep else 2
    return reading.max_pixels * depth * max(4, reading.in_chans) + (64 << 20)
