"""Small valid files of every format, and small files that claim to be large."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (23, 14), seed: int = 0) -> Image.Image:
    width, height = size
    draw = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(draw, "RGBA").convert(mode)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def animated(form: str, **options: Any) -> bytes:
    """Red, then two other frames."""
    frames = [Image.new("RGB", (23, 14), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)


def oriented(value: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return encoded(noise(), "JPEG", exif=exif)


def unmarked_cmyk() -> bytes:
    """Inverted CMYK without the APP14 segment by which Photoshop says so; Pillow writes it as well."""
    data = encoded(noise("CMYK"), "JPEG", quality=95)
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def sixteen_bits(form: str) -> bytes:
    values = np.arange(23 * 14, dtype=np.uint16).reshape(14, 23) * 200
    return encoded(Image.fromarray(values), form)


ODD: dict[str, Callable[[], bytes]] = {
    "one-pixel.png": lambda: encoded(noise(size=(1, 1)), "PNG"),
    "wide.png": lambda: encoded(noise(size=(30_000, 1)), "PNG"),
    "tall.jpg": lambda: encoded(noise(size=(1, 30_000)), "JPEG"),
    "really-a-png.jpg": lambda: encoded(noise(), "PNG"),
    "really-a-jpeg.PNG": lambda: encoded(noise(), "JPEG"),
    "animated.gif": lambda: animated("GIF"),
    "animated.png": lambda: animated("PNG"),
    "animated.webp": lambda: animated("WEBP"),
    "sixteen.png": lambda: sixteen_bits("PNG"),
    "sixteen.tif": lambda: sixteen_bits("TIFF"),
    "cmyk.jpg": lambda: encoded(noise("CMYK"), "JPEG"),
    "cmyk-unmarked.jpg": unmarked_cmyk,
    "palette.png": lambda: encoded(noise().convert("P"), "PNG"),
    "exif.jpg": lambda: encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "turned-99.jpg": lambda: oriented(99),
    "turned-6.jpg": lambda: oriented(6),
    "two-pictures.mpo": lambda: encoded(noise(), "MPO"),
    "gray.pgm": lambda: encoded(noise("L"), "PPM"),
    "alpha.jp2": lambda: encoded(noise("RGBA"), "JPEG2000"),
    "alpha.tga": lambda: encoded(noise("RGBA"), "TGA"),
    "profile.jpg": lambda: encoded(noise(), "JPEG", icc_profile=b"\xde\xad" * 70_000),
    "profile.png": lambda: encoded(noise(), "PNG", icc_profile=b"garbage"),
}
"""Odd, but pictures all the same."""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise().convert("P"), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff_of(width: int, height: int) -> bytes:
    return tiff(
        [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    )


def tiff(tags: list[tuple[int, int]]) -> bytes:
    """A page of LONG tags whose strip lies on the header."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)


def webp_of(width: int, height: int) -> bytes:
    data = bytearray(animated("WEBP", lossless=True))
    start = data.index(b"VP8X") + 12
    data[start : start + 6] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(data)


def npy_of(width: int, height: int) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({height}, {width}, 3), }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)


def ppm_of(width: int, height: int) -> bytes:
    return f"P6 {width} {height} 255\n".encode() + bytes(100)


def tga_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "TGA", compression="tga_rle"))
    data[12:16] = struct.pack("<HH", width, height)
    return bytes(data)


def jp2_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "JPEG2000"))
    header, size = data.index(b"ihdr") + 4, data.index(b"\xff\x51") + 6
    data[header : header + 8] = struct.pack(">II", height, width)
    # The image and its one tile.
    data[size : size + 8] = data[size + 16 : size + 24] = struct.pack(">II", width, height)
    return bytes(data)


BOMBS: dict[str, Callable[[int, int], bytes]] = {
    "bomb.png": png_of,
    "bomb.jpg": jpeg_of,
    "bomb.gif": gif_of,
    "bomb.bmp": bmp_of,
    "bomb.tif": tiff_of,
    "bomb.webp": webp_of,
    "bomb.npy": npy_of,
    "bomb.ppm": ppm_of,
    "bomb.tga": tga_of,
    "bomb.jp2": jp2_of,
}
"""Name to a maker of a file of a few hundred bytes that claims (width, height) pixels."""
