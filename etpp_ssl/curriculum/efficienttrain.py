"""EfficientTrain++: bandwidth grows as compute is spent (TPAMI 2024, Tables 4 and 5); and the plain run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Unpack

from pydantic import Field, field_validator, model_validator

from etpp_ssl.config import Config, UserError, as_pair, show_size
from etpp_ssl.curriculum.base import (
    Curriculum,
    Portion,
    ReplaySpec,
    RunSizes,
    StageSpec,
    legal_bandwidth,
    stage_batch,
)

TABLES: dict[str, list[tuple[int, float]]] = {
    "general": [(96, 0.2), (160, 0.4), (224, 0.4)],
    "deit": [(96, 0.2), (160, 0.4), (192, 0.2), (224, 0.2)],
    "convnext": [(160, 0.6), (224, 0.4)],
}
"""(bandwidth at 224 px, share of compute) of the published curricula; equal neighbours are merged.
From the public scripts of `LeapLabTHU/EfficientTrain`; the table of the paper's MAE runs is not public."""

TABLE_SIZE = 224

TableName = Literal["general", "deit", "convnext"]
LargeBatch = Literal["off", "tokens"]


class AskedStage(NamedTuple):
    """A stage before rounding."""

    bandwidth: tuple[float, float]
    share: float
    batch_factor: float | None


