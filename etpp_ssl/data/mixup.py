"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019) of a micro-batch, on the device.

timm's batch mode: one weight, or one box, for the whole micro-batch, and image b's partner is image
B - 1 - b. So what follows the micro-batch here is the partner, the weight and the box; with another
`micro_batch_size` or number of processes they differ.

Legend: B batch, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from etpp_ssl.randomness import keyed_numpy


class Mix(NamedTuple):
    """What is done to a micro-batch."""

    weight: float
    """Of an image's own label; the partner's is 1 - weight."""
    box: tuple[int, int, int, int] | None
    """(top, bottom, left, right) that comes from the partner, or None where all pixels are averaged."""


@dataclass(frozen=True)
class Mixup:
    """Mixes images and labels; a function of (seed, the micro-batch's first position) and of its images."""

    mixup: float
    """Weights are drawn from Beta(mixup, mixup); 0 switches mixup off."""
    cutmix: float
    """Shares of the area that stays are drawn from Beta(cutmix, cutmix); 0 switches CutMix off. With both,
    each micro-batch takes one or the other with probability 1/2."""
    smoothing: float
    """Probability that is spread over all classes, in [0, 1)."""
    num_classes: int
    """K."""
    seed: int

    def __call__(self, images: Tensor, labels_B: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
        """The mixed images and the probabilities to learn.

        Args:
            images: float (B, C, H, W); B may be odd, the middle image is then its own partner.
            labels_B: int64 (B,), in [0, K), on the same device.
            first_position: number, in the run, of the micro-batch's first image (`Batch.first_position`).

        Returns:
            images, the same or a copy; float32 (B, K), rows that add up to 1.
        """
        targets_BK = smoothed(labels_B, self.num_classes, self.smoothing)
        mix = self.draw(first_position, images.shape[2], images.shape[3])
        if mix.weight == 1:
            return images, targets_BK
        targets_BK = targets_BK * mix.weight + targets_BK.flip(0) * (1 - mix.weight)
        partners = images.flip(0)
        if mix.box is None:
            return images.mul(mix.weight).add_(partners.mul_(1 - mix.weight)), targets_BK
        top, bottom, left, right = mix.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        return mixed, targets_BK

    def draw(self, first_position: int, height: int, width: int) -> Mix:
        """What is done to the micro-batch of images of (height, width) that starts at a position."""
        if not self.mixup and not self.cutmix:
            return Mix(1.0, None)
        draw = keyed_numpy(self.seed, "mixup", first_position)
        cut = self.cutmix > 0 and (self.mixup == 0 or draw.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        weight = float(draw.beta(alpha, alpha))
        if not cut:
            return Mix(weight, None)
        return cut_box(weight, int(draw.integers(height)), int(draw.integers(width)), height, width)


def cut_box(weight: float, y: int, x: int, height: int, width: int) -> Mix:
    """A box around pixel (y, x) of the image's aspect ratio and 1 - `weight` of its area.

    What reaches beyond the image is cut off, and the weight becomes the share of the area that stays.
    """
    side = (1 - weight) ** 0.5
    h, w = int(height * side), int(width * side)
    top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
    left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def smoothed(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """One-hot labels with `smoothing` spread evenly over all classes, float32 (B, K)."""
    rest = smoothing / num_classes
    targets_BK = torch.full((len(labels_B), num_classes), rest, device=labels_B.device)
    return targets_BK.scatter_(1, labels_B[:, None], 1 - smoothing + rest)
