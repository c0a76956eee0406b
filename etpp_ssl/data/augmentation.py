"""What supervised training does to its images and labels, as settings.

The order of a sample: random resized crop and mirror (`TrainView`), RandAugment, with `lanczos` the
resize to the bandwidth, all in a data worker; normalisation, the low-frequency crop, random erasing and
mixing, on the device.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from etpp_ssl.config import Config
from etpp_ssl.data.augment import TrainView
from etpp_ssl.data.erasing import RandomErasing
from etpp_ssl.data.images import Picture
from etpp_ssl.data.mixup import Mixup
from etpp_ssl.data.rand_augment import RandAugment, rand_augment_sections


@dataclass(frozen=True)
class FinetuneView:
    """`TrainView` with RandAugment between its two halves, a function of (seed, position, progress).

    With `decode: reduced` the operations see the picture at the stage's intermediate size. Those that
    count pixels (sharpness, blur) then act on coarser ones than at full size.
    """

    base: TrainView
    rand_augment: RandAugment | None

    def __call__(self, image: Picture, position: int, bandwidth: tuple[int, int], progress: float) -> Tensor:
        view = self.base.cropped(image, position, bandwidth)
        if self.rand_augment is not None:
            view = self.rand_augment(view, position, progress)
        return self.base.shown(view, bandwidth)


class AugmentConfig(Config):
    """Augmentation and regularisation of labelled images; the defaults are MAE's for fine-tuning."""

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

    def build_view(self, base: TrainView, mean: tuple[float, ...]) -> FinetuneView:
        """The training view.

        Args:
            base: crop, mirror and resize; its seed is that of RandAugment, too.
            mean: the data's, of values in [0, 1], one per channel.

        Raises:
            UserError: if RandAugment cannot work on that many channels.
        """
        if self.rand_augment is None:
            return FinetuneView(base, None)
        return FinetuneView(
            base,
            RandAugment(
                self.rand_augment,
                ramp=self.ramp,
                mean=mean,
                image_size=base.image_size,
                interpolation=base.interpolation,
                seed=base.seed,
            ),
        )

    def build_erasing(self, seed: int) -> RandomErasing:
        """Random erasing, for normalised images at the stage's bandwidth."""
        return RandomErasing(self.erasing, seed)

    def build_mixup(self, num_classes: int, seed: int) -> Mixup:
        """Mixup, CutMix and label smoothing."""
        return Mixup(self.mixup, self.cutmix, self.smoothing, num_classes, seed)
