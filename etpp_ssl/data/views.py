"""Views of an image: random crops for training and for probes, the centre crop for evaluation.

They are uint8, or float32 where `data.range` keeps the depth of the values; see `etpp_ssl.data.formats.base`.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from etpp_ssl.data.channels import SomeChannels
from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Interpolation,
    Picture,
    Reading,
    Region,
    WithoutData,
    pixels_of,
    require_library,
)
from etpp_ssl.data.resize import KERNELS, resize
from etpp_ssl.randomness import keyed_random

OVERSAMPLING = Fraction(7, 4)
"""Intermediate size over bandwidth. A bicubic resize weakens what lies near half of its output's sampling
rate, so the intermediate has to be larger than the bandwidth by some margin. Measured at bandwidth 96
against the crop from 224 pixels: 30 dB at 4/3, 36 dB at 5/3, 43 dB at 2 (tools/EXPERIMENTS.md)."""
SMALLEST_INTERMEDIATE = 96
"""Pixels per axis; below, the resize no longer takes most of the time."""
LARGEST_RESIZED = 64
"""Pixels of a resized picture per pixel of its centre crop, beyond which only the crop is resized."""
MAX_CROPS = 32
"""Random crops of an image that are tried for one with data."""


def has_gaps(images: Tensor) -> bool:
    """Whether images on the host have NaN, pixels without data; of uint8 no pixel is looked at."""
    # A minimum is NaN where a value is, and found in a sixth of the time of `isnan`.
    return images.is_floating_point() and bool(images.min().isnan())


def shows_nothing(view: Tensor) -> bool:
    """Whether a view (C, H, W) has no pixel with data."""
    return has_gaps(view) and bool(view.isnan().any(dim=0).all())


class View(Protocol):
    """Turns an image into what a batch holds."""

    def __call__(self, image: Picture, sample_id: int, bandwidth: tuple[int, int], progress: float) -> Tensor:
        """One sample's view, (C, H, W): uint8, or of deep pictures float32, NaN where there is no data.

        Args:
            image: the picture.
            sample_id: the sample's number in the run.
            bandwidth: (height, width) shown by the step.
            progress: share of the run's compute spent before the step, in [0, 1); 1 in evaluation.

        Raises:
            UnreadableImage: if the image cannot be decoded.
        """


@dataclass(frozen=True)
class TrainView:
    """Random resized crop and mirror, a function of (seed, sample_id), and of progress with an `augment`.

    With `decode` full, Pillow resizes the crop to the image size. With `reduced` it is resized to the stage's
    intermediate size, from a JPEG that need not be decoded at full resolution. Then comes `augment`. Its
    operations that count pixels (sharpness, blur) act on coarser pixels with `reduced`.

    A crop of a deep picture that shows too little data is drawn again, by the next key.

    With `lanczos`, the result is then resized to the bandwidth by Lanczos, the published code's approximation
    of the low-frequency crop. Otherwise it stays as it is, and the device crops.

    Raises:
        UserError: for a decoder that is not installed.
    """

    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    flip: bool
    lanczos: bool
    seed: int
    decode: Literal["full", "reduced"] = "full"
    interpolation: Interpolation = "bicubic"
    decoder: Decoder = "pillow"
    deep: bool = False
    """Whether the pictures are deep, and a view's values so of 4 bytes instead of 1."""
    num_channels: int | None = None
    """Channels of a deep picture that are shown, drawn by sample; None shows all."""
    augment: Callable[[Tensor, int, float], Tensor] | None = None
    """From (uint8 (C, H, W), sample_id, progress) to a distorted copy."""
    enough: Callable[[Tensor, tuple[int, int], float], bool] | None = None
    """From (view with NaN, bandwidth, progress) to whether it shows enough data; None asks for one pixel."""

    def __post_init__(self) -> None:
        if self.decoder != "pillow":
            require_library(f"data.decoder {self.decoder}", self.decoder, "fast")

    def __call__(
        self, image: Picture, sample_id: int, bandwidth: tuple[int, int], progress: float = 1.0
    ) -> Tensor:
        if self.num_channels is not None:
            image = SomeChannels(image, self.num_channels, self.seed, sample_id)

        def crop(*attempt: int) -> Tensor:
            draw = keyed_random(self.seed, "crop", sample_id, *attempt)
            return self._crop(image, draw, sample_id, bandwidth, progress)

        return first_with_data(
            crop, lambda view: self.enough is None or self.enough(view, bandwidth, progress)
        )

    def _crop(
        self,
        image: Picture,
        draw: random.Random,
        sample_id: int,
        bandwidth: tuple[int, int],
        progress: float,
    ) -> Tensor:
        box = random_crop_box(image.size, self.crop_scale, draw)
        mirror = self.flip and draw.random() < 0.5
        if self.decode == "reduced":
            size = intermediate_size(bandwidth, self.image_size)[::-1]
            view = resize(image.region(box, size, self.decoder), size, self.interpolation)
        else:
            view = _resized_crop(image, box, self.image_size, self.interpolation)
        view = view.flip(2) if mirror else view
        if self.augment is not None:
            view = self.augment(view, sample_id, progress)
        if self.lanczos and bandwidth != self.image_size:
            return by_lanczos(view, bandwidth, fast=self.decode == "reduced")
        return view


