"""Labelled pictures drawn on demand: shapes and textures with a natural spectrum, for tests and demos.

Each picture is one object before a background of correlated colour noise whose amplitude falls like
one over the frequency, as in photographs (Field, JOSA A 1987). The object's shape and texture make
its class; colours, contrasts, place, size and rotation do not depend on it.

They stand in for images of instruments, too: at another depth, with any number of channels, with areas
without data, or so faint that 8 bits see nothing.

Legend: C channels, H, W pixels, K independent noise fields of the background.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from etpp_ssl.config import as_pair, legal_size
from etpp_ssl.data.formats import finished
from etpp_ssl.data.formats.base import Picture, Reading
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.sources.base import DataConfig, images_of
from etpp_ssl.randomness import keyed_numpy

SHAPES = ("disk", "cross", "square", "ring", "triangle")
TEXTURES = ("smooth", "striped", "grained", "checked", "blotched")
KINDS = tuple((SHAPES[(c + c // 5) % 5], TEXTURES[c % 5]) for c in range(10))
"""(shape, texture) of each class. Every shape and every texture is in two classes, so that knowing
one of them is worth half of the accuracy, and the first five classes differ in both."""
CLASSES = tuple(f"{texture} {shape}" for shape, texture in KINDS)
"""All class names; a data set of n classes has the first n."""

_RECIPE = "synthetic-1"
"""Goes into the fingerprint: to be raised whenever the same key gives another picture."""
FAINT = (3092 / 65536, 200 / 65536)
"""Where the range of a faint picture begins, and how much of the whole range it takes: 8 bits, whose levels
are 256 / 65536 apart, have one level for all of it."""
MOST_BITS = {"uint8": 8, "uint16": 16, "int16": 16}
"""Of each type of integers."""


class SyntheticConfig(DataConfig):
    """Generated pictures: any number, size and channel count; nothing is read from the disk."""

    name: Literal["synthetic"] = "synthetic"
    num_images: int = Field(default=2048, ge=1, le=10**12)
    """Training images, before `holdout`, `label_share` and `labels_per_class`."""
    num_eval_images: int = Field(default=512, ge=1, le=10**12)
    """Evaluation images, drawn apart from those of training."""
    num_classes: int = Field(default=10, ge=2, le=len(CLASSES))
    """The first so many of `CLASSES`; every class has as many images as the others, give or take one."""
    size: int | tuple[int, int] | None = None
    """Pixels of the generated images, one number or [height, width]; None is the recipe's
    `image_size`."""
    dtype: Literal["uint8", "uint16", "int16", "float32"] = "uint8"
    """Type of the values. Integers begin at 0, signed ones at minus half of their range; floats are 0 to 1.
    int16 and float32 need `range`; without it uint16 keeps 8 bits."""
    bits: int | None = Field(default=None, ge=2, le=16)
    """Bits of the integers that are used, 12 for values of 0 to 4,095; None is all of them."""
    gaps: float = Field(default=0.0, ge=0, le=0.5)
    """Share of each picture without data, on average: one side of a line, as at the edge of a satellite's
    swath. The values there are 0, NaN in floats. Needs `data.range`."""
    faint: bool = False
    """Whether a picture takes 200/65536 of the range only, as in a dim microscope: 8 bits have one level for
    all of it, and the class lies below."""
    seed: int = 0
    """The data's own seed: runs whose recipes differ in `seed` still see the same images."""

    @field_validator("size")
    @classmethod
    def _size(cls, size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        return None if size is None else legal_size(size)

    @model_validator(mode="after")
    def _depth(self) -> SyntheticConfig:
        most = MOST_BITS.get(self.dtype)
        if self.bits is not None and (most is None or self.bits > most):
            has = f"at most {most}" if most else "none, since its values are floats"
            raise ValueError(f"bits is {self.bits}, but dtype {self.dtype} has {has}")
        if self.faint and (self.dtype == "uint8" or (self.bits or 16) <= 8):
            raise ValueError("faint needs more than 8 bits: use dtype=uint16")
        if self.gaps and self.range is None:
            raise ValueError("gaps needs range: 8 bits cannot tell pixels without data")
        return self

    @property
    def stated_images(self) -> None:
        """Always known from the data; see `DataConfig.stated_images`."""
        return None

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> SyntheticSource:
        """Open the "train" or the "eval" split; see `DataConfig.open`. The recipe's `seed` plays no part."""
        return SyntheticSource(
            split=split,
            num_images=self.num_images if split == "train" else self.num_eval_images,
            num_classes=self.num_classes,
            size=image_size if self.size is None else as_pair(self.size),
            reading=self.reading(in_chans),
            seed=self.seed,
            dtype=self.dtype,
            bits=self.bits or MOST_BITS.get(self.dtype, 0),
            gaps=self.gaps,
            faint=self.faint,
        )


@dataclass(frozen=True, kw_only=True)
class SyntheticSource:
    """Pictures that are functions of (seed, split, index)."""

    split: str
    """Either "train" or "eval"; the same index gives unrelated pictures in the two."""
    num_images: int
    num_classes: int
    """2 to 10."""
    size: tuple[int, int]
    """(H, W); shapes can be told apart from about 16 pixels on."""
    reading: Reading
    seed: int
    dtype: str = "uint8"
    bits: int = 8
    """Of integers; 0 of floats."""
    gaps: float = 0.0
    faint: bool = False

    @property
    def classes(self) -> list[str] | None:
        """The first of `CLASSES`."""
        return list(CLASSES[: self.num_classes])

    def __len__(self) -> int:
        return self.num_images

    def open(self, index: int) -> Picture:
        """Draw a picture.

        Raises:
            IndexError: outside the data set.
        """
        label = self.label(index)
        draw = keyed_numpy(self.seed, f"synthetic {self.split}", index)
        image = render(draw, *KINDS[label], self.size, self.reading.in_chans)
        if self.faint:
            image = np.float32(FAINT[0]) + np.float32(FAINT[1]) * image.clip(0, 1)
        values, valid = stored(image, self.dtype, self.bits).transpose(1, 2, 0), None
        if self.gaps:
            valid = beside_line(draw, self.size, self.gaps)
            values[~valid] = np.nan if values.dtype.kind == "f" else 0
        return finished(ArrayPicture(values, valid), self.reading)

    def label(self, index: int) -> int:
        """Class index: the classes take turns."""
        if not 0 <= index < self.num_images:
            raise IndexError(f"image {index} of {self.num_images}")
        return index % self.num_classes

    def all_labels(self) -> np.ndarray:
        """See `ImageSource.all_labels`."""
        return np.array([self.label(index) for index in range(self.num_images)])

    def name(self, index: int) -> str:
        """Split, class and number."""
        return f"{self.split}/{CLASSES[self.label(index)]}/{index}"

    def fingerprint(self) -> str:
        """Hash of everything that determines the pictures."""
        parts = (_RECIPE, self.split, self.num_images, self.num_classes, self.size, self.reading.in_chans)
        depth = (self.dtype, self.bits, self.gaps, self.faint)
        own = () if depth == ("uint8", 8, 0.0, False) else depth
        text = repr((*parts, self.seed, *own)).encode()
        return hashlib.blake2b(text, digest_size=12).hexdigest()

    def describe(self) -> str:
        """See `ImageSource.describe`."""
        kind = "" if self.dtype == "uint8" else f" of {self.dtype}"
        return f"{images_of(self.num_images)}{kind} of {self.num_classes} classes, drawn as they are needed"


def stored(image: np.ndarray, dtype: str, bits: int) -> np.ndarray:
    """float32 in [0, 1] as a type has it, with the lowest `bits` of integers; what is beyond is clipped."""
    if dtype == "float32":
        return image.clip(0, 1)
    top = 2**bits - 1
    scaled = np.rint(image * top).clip(0, top)
    if dtype == "int16":
        scaled -= 2 ** (bits - 1)
    values: np.ndarray = scaled.astype(dtype)
    return values


def beside_line(draw: np.random.Generator, size: tuple[int, int], share: float) -> np.ndarray:
    """Where there is data, bool (H, W): beside a line that cuts off 0 to 2 * `share` of the pixels."""
    rows, columns = _pixel_centres(size)
    angle, part = 2 * math.pi * draw.random(), 2 * share * draw.random()
    across = math.cos(angle) * columns + math.sin(angle) * rows
    valid: np.ndarray = across >= np.quantile(across, part)
    return valid


def render(
    draw: np.random.Generator, shape: str, texture: str, size: tuple[int, int], in_chans: int
) -> np.ndarray:
    """One picture.

    Args:
        draw: the generator; all that varies within a class comes from it.
        shape: one of `SHAPES`.
        texture: one of `TEXTURES`.
        size: (H, W).
        in_chans: C.

    Returns:
        float32 (C, H, W), most of it in [0, 1].
    """
    height, width = size
    num_fields = min(in_chans, 3)
    fields = _noise(draw, num_fields + 1, size)
    u = draw.random(14, dtype=np.float32).tolist()
    tint = draw.standard_normal((in_chans, num_fields + 4), dtype=np.float32)
    rows, columns = _pixel_centres(size)

    side = min(size)
    radius = side * (0.27 + 0.10 * u[0])
    # Only corners leave the picture, so that no class is cut off much more than another.
    margin_y, margin_x = min(0.95 * radius, height / 2), min(0.95 * radius, width / 2)
    y = rows - (margin_y + u[1] * (height - 2 * margin_y))
    x = columns - (margin_x + u[2] * (width - 2 * margin_x))
    mask = _coverage(shape, x, y, radius, 2 * math.pi * u[3])

    # Channels share the first field and differ in the others, as the colours of photographs do.
    mix = 0.15 * tint[:, :num_fields]
    mix[:, 0] += 1
    level = 0.45 + 0.1 * u[4]
    background = (0.02 + 0.04 * u[5]) * np.tensordot(mix, fields[:num_fields], 1)
    background += (level + 0.04 * tint[:, -4])[:, None, None]

    # Lighter or darker than the background by enough for an edge to be seen.
    step = (0.15 + 0.15 * u[6]) * (-1 if u[7] < 0.5 else 1)
    detail = (0.03 + 0.03 * u[8]) * fields[num_fields]
    if texture != "smooth":
        period = max(2.5, side * (0.12 + 0.06 * u[9]))
        pattern = _pattern(texture, draw, fields[num_fields], x, y, period, 2 * math.pi * u[10])
        detail += (0.12 + 0.12 * u[11]) * pattern
    foreground = (1 + 0.25 * tint[:, -3])[:, None, None] * detail
    foreground += (level + step + 0.04 * tint[:, -2])[:, None, None]

    foreground -= background
    foreground *= mask
    background += foreground
    # Coloured light from one side adds to the distance between pictures, which keeps nearest
    # neighbours in pixels from working, and hardly touches any patch's own pattern.
    light, angle = 0.15 + 0.2 * u[12], 2 * math.pi * u[13]
    ramp = (light * math.cos(angle) / width) * (columns - width / 2)
    ramp = ramp + (light * math.sin(angle) / height) * (rows - height / 2)
    background += (1 + 0.3 * tint[:, -1])[:, None, None] * ramp
    image: np.ndarray = background
    return image


def _pattern(
    texture: str,
    draw: np.random.Generator,
    field: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    period: float,
    angle: float,
) -> np.ndarray:
    """A texture other than "smooth", of mean 0 and variance about 1: float32 (H, W).

    x and y are (1, W) and (H, 1), period is in pixels, and `field` is what blotches are made of.
    """
    if texture == "grained":
        return draw.standard_normal(field.shape, dtype=np.float32)
    if texture == "blotched":
        blotches: np.ndarray = 1.2 * np.tanh(2 * field)
        return blotches
    wave, cos, sin = 2 * math.pi / period, math.cos(angle), math.sin(angle)
    waves: np.ndarray = math.sqrt(2) * np.sin(wave * cos * x + wave * sin * y)
    if texture == "checked":
        waves *= math.sqrt(2) * np.sin(wave * cos * y - wave * sin * x)
    return waves


def _coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Share of each pixel that the shape covers: float32 (H, W) in [0, 1].

    x and y are (1, W) and (H, 1), in pixels from the centre. All shapes cover as much as a disk of
    `radius` pixels, lest their size betray them.
    """
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    u, v = cos * x + sin * y, cos * y - sin * x
    # Each is a distance to the outline, negative inside, in units of the radius.
    if shape == "triangle":
        outside = np.maximum(-v, 0.5 * v + math.sqrt(0.75) * np.abs(u))
        outside -= math.sqrt(math.pi / math.sqrt(27))
    elif shape in ("disk", "ring"):
        outside = np.sqrt(u * u + v * v)
        if shape == "disk":
            outside -= 1
        else:
            outer = 1 / math.sqrt(1 - 0.6**2)
            outside = np.abs(outside - 0.8 * outer) - 0.2 * outer
    else:
        u, v = np.abs(u), np.abs(v)
        long = np.maximum(u, v)
        if shape == "square":
            outside = long - math.sqrt(math.pi / 4)
        else:
            arm = math.sqrt(math.pi / (8 * 0.3 - 4 * 0.3**2))
            outside = np.maximum(long - arm, np.minimum(u, v) - 0.3 * arm)
    outside *= -radius
    outside += 0.5
    return outside.clip(0, 1)


def _noise(draw: np.random.Generator, num_fields: int, size: tuple[int, int]) -> np.ndarray:
    """Gaussian fields with amplitude 1 / frequency: float32 (num_fields, H, W).

    Each has mean 0, and variance 1 on average over the draws.
    """
    weights = _spectrum(size)
    parts = draw.standard_normal((num_fields, *weights.shape, 2), dtype=np.float32)
    waves = parts.view(np.complex64)[..., 0]
    waves *= weights
    return np.fft.irfft2(waves, s=size, axes=(1, 2)).astype(np.float32, copy=False)


@lru_cache(maxsize=8)
def _spectrum(size: tuple[int, int]) -> np.ndarray:
    """Weights of complex unit noise for `irfft2`: float32 (H, W // 2 + 1)."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    weights: np.ndarray = 1 / frequency
    # `irfft2` keeps the Hermitian half of the columns that are their own mirror image, which halves
    # the variance there.
    mirror = [0, -1] if width % 2 == 0 else [0]
    twice = np.full(weights.shape, 2.0)
    twice[:, mirror] = 1
    variance = (twice * weights**2).sum()
    weights[:, mirror] *= math.sqrt(2)
    if variance > 0:
        weights *= height * width / math.sqrt(2 * variance)
    return weights.astype(np.float32)


@lru_cache(maxsize=8)
def _pixel_centres(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of rows (H, 1) and columns (1, W), float32, in pixels from the upper left corner."""
    y = np.arange(size[0], dtype=np.float32)[:, None] + 0.5
    return y, np.arange(size[1], dtype=np.float32)[None] + 0.5
