"""A run as one YAML file: the Configs of all components, composed and validated."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, field_validator, model_validator

from etpp_ssl.config import Config, UserError, as_pair, legal_size, may_change
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.constant import ConstantConfig
from etpp_ssl.curriculum.efficienttrain import EfficientTrainConfig
from etpp_ssl.data.augmentation import AugmentConfig
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.indexed import AnyIndexedData
from etpp_ssl.data.sources.splits import open_split
from etpp_ssl.data.streams.huggingface import HuggingFaceConfig
from etpp_ssl.data.streams.mix import MixConfig
from etpp_ssl.data.streams.webdataset import WebDatasetConfig
from etpp_ssl.data.training import TrainingImages, open_training
from etpp_ssl.data.views import Normalise, TrainView
from etpp_ssl.evaluation.attentive import AttentiveConfig
from etpp_ssl.evaluation.classification import EvaluateConfig
from etpp_ssl.evaluation.knn import KnnConfig
from etpp_ssl.evaluation.linear import LinearConfig
from etpp_ssl.evaluation.linear_cached import LinearCachedConfig
from etpp_ssl.evaluation.reconstruction import ReconstructionConfig
from etpp_ssl.files import write_text
from etpp_ssl.model.classifier import Classifier, ClassifierConfig
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import Masker
from etpp_ssl.optim.classifier import ClassifierOptimConfig
from etpp_ssl.optim.schedule import OptimConfig
from etpp_ssl.targets.base import Objective
from etpp_ssl.targets.combined import CombinedConfig
from etpp_ssl.targets.hog import HogConfig
from etpp_ssl.targets.pixels import PixelsConfig

# One line here makes a new component known to recipes.
AnyStream = WebDatasetConfig | HuggingFaceConfig | MixConfig
AnyData = AnyIndexedData | AnyStream
AnyCurriculum = EfficientTrainConfig | ConstantConfig
AnyTarget = PixelsConfig | HogConfig | CombinedConfig


UNDECIDED_EPOCHS = 1000.0
"""Stands in for a budget that is not known yet; long, so that rounding to steps shows in no share."""


class CheckpointConfig(Config):
    """When to write a checkpoint, besides the last step and a signal."""

    every_steps: int | None = may_change(None, ge=1)
    every_minutes: float | None = may_change(15.0, gt=0)
    keep: int = may_change(2, ge=1, le=10**6)
    """Newest checkpoints that stay."""
    on_error: Literal["stop", "continue"] = may_change("stop")
    """When the disk does not take a checkpoint, or the rows before it: end the run, or train on and try
    again when the next one is due. At the last step and after a signal the run ends in any case."""


class NonfiniteConfig(Config):
    """What to do at a step whose loss or gradients are not finite, besides writing a dump of it."""

    policy: Literal["stop", "skip", "rewind"] = may_change("stop")
    """End the run; leave the step out; or go back to the newest checkpoint with a lower learning rate."""
    lr_factor: float = may_change(0.5, gt=0, le=1)
    """What each rewind multiplies the learning rate by."""
    max_rewinds: int = may_change(3, ge=1, le=10**6)
    """Rewinds before the run ends after all."""


class TrackerConfig(Config):
    """A tracker of accelerate, beside `metrics.jsonl`."""

    name: Literal[
        "none", "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "trackio"
    ] = "none"
    project: str = "etpp_ssl"


class NoProbeConfig(Config):
    """No evaluation during pre-training."""

    name: Literal["none"] = "none"


AnyProbe = (
    NoProbeConfig | KnnConfig | ReconstructionConfig | LinearConfig | LinearCachedConfig | AttentiveConfig
)


class RunRecipe(Config, ABC):
    """What a run of any task is defined by."""

    task: Literal["pretrain", "finetune"] = "pretrain"
    seed: int = 0
    output: str = may_change(...)
    """The run folder; `~` is expanded."""
    image_size: int | tuple[int, int] = 224
    """Pixels at full resolution, one number or [height, width]."""
    in_chans: int = Field(default=3, ge=1, le=1024)
    init: str | None = None
    """Weights to start from: a run folder, an export's folder, or a .pth or safetensors file of MAE's,
    timm's, DeiT's or Hugging Face's layout; a resumed run reads its own checkpoint instead."""
    deterministic: bool = False
    """Bitwise repeatable on CUDA too, at some cost in speed; the CPU always is."""
    budget_epochs: float | None = Field(default=None, gt=0, le=1e6)
    """Equivalent epochs: the compute of so many epochs at full resolution."""
    budget_hours: float | None = Field(default=None, gt=0, le=1e5)
    """Wall time instead: the run measures its speed and trains as many equivalent epochs as fit. Time
    between a kill and its resume, and steps done again, do not count."""
    baseline_epochs: float | None = may_change(None, gt=0, le=1e9)
    """Constant-resolution epochs that `plan` compares the cost with."""
    batch_size: int = Field(ge=1, le=10**6)
    """Images per optimizer step, over all processes, at full resolution; see `curriculum.large_batch`."""
    micro_batch_size: int | None = may_change(None, ge=1)
    """Images per forward pass and process at most; smaller ones are accumulated to the global batch. In a
    stage with a larger batch, larger in proportion."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    log_every_steps: int = may_change(10, ge=1)
    peer_timeout_minutes: float = may_change(30.0, gt=0)
    """Of several processes: what one waits for another before it ends the run, be it for the first step or
    for one that hangs. One that has ended is noticed at once."""
    data: Annotated[AnyData, Field(discriminator="name")]
    curriculum: Annotated[AnyCurriculum, Field(discriminator="name")] = EfficientTrainConfig()
    checkpoint: CheckpointConfig = may_change(CheckpointConfig())
    nonfinite: NonfiniteConfig = may_change(NonfiniteConfig())
    tracker: TrackerConfig = may_change(TrackerConfig())

    @field_validator("output")
    @classmethod
    def _home(cls, output: str) -> str:
        return os.path.expanduser(output)

    @field_validator("image_size")
    @classmethod
    def _size(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        return legal_size(size)

    @model_validator(mode="after")
    def _one_budget(self) -> RunRecipe:
        if (self.budget_epochs is None) == (self.budget_hours is None):
            raise ValueError(
                f"budget_epochs is {self.budget_epochs} and budget_hours is {self.budget_hours}: give "
                f"exactly one of them, and null for the other"
            )
        return self

    @classmethod
    def with_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A recipe's values as read, with the defaults that the task puts in the place of a component's."""
        return values

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) at full resolution."""
        return as_pair(self.image_size)

    @property
    @abstractmethod
    def bandwidth_multiple(self) -> tuple[int, int]:
        """What divides every bandwidth that the model can be shown, per axis in pixels."""

    def build_curriculum(self, num_images: int) -> Curriculum:
        """The run's stages for a data set of `num_images`.

        Under `budget_hours` only the stages are known: their numbers of steps stand for some budget
        until `Curriculum.laid_out` gives them those of the run's plan.
        """
        return self.curriculum.build(
            image_size=self.size,
            multiple=self.bandwidth_multiple,
            num_images=num_images,
            batch_size=self.batch_size,
            budget_epochs=self.budget_epochs or UNDECIDED_EPOCHS,
        )

    def normaliser(self, device: torch.device) -> Normalise:
        """uint8 images to float32, with the data's statistics."""
        return Normalise(*self.data.statistics(self.in_chans), device)

    def crop_view(self) -> TrainView:
        """The random resized crop and mirror of the training images."""
        return TrainView(
            image_size=self.size,
            crop_scale=self.data.crop_scale,
            flip=self.data.flip,
            lanczos=self.curriculum.crop == "lanczos",
            seed=self.seed,
            decode=self.data.decode,
            interpolation=self.data.interpolation,
            decoder=self.data.decoder,
        )

    def open_split(self, split: str) -> ImageSource:
        """The images of a split; see `etpp_ssl.data.sources.splits.open_split`."""
        return open_split(self.data, split, in_chans=self.in_chans, image_size=self.size, seed=self.seed)

    def open_training(self) -> TrainingImages:
        """The images to train on.

        Raises:
            UserError: if they are not there, or another number than the recipe says.
        """
        self.data.statistics(self.in_chans)
        source = open_training(self.data, in_chans=self.in_chans, image_size=self.size, seed=self.seed)
        expected = self.data.stated_images
        if expected is not None and expected != len(source):
            raise UserError(
                f"data.num_images is {expected}, but the data has {len(source)} images; "
                f"data.num_images=null takes what is there"
            )
        return source

    def save(self, path: Path) -> None:
        """Write the resolved recipe, every default spelled out, as YAML, whole or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


class Recipe(RunRecipe):
    """A pre-training run; the defaults are MAE's for ImageNet."""

    task: Literal["pretrain"] = "pretrain"
    model: ModelConfig = ModelConfig()
    target: Annotated[AnyTarget, Field(discriminator="name")] = PixelsConfig()
    optim: OptimConfig = OptimConfig()
    probe: Annotated[AnyProbe, Field(discriminator="name", json_schema_extra={"may_change": True})] = (
        NoProbeConfig()
    )

    @property
    def patch_size(self) -> tuple[int, int]:
        """(p, q) in pixels."""
        return self.model.resolved_patch(self.size, self.in_chans)

    @property
    def bandwidth_multiple(self) -> tuple[int, int]:
        """Whole patches."""
        return self.patch_size

    def check_curriculum(self, curriculum: Curriculum) -> None:
        """See that every stage has patches to show and patches to predict.

        Raises:
            UserError: if one has not.
        """
        masker = self.build_masker()
        for stage, span in zip(curriculum.stages, curriculum.spans, strict=True):
            masker.check(stage.bandwidth, span)

    def build_objective(self) -> Objective:
        """The reconstruction target and its loss."""
        return self.target.build(patch_size=self.patch_size, in_chans=self.in_chans)

    def build_masker(self) -> Masker:
        """The masks of the run's samples."""
        return self.model.masker(patch_size=self.patch_size, seed=self.seed)

    def build_model(self) -> MaskedAutoencoder:
        """The model, freshly initialised from torch's global generator."""
        return self.model.build(
            image_size=self.size,
            in_chans=self.in_chans,
            num_values=self.build_objective().num_values,
        )


