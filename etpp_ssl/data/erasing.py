"""Random erasing (Zhong et al., AAAI 2020): a box of each chosen image becomes noise, on the device.

timm's "pixel" mode: normal noise for every pixel and channel of the normalised image, one box. The draws
are keyed by the images' numbers, so they are the same however a batch is split, and none waits for the
device.

Legend: B batch, C channels, H, W pixels, A attempts at a box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from etpp_ssl.randomness import keyed_words

ATTEMPTS = 10
"""Boxes that are tried before an image is left alone."""


@dataclass(frozen=True)
class RandomErasing:
    """Erases a box in a share of the images, a function of (seed, position) and of the size alone."""

    probability: float
    """Share of the images, in [0, 1]."""
    seed: int
    min_area: float = 0.02
    max_area: float = 1 / 3
    """Range of the box's share of the area; uniform."""
    min_aspect: float = 0.3
    """Height over width of the box is log-uniform between this and its inverse."""

    def __call__(self, images: Tensor, positions_B: Tensor) -> Tensor:
        """A copy with boxes of noise.

        Args:
            images: normalised, float (B, C, H, W), at the size that the network sees.
            positions_B: int64 (B,) on the same device, the images' numbers in the run.
        """
        if self.probability == 0:
            return images
        noise = keyed_normal(self.seed, "erasing noise", positions_B, images[0].numel())
        inside = self.boxes(positions_B, images.shape[2], images.shape[3])[:, None]
        return torch.where(inside, noise.view(images.shape).to(images.dtype), images)

    def boxes(self, positions_B: Tensor, height: int, width: int) -> Tensor:
        """Which pixels are erased, bool (B, H, W).

        Of the boxes that are drawn, the first that is smaller than the image on both axes counts.
        """
        words = keyed_words(self.seed, "erasing", positions_B, 1 + 4 * ATTEMPTS)
        chosen = unit_interval(words[:, :1]) < self.probability
        area, aspect, top, left = words[:, 1:].unflatten(1, (4, ATTEMPTS)).unbind(1)
        share = self.min_area + unit_interval(area) * (self.max_area - self.min_area)
        log_aspect = math.log(self.min_aspect) * (1 - 2 * unit_interval(aspect))
        heights = (share * (height * width) * log_aspect.exp()).sqrt().round().long()
        widths = (share * (height * width) / log_aspect.exp()).sqrt().round().long()
        fits = (heights < height) & (widths < width)
        first = fits.int().argmax(1, keepdim=True)
        chosen = chosen & fits.gather(1, first)
        h, w = heights.gather(1, first), widths.gather(1, first)
        y = top.gather(1, first).remainder((height - h + 1).clamp(min=1))
        x = left.gather(1, first).remainder((width - w + 1).clamp(min=1))
        rows = torch.arange(height, device=words.device)
        columns = torch.arange(width, device=words.device)
        in_rows = (rows >= y) & (rows < y + h) & chosen
        in_columns = (columns >= x) & (columns < x + w)
        inside: Tensor = in_rows[:, :, None] & in_columns[:, None, :]
        return inside


def keyed_normal(seed: int, purpose: str, positions_B: Tensor, num_draws: int) -> Tensor:
    """Standard normal numbers, float32 (B, num_draws), by Box and Muller; see `keyed_words`.

    Two numbers come from the halves of one word, so their size is at most sqrt(2 ln 2^25), about 5.9.
    """
    words = keyed_words(seed, purpose, positions_B, -(-num_draws // 2))
    # 24 bits are what float32 holds; the half keeps the logarithm finite.
    radius = (((words >> 40 & 0xFFFFFF).float() + 0.5) / 2**24).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFF).float().mul_(2 * math.pi / 2**24)
    return torch.cat([radius * angle.cos(), radius.mul_(angle.sin())], 1)[:, :num_draws]


def unit_interval(words: Tensor) -> Tensor:
    """The upper 24 bits of 64-bit words as float32 in [0, 1), exact on any device."""
    values: Tensor = (words >> 40 & 0xFFFFFF).float() / 2**24
    return values
