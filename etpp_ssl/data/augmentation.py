"""Augmentation of labelled images for supervised training: RandAugment, random erasing, mixup and CutMix.

A data worker does random resized crop and mirror (`TrainView`), then RandAugment, then with `lanczos` the
resize to the bandwidth. The device does normalisation, low-frequency crop, random erasing (Zhong et al., AAAI
2020) and mixing: mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019).

Every draw is keyed by the samples' numbers and none waits for the device. Erasing is therefore the same
however a batch is split. Mixing is timm's batch mode: one weight, or one box, for the whole micro-batch, and
image b's partner is image B - 1 - b. So with another `micro_batch_size` or number of processes it differs.

Legend: B batch, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, field_validator, model_validator
from torch import Tensor

from etpp_ssl.config import Config, UserError
from etpp_ssl.data.rand_augment import RandAugment, rand_augment_sections
from etpp_ssl.data.uneven import Balance, UnevenClasses
from etpp_ssl.data.views import TrainView
from etpp_ssl.randomness import keyed_numpy, keyed_words

MEDIUM_AND_LARGE = (10_000, 100_000)
"""Training images from which on `augment.by_size` takes weak, and then MAE's augmentation."""
ATTEMPTS = 10
"""Boxes that random erasing tries before it leaves an image alone."""


class AugmentConfig(Config):
    """Augmentation, label smoothing and uneven classes; the defaults are MAE's for fine-tuning."""

    by_size: bool = False
    """RandAugment, erasing, mixup, CutMix and smoothing follow the number of training images; see
    `settings_for`."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment string, or null."""
    ramp: bool = False
    """Let the magnitude grow from 0 to that of `rand_augment`, in ten equal shares of compute
    (EfficientTrain++)."""
    erasing: float = Field(default=0.25, ge=0, le=1)
    """Share of the images in which a box becomes noise."""
    mixup: float = Field(default=0.8, ge=0)
    """Parameter of the Beta distribution of mixup's weights; 0 switches it off."""
    cutmix: float = Field(default=1.0, ge=0)
    """The same for CutMix; with both, each micro-batch takes one of them."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing."""
    balance: Balance = "none"
    """How often a class is drawn: `none`, as often as it has images; `uniform`, as often as every other;
    `sqrt`, by the square root of their number. An epoch stays as long, a class's images take turns."""
    class_weights: Balance = "none"
    """Weights of the images' losses by class, 1 on average over the images that are drawn, so that classes
    weigh as much as if they were drawn in these shares."""
    logit_adjustment: float = Field(default=0.0, ge=0)
    """tau of Menon et al. (ICLR 2021, equation 10): training adds tau times the logarithm of a class's share
    to its logit, evaluation does not; 1 aims at the mean recall of the classes, 0 switches it off."""
    class_counts: tuple[NonNegativeInt, ...] | None = None
    """Training images of each class, in the order of the model's outputs, for `class_weights` and
    `logit_adjustment`. None counts them, and the run records what it found; a stream's have to be given."""

    def settings_for(self, num_images: int, *, deep: bool) -> dict[str, Any]:
        """The settings of `by_size`: the fewer images, the less is done to them.

        Few images are seen many times, but strong augmentation needs longer training than few images get, and
        moves the features away from those that a head was fitted to.

        Args:
            num_images: of the training set.
            deep: whether images have more than 8 bits, which RandAugment cannot work on.
        """
        strength = sum(num_images >= least for least in MEDIUM_AND_LARGE)
        magnitude = (None, "rand-m5-mstd0.5-inc1", "rand-m9-mstd0.5-inc1")[strength]
        return {
            "rand_augment": None if deep else magnitude,
            "erasing": (0.0, 0.0, 0.25)[strength],
            "mixup": (0.0, 0.0, 0.8)[strength],
            "cutmix": (0.0, 0.0, 1.0)[strength],
            "smoothing": 0.1,
        }

    @field_validator("rand_augment")
    @classmethod
    def _known(cls, rand_augment: str | None) -> str | None:
        if rand_augment is not None:
            rand_augment_sections(rand_augment)
        return rand_augment

    @model_validator(mode="after")
    def _ramp_of_something(self) -> AugmentConfig:
        if self.ramp and self.rand_augment is None:
            raise ValueError("ramp is true and rand_augment is null: there is no magnitude to grow")
        return self

    def build_view(self, base: TrainView, mean: tuple[float, ...]) -> TrainView:
        """The training view.

        Args:
            base: crop, mirror and resize; its seed is that of RandAugment, too.
            mean: the data's, of values in [0, 1], one per channel.

        Raises:
            UserError: if RandAugment cannot work on so many channels, or on more than 8 bits.
        """
        if self.rand_augment is None:
            return base
        if base.deep:
            raise UserError(
                "augment.rand_augment works on 8 bits, and data.range keeps the depth of the values: use "
                "augment.rand_augment=null"
            )
        augment = RandAugment(
            self.rand_augment,
            ramp=self.ramp,
            mean=mean,
            image_size=base.image_size,
            interpolation=base.interpolation,
            seed=base.seed,
        )
        return replace(base, augment=augment)

    def build_erasing(self, seed: int) -> RandomErasing:
        """Random erasing, for normalised images at the stage's bandwidth."""
        return RandomErasing(self.erasing, seed)

    def build_mixup(self, num_classes: int, seed: int, weights_K: Tensor | None = None) -> Mixup:
        """Mixup, CutMix, label smoothing and class weights."""
        return Mixup(self.mixup, self.cutmix, self.smoothing, num_classes, seed, weights_K)

    def uneven(self, counts: Sequence[int]) -> UnevenClasses:
        """What the loss makes of the classes' numbers of images."""
        return UnevenClasses(tuple(counts), self.balance, self.class_weights, self.smoothing)