def first_with_data(crop: Callable[..., Tensor], enough: Callable[[Tensor], bool]) -> Tensor:
    """The first of an image's random crops that shows data.

    Args:
        crop: draws one, by the key of a sample; called again with 1, 2, ..., which the key then ends in.
        enough: whether a crop that has both pixels with data and pixels without will do.

    Raises:
        WithoutData: if `MAX_CROPS` of them do not.
    """
    for attempt in range(MAX_CROPS):
        view = crop(*([attempt] if attempt else []))
        if not has_gaps(view) or (not shows_nothing(view) and enough(view)):
            return view
    raise WithoutData(f"none of {MAX_CROPS} random crops of it has enough pixels with data")


@dataclass(frozen=True)
class EvalView:
    """Resize to cover image_size / crop_pct (bicubic), then the centre crop, as timm evaluates."""

    image_size: tuple[int, int]
    crop_pct: float
    num_channels: int | None = None
    """As in `TrainView`."""
    seed: int = 0
    """Of their draw."""

    def __call__(
        self, image: Picture, sample_id: int, bandwidth: tuple[int, int], progress: float = 1.0
    ) -> Tensor:
        if self.num_channels is not None:
            image = SomeChannels(image, self.num_channels, self.seed, sample_id)
        height, width = self.image_size
        covered = (math.floor(width / self.crop_pct), math.floor(height / self.crop_pct))
        size = covering_size(image.size, covered)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        box = (left, top, left + width, top + height)
        # A strip of 30,000 x 1 pixels would fill the memory: resize no more than what is shown.
        oversize = size[0] * size[1] > LARGEST_RESIZED * width * height
        x, y = image.size[0] / size[0], image.size[1] / size[1]
        part = (left * x, top * y, (left + width) * x, (top + height) * y)
        if image.deep:
            whole = image.region((0, 0, *image.size), image.size)
            if oversize:
                view = resize(whole._replace(box=part), (width, height), "bicubic")
            else:
                view = resize(whole, size, "bicubic")[:, box[1] : box[3], box[0] : box[2]]
            if shows_nothing(view):
                raise WithoutData("its centre crop has no pixel with data")
            return view
        channels, kernel = image.channels(), Image.Resampling.BICUBIC
        if oversize:
            return to_tensor(tuple(channel.resize((width, height), kernel, box=part) for channel in channels))
        return to_tensor(tuple(channel.resize(size, kernel).crop(box) for channel in channels))


def _resized_crop(
    image: Picture, box: tuple[int, int, int, int], image_size: tuple[int, int], kernel: Interpolation
) -> Tensor:
    size = image_size[::-1]
    if image.deep:
        return resize(image.region(box, (box[2] - box[0], box[3] - box[1])), size, kernel)
    return to_tensor(tuple(channel.crop(box).resize(size, KERNELS[kernel]) for channel in image.channels()))


