"""The formats that Pillow decodes, and pictures that somebody else has opened with it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from etpp_ssl.data.formats.base import (
    Channels,
    Format,
    Picture,
    Reading,
    UnreadableImage,
    check_pixels,
    imported,
    one_line_reasons,
)
from etpp_ssl.data.formats.pictures import ArrayPicture, DecodedPicture, FramedPicture, LazyPicture
from etpp_ssl.data.formats.values import chosen

FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "TGA", "PCX",
)  # fmt: skip
"""Pillow's names of the formats that are read. It knows more: EPS files it hands to Ghostscript, which
runs them, and some formats it decodes in Python, at a thousandth of the speed."""

_STRANGERS = {
    rb"\s*\Z": "it is empty",
    rb"version https://git-lfs": "it is a pointer of Git LFS: `git lfs pull` fetches the image",
    rb"(\.\./)*(\.git/)?/?annex/objects/": "it is a pointer of git-annex: `git annex get` fetches the image",
    rb"\s*<(!doctype|html|\?xml)": "it is a page of HTML or XML, not an image",
    rb".{4}ftyp(hei|hev|mif|msf)": "it is HEIC, which is not read: convert it, for instance to JPEG",
    rb".{4}ftypavi": "it is AVIF that cannot be read: it is damaged, or Pillow is older than 11.3",
}
"""What files that are no image begin with, and what is said of them."""

MAX_SCANS = 100
"""Of a JPEG. Progressive ones have about ten; each takes as long as a baseline picture, but may have a
dozen bytes, so that a small file of many keeps a decoder busy for hours."""

MORE_PAGES = 100
"""Pages that are counted beyond those wanted."""

_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
MOST_FRAMES = 10_000
"""Of an animation: each is decoded from the first one on."""

_GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of one channel, alpha left aside."""
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
ROTATED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""The same for (H, W, C)."""
_AV1 = re.compile(rb"av1C\x81.(.)", re.DOTALL)
"""The decoder's settings in an AVIF; one of the bits of its group tells more than 8 bits a value."""
_OVER_8_BITS = 0x40
_PGM = re.compile(rb"P[2356](?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)\s")
"""The header of a PGM or PPM; its group is the largest value."""


def opened_picture(image: Image.Image, reading: Reading) -> Picture:
    """A picture that somebody else has opened, at its own depth where that is asked for; see `open_picture`.

    Raises:
        UnreadableImage: if it cannot be read, is too large, or does not have the channels asked for.
    """
    if reading.deep and (image.mode.startswith("I") or image.mode == "F"):
        with one_line_reasons():
            check_pixels(image.size, reading.max_pixels)
            values = np.asarray(_upright(image))[:, :, None]
            return ArrayPicture(chosen(values.astype(values.dtype.newbyteorder("=")), reading))
    return DecodedPicture(from_picture(image, reading))


def from_picture(image: Image.Image, reading: Reading) -> Channels:
    """The channels of a picture that somebody else has opened, 8 bits deep; see `open_picture`.

    Raises:
        UnreadableImage: if it cannot be read, is too large, or does not have the channels asked for.
    """
    with one_line_reasons():
        check_pixels(image.size, reading.max_pixels)
        return _from_image(image, reading)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """A file's bytes as Pillow opens them: the header is read and checked, no pixel is decoded.

    Raises:
        UnreadableImage: if it claims more than `max_pixels` or has more than `MAX_SCANS`.
        Exception: whatever Pillow raises; see `one_line_reasons`.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        # Pillow has one limit for all of a process and warns from half of what it refuses. Ours is
        # checked here; Pillow's only must not be the smaller one.
        Image.MAX_IMAGE_PIXELS = max_pixels
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > MAX_SCANS:
        raise UnreadableImage(f"it has {scans:,} scans, more than {MAX_SCANS}")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"it claims more pixels than data.max_pixels {max_pixels:,} allows") from error
    except UnidentifiedImageError as error:
        # Pillow's own words hold the memory address of the bytes.
        raise UnreadableImage(_what_it_is(data)) from error
    check_pixels(image.size, max_pixels)
    return image


def orientation(image: Image.Image, data: bytes | None = None) -> int:
    """The EXIF orientation of an opened picture, 1 (upright) to 8.

    Args:
        image: the picture.
        data: its file. A PNG may tell of its orientation behind its pixels, which Pillow decodes to look
            there; with the file this is done only if there is anything to find.
    """
    try:
        before = data is not None and image.format == "PNG" and not _tells_behind_pixels(data)
        exif = Image.Image.getexif(image) if before else image.getexif()
        value = exif.get(_ORIENTATION, 1)
        return int(value) if value in _UPRIGHT else 1
    except Exception:
        # Broken metadata around a sound picture: the picture counts, as it lies.
        return 1


def _tells_behind_pixels(png: bytes) -> bool:
    """Whether metadata follows the pixels of a PNG."""
    place, pixels = 8, False
    while place + 8 <= len(png):
        kind = png[place + 4 : place + 8]
        if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        pixels |= kind == b"IDAT"
        place += 12 + int.from_bytes(png[place : place + 4], "big")
    return False


def _open(data: bytes, reading: Reading) -> Picture:
    image = open_image(data, reading.max_pixels)
    number = getattr(image, "n_frames", 1) if reading.frames and image.format in _ANIMATED else 1
    if number == 1:
        return _picture(image, data, reading)
    if number > MOST_FRAMES:
        raise UnreadableImage(f"it is an animation of {number:,} frames, more than {MOST_FRAMES:,}")
    if image.format == "PNG" and data[24] == 16:
        raise UnreadableImage(
            "it is an animation of 16 bits, of which only 8 are read: write its frames apart"
        )

    def frame(number: int) -> Picture:
        image = open_image(data, reading.max_pixels)
        with one_line_reasons("its animation is damaged"):
            image.seek(number)
        return _picture(image, data, reading)

    return FramedPicture(_picture(image, data, reading), number, frame)


def _picture(image: Image.Image, data: bytes, reading: Reading) -> Picture:
    """Of a file's first image, or the frame that is sought."""
    if reading.range == "raw" and (values := _deep_values(image, data)) is not None:
        return ArrayPicture(chosen(values, reading))
    # The pages of a TIFF may be channels, which do not follow its orientation.
    if reading.range == "raw" or ((reading.deep or reading.frames) and image.format != "TIFF"):
        size = image.size[::-1] if orientation(image, data) >= 5 else image.size
        deep = reading.deep and reading.range != "raw"
        return LazyPicture(size, deep, lambda: _decoded(data, image, reading))
    with image:
        return _decoded(data, image, reading)


