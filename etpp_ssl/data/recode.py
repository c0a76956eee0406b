"""What `etpp prepare` stores of an image: its bytes as they are, or a smaller JPEG."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

from PIL import Image
from pydantic import Field

from etpp_ssl.config import Config
from etpp_ssl.data.decode import EXTENSIONS, decode
from etpp_ssl.data.folder import FileSource
from etpp_ssl.data.images import UnreadableImage

DEFAULT_QUALITY = 92


class RecodeConfig(Config):
    """Re-encoding to RGB JPEG with full-resolution colour (4:4:4), upright, without metadata."""

    size: int | None = Field(default=None, ge=1)
    """The shorter side becomes at most this many pixels, by antialiased bicubic; None keeps all."""
    quality: int = Field(default=DEFAULT_QUALITY, ge=1, le=100)
    """JPEG quality on the scale of libjpeg."""


@dataclass(frozen=True)
class Stored:
    """One image as a shard keeps it."""

    data: bytes
    extension: str
    """With its dot, lower case."""
    fault: str | None
    """Why it cannot be read or re-encoded, if so; `data` is then the file as it is, or empty."""


class Converter:
    """Makes what is stored of each image of a source; small to pickle, for worker processes.

    Args:
        source: the images.
        recode: how to re-encode; None copies the bytes.
        check: decode bytes that are copied too, to know whether they can be.
    """

    def __init__(self, source: FileSource, recode: RecodeConfig | None, *, check: bool) -> None:
        self.source = source
        self.recode = recode
        self.check = check

    def __call__(self, index: int) -> Stored:
        """Image number `index`."""
        extension = os.path.splitext(self.source.files[index])[1].lower()
        # timm's reader of WebDataset tars looks for jpg, png and webp only.
        extension = {".jpeg": ".jpg"}.get(extension, extension)
        extension = extension if extension in EXTENSIONS else ".img"
        data = b""
        try:
            data = self.source.read(index)
            if self.recode is not None:
                return Stored(encode(decode(data, 3, self.source.max_pixels)[0], self.recode), ".jpg", None)
            if self.check:
                decode(data, self.source.in_chans, self.source.max_pixels)
        except UnreadableImage as error:
            return Stored(data, extension, str(error))
        return Stored(data, extension, None)


def encode(picture: Image.Image, recode: RecodeConfig) -> bytes:
    """A JPEG of an RGB picture.

    Raises:
        UnreadableImage: if it is larger than a JPEG can be (65,535 pixels a side).
    """
    shorter = min(picture.size)
    if recode.size is not None and recode.size < shorter:
        width, height = (max(1, round(side * recode.size / shorter)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    try:
        picture.save(buffer, "JPEG", quality=recode.quality, subsampling="4:4:4")
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"it cannot be written as JPEG ({error})") from error
    return buffer.getvalue()
