"""Keyed views of an image for training, and the fixed view for evaluation.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from etpp_ssl.data.images import Bands
from etpp_ssl.randomness import keyed_random


class View(Protocol):
    """Turns a decoded image into what a batch holds."""

    def __call__(self, image: Bands, position: int, bandwidth: tuple[int, int]) -> Bands:
        """The view of sample number `position` at a stage's bandwidth (height, width)."""


@dataclass(frozen=True)
class TrainView:
    """Random resized crop (bicubic) and mirror, a function of (seed, position) alone.

    With `lanczos`, the crop of full size is then resized to the bandwidth by Lanczos, which is the
    published code's approximation of the low-frequency crop; otherwise the full size comes out and
    the device crops.
    """

    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    flip: bool
    lanczos: bool
    seed: int

    def __call__(self, image: Bands, position: int, bandwidth: tuple[int, int]) -> Bands:
        draw = keyed_random(self.seed, "crop", position)
        box = random_crop_box(image[0].size, self.crop_scale, draw)
        mirror = self.flip and draw.random() < 0.5
        height, width = self.image_size
        views = []
        for band in image:
            view = band.crop(box).resize((width, height), Image.Resampling.BICUBIC)
            if mirror:
                view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if self.lanczos and bandwidth != self.image_size:
                view = view.resize((bandwidth[1], bandwidth[0]), Image.Resampling.LANCZOS)
            views.append(view)
        return tuple(views)


@dataclass(frozen=True)
class EvalView:
    """Resize to cover image_size / crop_pct (bicubic), then the centre crop, as timm evaluates."""

    image_size: tuple[int, int]
    crop_pct: float

    def __call__(self, image: Bands, position: int, bandwidth: tuple[int, int]) -> Bands:
        height, width = self.image_size
        covered = (math.floor(width / self.crop_pct), math.floor(height / self.crop_pct))
        size = covering_size(image[0].size, covered)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        box = (left, top, left + width, top + height)
        return tuple(band.resize(size, Image.Resampling.BICUBIC).crop(box) for band in image)


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same aspect ratio that covers a target, up to the last pixel as in timm.

    Args:
        size: (width, height) of the picture.
        target: (width, height) to cover.
    """
    width, height = size
    if target[0] == target[1]:
        # timm leaves square targets to torchvision, which truncates where timm rounds.
        short = min(size)
        return int(target[0] * width / short), int(target[1] * height / short)
    ratio = min(width / target[0], height / target[1])
    return round(width / ratio), round(height / ratio)


def random_crop_box(
    size: tuple[int, int], scale: tuple[float, float], draw: random.Random
) -> tuple[int, int, int, int]:
    """The box of a random resized crop, with torchvision's distribution.

    Args:
        size: (width, height) of the picture.
        scale: range of the crop's share of the area.
        draw: the generator.

    Returns:
        (left, top, right, bottom). Ten tries for an aspect ratio in [3/4, 4/3], log-uniform; then
        the largest centre crop within that range.
    """
    width, height = size
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def to_tensor(image: Bands) -> Tensor:
    """uint8 (C, H, W) of the bands."""
    arrays = [np.asarray(band) for band in image]
    stacked = np.concatenate([a[:, :, None] if a.ndim == 2 else a for a in arrays], axis=2)
    return torch.from_numpy(stacked).permute(2, 0, 1)


class Normalise:
    """uint8 to float32 with the data set's statistics, on the images' device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
        self._scale = scale.view(1, -1, 1, 1).to(device)
        self._shift = shift.view(1, -1, 1, 1).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std: uint8 (B, C, H, W) to float32."""
        return torch.addcmul(self._shift, images.float(), self._scale)