@dataclass(frozen=True)
class RandomErasing:
    """timm's "pixel" mode: a box of each chosen image becomes normal noise, by (seed, sample_id, size)."""

    probability: float
    """Share of the images, in [0, 1]."""
    seed: int
    min_area: float = 0.02
    max_area: float = 1 / 3
    """Range of the box's share of the area; uniform."""
    min_aspect: float = 0.3
    """Height over width of the box is log-uniform between this and its inverse."""

    def __call__(self, images: Tensor, sample_ids_B: Tensor) -> Tensor:
        """A copy with boxes of noise.

        Args:
            images: normalised, float (B, C, H, W), at the size that the network sees.
            sample_ids_B: int64 (B,) on the same device, the images' numbers in the run.
        """
        if self.probability == 0:
            return images
        noise = keyed_normal(self.seed, "erasing noise", sample_ids_B, images[0].numel())
        inside = self.boxes(sample_ids_B, images.shape[2], images.shape[3])[:, None]
        return torch.where(inside, noise.view(images.shape).to(images.dtype), images)

    def boxes(self, sample_ids_B: Tensor, height: int, width: int) -> Tensor:
        """Which pixels are erased, bool (B, H, W).

        Of the boxes that are drawn, the first that is smaller than the image on both axes counts.
        """
        words = keyed_words(self.seed, "erasing", sample_ids_B, 1 + 4 * ATTEMPTS)
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


def keyed_normal(seed: int, purpose: str, sample_ids_B: Tensor, num_draws: int) -> Tensor:
    """Standard normal numbers, float32 (B, num_draws), by Box and Muller; see `keyed_words`.

    Two numbers come from the halves of one word, so their size is at most sqrt(2 ln 2^25), about 5.9.
    """
    words = keyed_words(seed, purpose, sample_ids_B, -(-num_draws // 2))
    # 24 bits are what float32 holds; the half keeps the logarithm finite.
    radius = (((words >> 40 & 0xFFFFFF).float() + 0.5) / 2**24).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFF).float().mul_(2 * math.pi / 2**24)
    return torch.cat([radius * angle.cos(), radius.mul_(angle.sin())], 1)[:, :num_draws]


def unit_interval(words: Tensor) -> Tensor:
    """The upper 24 bits of 64-bit words as float32 in [0, 1), exact on any device."""
    values: Tensor = (words >> 40 & 0xFFFFFF).float() / 2**24
    return values


class Mix(NamedTuple):
    """How a micro-batch is mixed."""

    weight: float
    """Of an image's own label; the partner's is 1 - weight."""
    box: tuple[int, int, int, int] | None
    """(top, bottom, left, right) that comes from the partner, or None where all pixels are averaged."""


@dataclass(frozen=True)
class Mixup:
    """Mixes images and labels; a function of the seed, the micro-batch's first sample and its images."""

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
    weights_K: Tensor | None = None
    """Of the images' losses by class, float32 on the images' device."""

    def __call__(self, images: Tensor, labels_B: Tensor, first_sample_id: int) -> tuple[Tensor, Tensor]:
        """The mixed images and the probabilities to learn.

        Args:
            images: float (B, C, H, W); B may be odd, the middle image is then its own partner.
            labels_B: int64 (B,), in [0, K), on the same device.
            first_sample_id: number in the run of the micro-batch's first image (`Batch.first_sample_id`).

        Returns:
            images, the same or a copy; float32 (B, K), rows that add up to 1, or to their images' weights: a
            loss that is linear in its targets is then weighted, and of mixed images each part by its own.
        """
        targets_BK = smoothed(labels_B, self.num_classes, self.smoothing)
        if self.weights_K is not None:
            targets_BK = targets_BK * self.weights_K[labels_B, None]
        mix = self.draw(first_sample_id, images.shape[2], images.shape[3])
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

    def draw(self, first_sample_id: int, height: int, width: int) -> Mix:
        """The mix of the micro-batch of images of (height, width) that starts with a sample."""
        if not self.mixup and not self.cutmix:
            return Mix(1.0, None)
        draw = keyed_numpy(self.seed, "mixup", first_sample_id)
        cut = self.cutmix > 0 and (self.mixup == 0 or draw.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        weight = float(draw.beta(alpha, alpha))
        if not cut:
            return Mix(weight, None)
        return cut_box(weight, int(draw.integers(height)), int(draw.integers(width)), height, width)


def cut_box(weight: float, y: int, x: int, height: int, width: int) -> Mix:
    """CutMix's box around pixel (y, x): the image's aspect ratio, and 1 - `weight` of its area.

    What reaches beyond the image is cut off; the weight becomes the share of the area that stays.
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
