"""The augmented view of MAE's linear probe."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from etpp_ssl.data.augment import to_tensor
from etpp_ssl.data.images import Picture
from etpp_ssl.randomness import keyed_random


@dataclass(frozen=True)
class ProbeView:
    """Random resized crop (one draw, bicubic, at full resolution) and mirror, by (seed, position) alone."""

    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    flip: bool
    seed: int

    def __call__(
        self, image: Picture, position: int, bandwidth: tuple[int, int], progress: float = 1.0
    ) -> Tensor:
        """uint8 (C, H, W) of `image_size`, whatever the bandwidth; see `View`."""
        draw = keyed_random(self.seed, "probe-crop", position)
        box = single_draw_crop_box(image.size, self.crop_scale, draw)
        mirror = self.flip and draw.random() < 0.5
        size = self.image_size[::-1]
        view = to_tensor(
            tuple(band.crop(box).resize(size, Image.Resampling.BICUBIC) for band in image.bands())
        )
        return view.flip(2) if mirror else view


def single_draw_crop_box(
    size: tuple[int, int], scale: tuple[float, float], draw: random.Random
) -> tuple[int, int, int, int]:
    """The box of a random resized crop that is drawn once and cut to the picture.

    torchvision draws again where a box does not fit (`random_crop_box`), which makes large boxes of
    extreme shape rarer. BYOL's and MAE's linear probe take the first one and cut each side to the
    picture's, so that the aspect ratio may leave [3/4, 4/3].

    Args:
        size: (width, height) of the picture.
        scale: range of the crop's share of the area, before it is cut.
        draw: the generator.

    Returns:
        (left, top, right, bottom), at least one pixel each way.
    """
    width, height = size
    area = width * height * draw.uniform(*scale)
    ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    top, left = draw.randint(0, height - h), draw.randint(0, width - w)
    return left, top, left + w, top + h