class EfficientTrainConfig(Config):
    """The curriculum of a recipe: a published table, or stages of one's own."""

    name: Literal["efficienttrain"] = "efficienttrain"
    table: TableName = "general"
    """Published table, scaled to the image size; ignored where `stages` are given."""
    stages: tuple[StageSpec, ...] | None = Field(default=None, min_length=1)
    """Stages of one's own, in order; None takes those of `table`."""
    crop: Literal["fourier", "lanczos"] = "fourier"
    """`fourier`: the definition, on the device. `lanczos`: the published code's approximation, a
    Lanczos resize in the data workers."""
    replay: tuple[ReplaySpec | None, ...] | None = None
    """One for each stage of the published table, null for none. Stages of one's own have it in
    themselves. The paper's (times, buffer) for the general table: (4, 1920), (2, 256) and none for DeiT-S
    and ResNet-50; (2, 1024), none and none for Swin-T and CSWin-T."""
    large_batch: LargeBatch = "off"
    """`tokens`: a stage at a smaller bandwidth gets a larger global batch, by the ratio of full area to
    its own, so that the tokens per device stay about constant: for many processes, whose parts of a
    batch would be too small to keep a device busy early on. The learning rate follows the batch."""

    @field_validator("large_batch", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        # YAML reads `off` as false.
        return "off" if value is False else value

    @model_validator(mode="after")
    def _whole(self) -> EfficientTrainConfig:
        if self.stages is not None:
            total = sum(stage.share for stage in self.stages)
            if abs(total - 1) > 1e-6:
                raise ValueError(f"the shares of stages add up to {total:g}: they must add up to 1")
            if self.replay is not None:
                raise ValueError("replay goes with a published table: give each of stages its own replay")
        elif self.replay is not None and len(self.replay) != len(TABLES[self.table]):
            raise ValueError(
                f"replay has {len(self.replay)} entries, but table {self.table!r} has "
                f"{len(TABLES[self.table])} stages: give one for each, null for none"
            )
        return self

    def build(self, **sizes: Unpack[RunSizes]) -> EfficientTrain:
        """The run's curriculum."""
        return EfficientTrain(
            table=self.table,
            stages=self.stages,
            replay=self.replay,
            large_batch=self.large_batch,
            **sizes,
        )

    def roundings(self, image_size: tuple[int, int], multiple: tuple[int, int]) -> list[str]:
        """One sentence for each bandwidth that had to be rounded to whole patches."""
        sentences = []
        for asked, *_ in asked_stages(self.table, self.stages, image_size):
            used = legal_bandwidth(asked, image_size, multiple)
            if used != asked:
                sentences.append(
                    f"bandwidth {asked[0]:.4g}x{asked[1]:.4g} is rounded to {show_size(used)} "
                    f"(whole patches of {show_size(multiple)})"
                )
        return sentences


class EfficientTrain(Curriculum):
    """Stages of growing bandwidth that own shares of compute.

    Args:
        table: "general", "deit" or "convnext", scaled by image size / 224 on each axis.
        stages: stages of one's own, which take the table's place; the last shows the full image.
        replay: one for each stage of the table, None for none; not with `stages`, which have their own.
        large_batch: "tokens" enlarges the batch of early stages, unless a stage says its own factor.
        image_size: (H, W) or one number for both, pixels.
        multiple: bandwidths are rounded to multiples of this on each axis: the patch size, or the
            total stride of a convolutional net.
        num_images, budget_epochs: see `Curriculum`.
        batch_size: images per optimizer step, over all processes, where the factor is 1.

    Raises:
        UserError: for a bandwidth beyond the image or below two patches per axis, bandwidths that
            shrink, or a last stage that is not the full image.
    """

    def __init__(
        self,
        table: TableName = "general",
        stages: Sequence[StageSpec] | None = None,
        replay: Sequence[ReplaySpec | None] | None = None,
        *,
        large_batch: LargeBatch = "off",
        image_size: int | tuple[int, int] = TABLE_SIZE,
        multiple: int | tuple[int, int] = 16,
        num_images: int,
        batch_size: int,
        budget_epochs: float,
    ) -> None:
        size, step = as_pair(image_size), as_pair(multiple)
        merged: list[Portion] = []
        replays = replay or [None] * len(TABLES[table])
        if stages is not None:
            replays = [stage.replay for stage in stages]
        for (asked, share, factor), own in zip(asked_stages(table, stages, size), replays, strict=True):
            used = legal_bandwidth(asked, size, step)
            if merged and (used[0] < merged[-1].bandwidth[0] or used[1] < merged[-1].bandwidth[1]):
                raise UserError(
                    f"curriculum.stages: bandwidth {show_size(used)} follows "
                    f"{show_size(merged[-1].bandwidth)}, but bandwidths must not shrink"
                )
            if factor is None:
                factor = size[0] * size[1] / (used[0] * used[1]) if large_batch == "tokens" else 1.0
            portion = Portion(used, share, stage_batch(batch_size, factor), own)
            if merged and replace(merged[-1], share=share) == portion:
                portion = replace(portion, share=merged.pop().share + share)
            merged.append(portion)
        if merged[-1].bandwidth != size:
            raise UserError(
                f"curriculum.stages: the last stage shows {show_size(merged[-1].bandwidth)}, "
                f"but a run ends at the full image, {show_size(size)}; curriculum.stages=null takes the "
                f"published table, which is scaled to it"
            )
        super().__init__(merged, image_size=size, num_images=num_images, budget_epochs=budget_epochs)


def asked_stages(
    table: TableName, stages: Sequence[StageSpec] | None, image_size: tuple[int, int]
) -> list[AskedStage]:
    """The stages before rounding, scaled to the image size."""
    if stages is None:
        return [AskedStage(_scaled(b, image_size, TABLE_SIZE), share, None) for b, share in TABLES[table]]
    short = min(image_size)
    asked = []
    for stage in stages:
        if isinstance(stage.bandwidth, int):
            pair = _scaled(stage.bandwidth, image_size, short)
        else:
            pair = (float(stage.bandwidth[0]), float(stage.bandwidth[1]))
        asked.append(AskedStage(pair, stage.share, stage.batch_factor))
    return asked


def _scaled(bandwidth: int, image_size: tuple[int, int], reference: int) -> tuple[float, float]:
    # Multiplied before divided: the full image must come out as itself, not one rounding beyond it.
    return bandwidth * image_size[0] / reference, bandwidth * image_size[1] / reference


class ConstantConfig(Config):
    """Train at full resolution throughout, as MAE does."""

    name: Literal["constant"] = "constant"
    crop: Literal["fourier", "lanczos"] = "fourier"
    """As in `efficienttrain`; at full resolution both show the whole image."""
    replay: ReplaySpec | None = None
    """Repeat loaded images; None loads every image anew."""

    def build(self, **sizes: Unpack[RunSizes]) -> Constant:
        """The run's curriculum."""
        return Constant(replay=self.replay, **sizes)

    def roundings(self, image_size: tuple[int, int], multiple: tuple[int, int]) -> list[str]:
        """Nothing is rounded at full resolution."""
        return []


class Constant(Curriculum):
    """One stage at full resolution; the arguments are those of `EfficientTrain`, `multiple` has no effect."""

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        multiple: int | tuple[int, int] = 1,
        num_images: int,
        batch_size: int,
        budget_epochs: float,
        replay: ReplaySpec | None = None,
    ) -> None:
        size = as_pair(image_size)
        super().__init__(
            [Portion(size, 1.0, batch_size, replay)],
            image_size=size,
            num_images=num_images,
            budget_epochs=budget_epochs,
        )