@cache
def intermediate_size(bandwidth: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """The size that a view with `decode: reduced` has at a bandwidth.

    Args:
        bandwidth: (height, width).
        image_size: (height, width) at full bandwidth.

    Returns:
        (height, width): on each axis `OVERSAMPLING` times the bandwidth, rounded up, at least
        `SMALLEST_INTERMEDIATE`, at most the image size; the image size where that is less than an
        eighth more.
    """
    height, width = (
        max(math.ceil(OVERSAMPLING * bandwidth[axis]), SMALLEST_INTERMEDIATE) for axis in range(2)
    )
    return (
        height if 9 * height < 8 * image_size[0] else image_size[0],
        width if 9 * width < 8 * image_size[1] else image_size[1],
    )


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


def by_lanczos(view: Tensor, bandwidth: tuple[int, int], *, fast: bool = False) -> Tensor:
    """A view resized to a bandwidth by Lanczos, the published code's approximation of the crop.

    Args:
        view: (C, H, W), see `View`.
        bandwidth: (height, width).
        fast: whether torch may resize 8 bits, which Pillow's levels differ from by two at most.

    Returns:
        (C, *bandwidth) of the same type.
    """
    size = bandwidth[::-1]
    if fast or view.is_floating_point():
        whole = (0, 0, view.shape[2], view.shape[1])
        pixels, valid = view.permute(1, 2, 0).numpy(), None
        if view.is_floating_point():
            gaps = np.isnan(pixels)
            if gaps.any():
                valid = ~gaps.any(axis=2)
                # Pixels without data must not end in a step: they take the mean of those that have some.
                fill = pixels[valid].mean(axis=0) if valid.any() else np.float32(0)
                pixels = np.where(valid[:, :, None], pixels, fill)
        return resize(Region(pixels, whole, valid), size, "lanczos")
    return to_tensor(tuple(channel.resize(size, KERNELS["lanczos"]) for channel in to_channels(view)))


def to_tensor(image: Channels) -> Tensor:
    """uint8 (C, H, W) of the channels."""
    return torch.from_numpy(pixels_of(image)).permute(2, 0, 1)


def to_channels(image: Tensor) -> Channels:
    """The reverse of `to_tensor`."""
    if image.shape[0] == 3:
        return (Image.fromarray(image.permute(1, 2, 0).numpy()),)
    return tuple(Image.fromarray(channel.numpy()) for channel in image)


class Normalise:
    """A view's values to float32 with the data set's range and statistics, on the images' device.

    Args:
        mean, std: per channel, of values in [0, 1] of the range.
        device: of the images.
        reading: of the images, which tells the range; None is 0 to 255.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        reading: Reading | None = None,
    ) -> None:
        low, high = (reading or Reading(len(mean))).bounds()
        pairs = zip(high - low, std, strict=True)
        scale = torch.tensor([1 / (extent * s) for extent, s in pairs], dtype=torch.float32)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
        self._low = torch.tensor(low, dtype=torch.float32).view(1, -1, 1, 1).to(device)
        self._scale = scale.view(1, -1, 1, 1).to(device)
        self._shift = shift.view(1, -1, 1, 1).to(device)

    @property
    def num_channels(self) -> int:
        """C."""
        return self._low.shape[1]

    def __call__(self, images: Tensor) -> Tensor:
        """((x - low) / (high - low) - mean) / std: uint8 or float32 (B, C, H, W) to float32.

        Pixels without data, NaN in any channel, become 0, the channel's mean.
        """
        if not images.is_floating_point():
            return torch.addcmul(self._shift, images.float(), self._scale)
        normalised = torch.addcmul(self._shift, images - self._low, self._scale)
        return normalised.where(~images.isnan().any(dim=1, keepdim=True), 0)


@dataclass(frozen=True)
class ProbeView:
    """Random resized crop (one draw, bicubic, at full resolution) and mirror, by (seed, sample_id) alone.

    A crop of a deep picture without any data is drawn again.
    """

    image_size: tuple[int, int]
    crop_scale: tuple[float, float]
    flip: bool
    seed: int

    def __call__(
        self, image: Picture, sample_id: int, bandwidth: tuple[int, int], progress: float = 1.0
    ) -> Tensor:
        """(C, H, W) of `image_size`, whatever the bandwidth; see `View`."""

        def crop(*attempt: int) -> Tensor:
            draw = keyed_random(self.seed, "probe-crop", sample_id, *attempt)
            box = single_draw_crop_box(image.size, self.crop_scale, draw)
            mirror = self.flip and draw.random() < 0.5
            view = _resized_crop(image, box, self.image_size, "bicubic")
            return view.flip(2) if mirror else view

        return first_with_data(crop, lambda view: True)


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
