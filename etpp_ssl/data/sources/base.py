"""What a data source offers, and the settings that every source shares.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from etpp_ssl.config import Config, NotAtHand, UserError, listed, may_change
from etpp_ssl.data.formats.base import MAX_PIXELS, Decoder, Interpolation, Picture, Reader, Reading


class ImageSource(Protocol):
    """A data set that is addressed by index; small to pickle, safe to use from data workers."""

    @property
    def classes(self) -> list[str] | None:
        """Class names, in the order of the labels; None for a data set without labels."""

    def __len__(self) -> int:
        """Number of images."""

    def open(self, index: int) -> Picture:
        """An image that is decoded when its pixels are asked for, and no further than needed.

        Raises:
            UnreadableImage: if it cannot be decoded, as far as that is known already.
        """

    def label(self, index: int) -> int:
        """Class index, or -1 where there are no labels."""

    def all_labels(self) -> np.ndarray | None:
        """Every image's class index (-1 without labels), of any signed type, (N,), not to be written to; or
        None where images would have to be read."""

    def name(self, index: int) -> str:
        """What a person would look for: a relative path, for instance."""

    def fingerprint(self) -> str:
        """A short hash of what the data set contains; a resumed run must find the same."""

    def describe(self) -> str:
        """What was found and what was left out, in one line for people."""


class DataConfig(Config, ABC):
    """Settings that every data source shares."""

    num_images: int | None = may_change(None, ge=1, le=10**12)
    """Images expected in the training set, after `holdout`, `label_share`, `labels_per_class` and
    `holdout_share`. Data at hand is counted, and another number is reported (see `strict`); `plan` needs
    this one where no data is."""
    strict: bool = may_change(False)
    """Whether another number of images than `num_images` is an error, so that a published result is not
    repeated on other data. No effect on streams, which are not counted, and on synthetic images."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean, of values that `range` has brought to [0, 1]. Default: ImageNet's for 1 or 3
    channels, otherwise 0.5."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation of the same. Default: ImageNet's for 1 or 3 channels, otherwise 0.25."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area range of the random resized crop (MAE: 0.2 to 1)."""
    flip: bool = True
    """Mirror half of the training images."""
    decode: Literal["full", "reduced"] = "reduced"
    """`full`: training images are decoded and resized at full resolution, by Pillow. `reduced`: below
    the full bandwidth they are resized to an intermediate size (`augment.intermediate_size`), JPEGs are
    decoded at 1/2, 1/4 or 1/8 where the crop keeps that size, and torch resizes."""
    interpolation: Interpolation = "bicubic"
    """Kernel of the random resized crop."""
    decoder: Decoder = "pillow"
    """Who decodes JPEGs for `decode: reduced`. `simplejpeg` is faster; its pixels are Pillow's as long as
    both are built on the same libjpeg-turbo."""
    crop_pct: float = may_change(0.875, gt=0, le=1)
    """Evaluation: the centre crop's share of the resized image's side (timm's `crop_pct`)."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=2**32)
    """Images of more pixels count as unreadable, before they are decoded: a few bytes can claim more than
    any memory holds."""
    range: tuple[float, float] | tuple[tuple[float, float], ...] | Literal["dtype"] | None = None
    """[low, high] of the values, which become 0 and 1 before `mean` and `std`, or one such pair a channel:
    values then keep the depth of their files. `dtype` divides integers by the largest value of their type.
    None is for photographs of 8 bits; of 16-bit values it keeps the high byte."""
    clip: bool = False
    """Values outside of `range` become its nearer end. Otherwise they stay as they are, and images that have
    such are counted."""
    nodata: float | None = None
    """The value of pixels without data, beside NaN and what a file itself states; needs `range`."""
    min_valid: float = Field(default=0.25, ge=0, le=1)
    """Pre-training: share of a patch's pixels that must have data for the patch to be shown or predicted, one
    pixel at least, counted at the stage's bandwidth. Crops with too few such patches are drawn again."""
    axes: str | None = Field(default=None, pattern="^[a-z]{2,6}$")
    """Axes of a file's array, a letter each, such as `chw`: h, w, c for channels, another for one of length
    1; or `pages`: pages, frames or the entries of a stack are the channels. None: as the file says, and
    (height, width, channels) where it says nothing."""
    channels: tuple[int | str, ...] | None = None
    """Which channels of a file are taken, in this order, as many as `in_chans`: by number from 0, or by the
    names that the file has for them. A number may stand more than once."""
    array: str | None = Field(default=None, min_length=1)
    """Name of the array in files that can hold several: .npz, .h5 (`group/name`), .zarr. None: the only one
    of two or more axes."""
    channel_sampling: int | None = Field(default=None, ge=1)
    """For images that differ in channels: pre-training shows so many of each, which is `in_chans`, drawn by
    sample among those that its file has (or `channels` names). Embeddings, and probes on them, are the mean
    over all. Needs one `range` for all channels."""
    reader: Reader = "auto"
    """Who reads files: each format its own library, or GDAL through `rasterio` whatever it can read."""
    max_bad_share: float = may_change(0.01, ge=0, le=1)
    """The run stops once more than this share of the data set turned out to be unreadable."""
    holdout: int = Field(default=0, ge=0)
    """Images, chosen by a keyed draw, that training never sees: for evaluation without a split."""
    holdout_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of each class of the training images, by a keyed draw after `label_share` or `labels_per_class`,
    that training never sees: the split `holdout`, which a classifier's settings are chosen on. At least one
    image of a class, but never its only one."""
    label_share: float | None = Field(default=None, gt=0, le=1)
    """Train on this share of each class, chosen by a keyed draw: rounded to whole images, at least one."""
    labels_per_class: int | None = Field(default=None, ge=1)
    """Train on so many images of each class, chosen by a keyed draw."""
    cache: Literal["off", "ram", "disk"] = may_change("off")
    """Decode the training images once, before the first step, and keep them as arrays: `ram`, in memory that
    a process shares with its data workers, or `disk`, in a file below `~/.cache/etpp_ssl` that all runs on
    the same images share. For small images, whose decoding takes longer than what a step does with them.
    Never changes a result. Photographs of 8 bits only."""
    description: str | None = may_change(None)
    """One sentence about the data, for the model card."""
    num_workers: int = may_change(4, ge=0, le=1024)
    """Data worker processes per training process; never changes a result."""
    prefetch: int = may_change(2, ge=1, le=1024)
    """Batches that each worker keeps ready."""
    stall_seconds: float | None = may_change(600.0, gt=0)
    """The run ends, naming the images, when a batch has been waited for so long: in training, probes and
    evaluations, the start of the workers included. Only waiting counts, not the time between two batches.
    None waits for ever, for instance for a debugger in a data set."""

    @model_validator(mode="after")
    def _ranges(self) -> DataConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {[low, high]}: use two shares of the area, 0 < low <= high <= 1")
        if self.decoder != "pillow" and self.decode == "full":
            raise ValueError(f"decoder {self.decoder} needs decode=reduced: decode=full is Pillow's alone")
        if self.label_share is not None and self.labels_per_class is not None:
            raise ValueError(
                f"label_share is {self.label_share:g} and labels_per_class is {self.labels_per_class}: "
                f"give one of them, and null for the other"
            )
        return self

    @field_validator("cache", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # YAML reads `off` as false.
        return "off" if value is False else value

    @field_validator("axes")
    @classmethod
    def _axes(cls, axes: str | None) -> str | None:
        if axes not in (None, "pages") and (len(set(axes)) < len(axes) or not {"h", "w"} <= set(axes)):
            raise ValueError("use one letter an axis, h and w among them, such as hwc or chw; or pages")
        return axes

    @model_validator(mode="after")
    def _values(self) -> DataConfig:
        if self.range not in (None, "dtype"):
            for low, high in self._pairs:
                if not (math.isfinite(low) and math.isfinite(high) and low < high):
                    raise ValueError(f"range has {[low, high]}: use [low, high], low < high")
        if self.range is not None and self.cache != "off":
            raise ValueError(
                f"cache is {self.cache}, but only photographs of 8 bits are kept, without a range"
            )
        sampled = self.channel_sampling is not None
        for key, given in (
            ("clip", self.clip),
            ("nodata", self.nodata is not None),
            ("channel_sampling", sampled),
        ):
            if self.range is None and given:
                raise ValueError(f"{key} needs range: without one, values are 8 bits (`etpp inspect`)")
        if sampled and self.range not in (None, "dtype") and len(self._pairs) > 1:
            raise ValueError(
                f"range has {len(self._pairs)} pairs, but with channel_sampling any channel takes any place: "
                f"give one"
            )
        return self

    @property
    def _pairs(self) -> tuple[tuple[float, float], ...]:
        """(low, high), one for all channels or one each."""
        assert self.range is not None
        assert self.range != "dtype"
        one = isinstance(self.range[0], float | int)
        return (self.range,) if one else self.range  # type: ignore[return-value]

    def reading(self, in_chans: int) -> Reading:
        """How files become pictures.

        Raises:
            UserError: for settings that do not fit `in_chans`.
        """
        pairs = None if self.range is None else self.range if self.range == "dtype" else self._pairs
        if pairs is not None and pairs != "dtype" and len(pairs) not in (1, in_chans):
            raise UserError(
                f"data.range has {len(pairs)} pairs, but in_chans is {in_chans}: give one, or one each"
            )
        if self.channel_sampling not in (None, in_chans):
            raise UserError(
                f"data.channel_sampling is {self.channel_sampling}, but in_chans is {in_chans}: the encoder "
                f"takes as many channels as it is shown"
            )
        few = self.channels is not None and len(self.channels) < in_chans
        if few or (self.channels is not None and not self.channel_sampling and len(self.channels) > in_chans):
            assert self.channels is not None
            raise UserError(f"data.channels has {len(self.channels)} entries, but in_chans is {in_chans}")
        return Reading(
            in_chans=in_chans,
            max_pixels=self.max_pixels,
            range=pairs,
            clip=self.clip,
            nodata=self.nodata,
            fill=self.statistics(in_chans)[0][:1] if self.channel_sampling else self.statistics(in_chans)[0],
            axes=self.axes,
            channels=self.channels,
            array=self.array,
            reader=self.reader,
            sampled=self.channel_sampling is not None,
        )

    @abstractmethod
    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> ImageSource:
        """Open the "train" or the "eval" split.

        Raises:
            UserError: if the data is not there or has no images.
        """

    @property
    def stated_images(self) -> int | None:
        """Images in the training set as the recipe states it; None where the data has to tell."""
        return self.num_images

    def statistics(self, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, defaults filled in.

        Raises:
            UserError: if their number is not that of the channels.
        """
        default_mean, default_std = default_statistics(in_chans)
        if self.channel_sampling is not None:
            # Any channel takes any place.
            default_mean, default_std = (0.5,) * in_chans, (0.25,) * in_chans
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != in_chans:
                raise UserError(f"data.{key} has {len(values)} numbers, but in_chans is {in_chans}")
        if self.std is not None and min(self.std) <= 0:
            raise UserError(f"data.std is {list(self.std)}: standard deviations are positive")
        return self.mean or default_mean, self.std or default_std


def default_statistics(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel, of values in [0, 1]: ImageNet's for 1 or 3 channels, else 0.5 and 0.25."""
    return {
        1: ((0.449,), (0.226,)),
        3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }.get(in_chans, ((0.5,) * in_chans, (0.25,) * in_chans))


def existing_folder(key: str, path: Path) -> Path:
    """`path`, if it is a folder.

    Raises:
        NotAtHand: if nothing is there, naming the recipe's key.
        UserError: if something else is.
    """
    if not os.path.exists(path):
        raise NotAtHand(f"{key} {str(path)!r} does not exist")
    if not os.path.isdir(path):
        raise UserError(f"{key} {str(path)!r} is not a folder")
    return path


def expanded(path: str) -> Path:
    """A path from a recipe, with `~` and environment variables filled in."""
    return Path(os.path.expanduser(os.path.expandvars(path)))


def images_of(number: int) -> str:
    """`1,234 images`."""
    return f"{number:,} image{'s' * (number != 1)}"


def no_image_of(classes: list[str]) -> str:
    """Names classes without images."""
    return f"no image of class{'es' * (len(classes) > 1)} {listed(classes)}"


def printable(name: str) -> str:
    """A file name that can be written as UTF-8; bytes that are not become `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