def _decoded(data: bytes, image: Image.Image, reading: Reading) -> Picture:
    values = _deep_values(image, data) if reading.deep and reading.range != "raw" else None
    if values is not None:
        return ArrayPicture(chosen(values, reading))
    return DecodedPicture(_from_image(image, reading))


def _deep_values(image: Image.Image, data: bytes) -> np.ndarray | None:
    """uint16 (H, W, C) of a file that holds more than 8 bits, without alpha; None for one that does not."""
    if image.format == "PNG" and data[24] == 16:
        # Pillow keeps the high byte of colours. Where there are none, torchvision need not be loaded.
        import torch
        from torchvision.io import ImageReadMode, decode_png

        values = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        pixels = values.permute(1, 2, 0).numpy()[:, :, : 1 if len(values) <= 2 else 3]
    elif image.format == "AVIF" and (header := _AV1.search(data)) and header[1][0] & _OVER_8_BITS:
        imagecodecs = imported("imagecodecs", "AVIF of more than 8 bits", "tiff")
        values = imagecodecs.avif_decode(data, image.tell())
        pixels = np.atleast_3d(values)[:, :, : 1 if values.ndim == 2 or values.shape[2] == 2 else 3]
    elif image.format == "PPM" and image.mode == "I":
        # Pillow stretches what the file counts to `most` over 16 bits; rounding takes that back.
        most = int(_PGM.match(data)[1])  # type: ignore[index]
        pixels = np.rint(np.asarray(image)[:, :, None] * (most / 65535)).astype(np.uint16)
    elif image.format == "PPM" and (header := _PGM.match(data)) and int(header[1]) > 255:
        raise UnreadableImage("it is a colour PPM of 16 bits, of which only 8 are read: convert it to PNG")
    else:
        return None
    turn = ROTATED.get(orientation(image, data))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


_EXTENSIONS = (
    ".png", ".apng", ".webp", ".gif", ".avif", ".avifs", ".bmp", ".dib", ".tga", ".pcx",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Not those that are more often something else (.icb, .vda and .vst, for Targa), nor .pfm (floats)."""

FORMAT = Format(frozenset(_EXTENSIONS), signatures=(b"",), open=_open, check=open_image)
"""Takes every file that no other format takes, and says what is wrong with it."""


def _what_it_is(data: bytes) -> str:
    for pattern, sentence in _STRANGERS.items():
        if re.match(pattern, data[:200], re.DOTALL | re.IGNORECASE):
            return sentence
    return "it is in no known image format"


@cache
def _formats() -> tuple[str, ...]:
    # Older versions of Pillow, and some builds, lack a few.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _from_image(image: Image.Image, reading: Reading) -> Channels:
    in_chans = reading.in_chans or (1 if image.mode in _GRAY else 3)
    max_pixels = reading.max_pixels
    # Pillow opens a 16-bit PGM, and older versions a 16-bit PNG, as 32-bit integers.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
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
            check_pixels(image.size, max_pixels)
            pages.append(_eight_bits(image.copy()).convert("L"))
        if len({page.size for page in pages}) > 1:
            raise UnreadableImage("its pages differ in size")
        return tuple(pages)
    image.load()
    channels = _upright(image).split()
    if len(channels) != in_chans:
        pages_text = f" and {num_pages} pages" if num_pages > 1 else ""
        plural = "s" if len(channels) > 1 else ""
        raise UnreadableImage(
            f"it has {len(channels)} channel{plural}{pages_text}, but in_chans is {in_chans}"
        )
    return tuple(_eight_bits(channel).convert("L") for channel in channels)


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


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    """High byte of 16-bit modes; `convert` alone would clip them at 255."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image
