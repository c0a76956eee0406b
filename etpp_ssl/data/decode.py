"""Bytes to channels: every format that Pillow reads, and numpy arrays, as uint8.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from etpp_ssl.data.images import Bands, UnreadableImage

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy"})
"""File names that count as images, in lower case."""

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


def decode(data: bytes, in_chans: int) -> Bands:
    """Decode one image to `in_chans` channels of uint8.

    EXIF orientation is applied, only the first frame of an animation is used, 16-bit values keep
    their high byte. Gray, palette, RGBA and CMYK become RGB for 3 channels and luma for 1 (alpha is
    dropped). Other channel counts are read from the bands of the file, from the pages of a TIFF, or
    from a numpy array (H, W, C) of uint8 or uint16. 32-bit integers and floats have no agreed range
    and are refused.

    Args:
        data: the file's bytes.
        in_chans: C, at least 1.

    Raises:
        UnreadableImage: for anything that cannot be read so, with the reason.
    """
    with one_line_reasons():
        if data.startswith(b"\x93NUMPY"):
            return _from_array(np.load(io.BytesIO(data), allow_pickle=False), in_chans)
        with warnings.catch_warnings():
            # Pillow refuses at twice the size that it warns about; a warning per file is noise.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return _from_image(image, in_chans)


def from_picture(image: Image.Image, in_chans: int) -> Bands:
    """A picture that someone else has opened, as `decode` would give it.

    Raises:
        UnreadableImage: if it cannot be read, or does not have the channels asked for.
    """
    with one_line_reasons():
        return _from_image(image, in_chans)


@contextmanager
def one_line_reasons() -> Iterator[None]:
    """Whatever a decoder raises inside becomes an `UnreadableImage` with one line of reason."""
    try:
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


def _from_image(image: Image.Image, in_chans: int) -> Bands:
    # Older versions of Pillow open a 16-bit PNG as 32-bit integers.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "floats" if image.mode == "F" else "integers"
        raise UnreadableImage(f"its values are 32-bit {kind}, not 8 or 16 bits")
    if in_chans in (1, 3):
        image.load()
        picture, mode = _eight_bits(_upright(image)), "L" if in_chans == 1 else "RGB"
        # Converting to the mode that it has would copy it.
        return (picture if picture.mode == mode else picture.convert(mode),)
    num_pages: int = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if num_pages == in_chans and len(image.getbands()) == 1:
        pages = []
        for page in range(in_chans):
            image.seek(page)
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


def _from_array(array: np.ndarray, in_chans: int) -> Bands:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != in_chans or 0 in array.shape:
        raise UnreadableImage(f"its shape is {array.shape}, not (height, width, {in_chans})")
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