class FinetuneRecipe(RunRecipe):
    """A classifier, fine-tuned or trained from scratch; the defaults are MAE's fine-tuning of ViT-B."""

    task: Literal["finetune"]
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Images per forward pass and process at most; smaller ones are accumulated to the global batch. Here
    it changes the result: images are mixed, and batch norms take their statistics, within one of them."""
    model: ClassifierConfig = ClassifierConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: ClassifierOptimConfig = ClassifierOptimConfig()
    evaluate: EvaluateConfig = may_change(EvaluateConfig())

    @classmethod
    def with_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Classifiers are trained with smaller crops than masked autoencoders, unless the recipe says so."""
        data = values.get("data")
        if isinstance(data, dict):
            return {**values, "data": {"crop_scale": [0.08, 1.0], **data}}
        return values

    @property
    def bandwidth_multiple(self) -> tuple[int, int]:
        """The patches of a ViT, the total stride of other networks."""
        return self.model.multiple(self.size, self.in_chans)

    def check_curriculum(self, curriculum: Curriculum) -> None:
        """See that the model runs at every stage's bandwidth.

        Raises:
            UserError: if it does not.
        """
        self.model.check(
            image_size=self.size,
            in_chans=self.in_chans,
            bandwidths=[stage.bandwidth for stage in curriculum.stages],
        )

    def num_classes(self, classes: list[str] | None) -> int:
        """Classes that the model tells apart: the recipe's own number, or the data's.

        Args:
            classes: the data's, or None where the data is not at hand.

        Raises:
            UserError: if neither says it, or the data has more classes than the recipe.
        """
        asked = self.model.num_classes
        if asked is None and classes is None:
            raise UserError("model.num_classes must be given: the data does not say how many classes it has")
        if asked is not None and classes is not None and len(classes) > asked:
            raise UserError(
                f"model.num_classes is {asked}, but the data has {len(classes)} classes, the last one "
                f"{classes[-1]!r}; give {len(classes)}, or null to take the data's"
            )
        return asked if asked is not None else len(classes or ())

    def build_model(self, num_classes: int) -> Classifier:
        """The model, freshly initialised from torch's global generator."""
        return self.model.build(
            image_size=self.size, in_chans=self.in_chans, num_classes=num_classes, seed=self.seed
        )
