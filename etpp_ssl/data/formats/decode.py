"""Bytes to channels: the formats that Pillow decodes itself, and numpy arrays, as uint8.

The bytes may be anyone's: what they claim is checked before it is decoded, and none of it is executed.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from etpp_ssl.data.sources.base import MAX_PIXELS, Bands, UnreadableImage

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy"})
"""File names that count as images, in lower case."""

_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "TGA", "PCX",
)  # fmt: skip
"""Pillow's names of the formats that are read. It knows more: EPS files it hands to Ghostscript, which
runs them, and some formats it decodes in Python, at a thousandth of the speed."""

MAX_SCANS = 100
"""Of a JPEG. Progressive ones have about ten; each takes as long as a baseline picture, but may have a
dozen bytes, so that a small file of many keeps a decoder busy for hours."""

MORE_PAGES = 100
"""Pages that are counted beyond those wanted."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF tag `_ORIENTATION` (TIFF 6.0, section 8)."""


def decode(data: bytes, in_chans: int, max_pixels: int = MAX_PIXELS) -> Bands:
    """Decode one image to `in_chans` channels of uint8.

    EXIF orientation is applied, of an animation (GIF, PNG, WebP) only the first frame is used, colour
    profiles are ignored, 16-bit values keep their high byte. Gray, palette, RGBA and CMYK become RGB for
    3 channels and luma for 1 (alpha is dropped). Other channel counts are read from the bands of the
    file, from the pages of a TIFF, or from a numpy array (H, W, C) of uint8 or uint16. 32-bit integers
    and floats have no agreed range and are refused.

    Args:
        data: the file's bytes.
        in_chans: C, at least 1.
        max_pixels: larger images are refused, before they are decoded.

    Raises:
        UnreadableImage: for anything that cannot be read so, with the reason.
    """
    with one_line_reasons():
        if data.startswith(b"\x93NUMPY"):
            return from_array(_load_array(data, max_pixels), in_chans)
        with open_image(data, max_pixels) as image:
            return _from_image(image, in_chans, max_pixels)


def most_bytes(max_pixels: int, in_chans: int) -> int:
    """No image of so many pixels takes more in a file: 16 bits per channel, and room for metadata."""
    return max_pixels * 2 * max(4, in_chans) + (64 << 20)


def from_picture(image: Image.Image, in_chans: int, max_pixels: int = MAX_PIXELS) -> Bands:
    """A picture that someone else has opened, as `decode` would give it.

    Raises:
        UnreadableImage: if it cannot be read, is too large, or does not have the channels asked for.
    """
    with one_line_reasons():
        _check_pixels(image.size, max_pixels)
        return _from_image(image, in_chans, max_pixels)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """A file's bytes as Pillow opens them: the header is read and checked, no pixel is decoded.

    Raises:
        UnreadableImage: if it claims more than `max_pixels` or has more than `MAX_SCANS`.
        Exception: whatever Pillow raises; see `one_line_reasons`.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        # Pillow has one limit for all of a process and warns from half of what it refuses. Ours is
        # checked here; it only must not be the smaller one.
        Image.MAX_IMAGE_PIXELS = max_pixels
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > MAX_SCANS:
        raise UnreadableImage(f"it has {scans:,} scans, more than {MAX_SCANS}")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"it claims more pixels than data.max_pixels {max_pixels:,} allows") from error
    _check_pixels(image.size, max_pixels)
    return image


@contextmanager
def one_line_reasons() -> Iterator[None]:
    """Whatever a decoder raises inside becomes an `UnreadableImage` with one line of reason.

    What it warns of is dropped: broken metadata around a sound picture, mostly.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        # Pillow's own words hold the memory address of the bytes.
        raise UnreadableImage("it is in no known image format") from error
    except Exception as error:
        # Decoders meet arbitrary bytes here and raise whatever comes to hand (SyntaxError,
        # struct.error, DecompressionBombError ...): to us each of them is one unreadable image.
        raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())) from error


@cache
def _formats() -> tuple[str, ...]:
    # Older versions of Pillow, and some builds, lack a few.
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise UnreadableImage(
            f"it claims {width:,} x {height:,} pixels, more than data.max_pixels {max_pixels:,} allows"
        )


def _from_image(image: Image.Image, in_chans: int, max_pixels: int) -> Bands:
    # Older versions of Pillow open a 16-bit PNG as 32-bit integers.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "floats" if image.mode == "F" else "integers"
        raise UnreadableImage(f"its values are 32-bit {kind}, not 8 or 16 bits")
    if in_chans in (1, 3):
        image.load()
        picture, mode = _eight_bits(_upright(image)), "L" if in_chans == 1 else "RGB"
        # Converting to the mode that it has would copy it.
        return (picture if picture.mode == mode else picture.convert(mode),)
    num_pages = _num_pages(image, in_chans) if image.format == "TIFF" else 1
    if num_pages == in_chans and len(image.getbands()) == 1:
        pages = []
        for page in range(in_chans):
            image.seek(page)
            _check_pixels(image.size, max_pixels)
            pages.append(_eight_bits(image.copy()).convert("L"))
        if len({page.size for page in pages}) > 1:
            raise UnreadableImage("its pages differ in size")
        return tuple(pages)
    image.load()
    bands = _upright(image).split()
    if len(bands) != in_chans:
        pages_text = f" and {num_pages} pages" if num_pages > 1 else ""
        plural = "s" if len(bands) > 1 else ""
        raise UnreadableImage(f"it has {len(bands)} band{plural}{pages_text}, but in_chans is {in_chans}")
    return tuple(_eight_bits(band).convert("L") for band in bands)


def _num_pages(image: Image.Image, wanted: int) -> int:
    """Pages of a TIFF, as far as they matter: to count all of many, Pillow takes the square of the time."""
    for page in range(1, wanted + MORE_PAGES):
        try:
            image.seek(page)
        except EOFError:
            break
    else:
        raise UnreadableImage(f"it has {wanted + MORE_PAGES} pages or more, but in_chans is {wanted}")
    image.seek(0)
    return page


def _load_array(data: bytes, max_pixels: int) -> np.ndarray:
    """numpy's file format, of what is there: numpy itself makes room for what the header claims."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(file)
    if len(shape) >= 2:
        _check_pixels((shape[1], shape[0]), max_pixels)
    claimed, there = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if claimed > there:
        raise UnreadableImage(f"its values take {claimed:,} bytes, but it has {there:,}")
    file.seek(0)
    array: np.ndarray = np.load(file, allow_pickle=False)
    return array


def from_array(array: np.ndarray, in_chans: int) -> Bands:
    """An array's channels, as `decode` gives those of a `.npy` file.

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


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened picture, 1 (upright) to 8."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value) if value in _UPRIGHT else 1
    except Exception:
        # Broken metadata around a sound picture: the picture counts, as it lies.
        return 1


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    """High byte of 16-bit modes; `convert` alone would clip them at 255."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image
