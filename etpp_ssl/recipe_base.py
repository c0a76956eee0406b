"""What the recipes of all tasks have in common: budget, data, curriculum, checkpoints."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import torch
from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from etpp_ssl.config import Config, UserError, as_pair, legal_size, may_change
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.efficienttrain import ConstantConfig, EfficientTrainConfig
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import AnyIndexedData, open_split
from etpp_ssl.data.streams.huggingface import HuggingFaceConfig
from etpp_ssl.data.streams.mix import MixConfig
from etpp_ssl.data.streams.webdataset import WebDatasetConfig
from etpp_ssl.data.training import TrainingImages, open_training
from etpp_ssl.data.views import Normalise, TrainView
from etpp_ssl.files import write_text
from etpp_ssl.messages import shown
from etpp_ssl.recipe_file import STARTED_IN, RecipeText
from etpp_ssl.recipe_yaml import dump_yaml

# One line here makes a new data source or curriculum known to recipes.
AnyStream = WebDatasetConfig | HuggingFaceConfig | MixConfig
AnyData = AnyIndexedData | AnyStream
AnyCurriculum = EfficientTrainConfig | ConstantConfig

UNDECIDED_EPOCHS = 1000.0
"""Stands in for a budget that is not known yet; long, so that rounding to steps shows in no share."""


class CheckpointConfig(Config):
    """When to write a checkpoint, besides at the last step and after a signal."""

    every_steps: int | None = may_change(None, ge=1)
    """Optimizer steps between two checkpoints; None goes by time alone."""
    every_minutes: float | None = may_change(15.0, gt=0)
    """Minutes between two checkpoints; None goes by steps alone."""
    keep: int = may_change(2, ge=1, le=10**6)
    """Number of newest checkpoints that stay."""
    on_error: Literal["stop", "continue"] = may_change("stop")
    """When the disk does not take a checkpoint, or the rows before it: end the run, or train on and try
    again when the next one is due. At the last step and after a signal the run ends in any case."""


class NonfiniteConfig(Config):
    """What to do at a step whose loss or gradients are not finite, besides writing a dump of it."""

    policy: Literal["stop", "skip", "rewind"] = may_change("stop")
    """End the run; leave the step out; or return to the newest checkpoint with a lower learning rate."""
    lr_factor: float = may_change(0.5, gt=0, le=1)
    """Factor on the learning rate at each rewind."""
    max_rewinds: int = may_change(3, ge=1, le=10**6)
    """Rewinds before the run ends after all."""


class TrackerConfig(Config):
    """A tracker of accelerate, beside `metrics.jsonl`."""

    name: Literal[
        "none", "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "trackio"
    ] = "none"
    """accelerate's name of it."""
    project: str = "etpp_ssl"
    """Name of the project that the tracker files the run under."""


Adapt = Callable[[RecipeText, type["RunRecipe"]], RecipeText]
"""Settles in a text what files that it names say."""


class RunRecipe(Config, ABC):
    """What a run of any task is defined by."""

    task: Literal["pretrain", "finetune"] = "pretrain"
    """What the run trains: `pretrain` a masked autoencoder, `finetune` a classifier."""
    seed: int = 0
    """Key of every random draw of the run: order, crops, masks, initial weights."""
    output: str = may_change(...)
    """The run folder; `~` is expanded."""
    image_size: int | tuple[int, int] = 224
    """Pixels at full resolution, one number or [height, width]."""
    in_chans: int = Field(default=3, ge=1, le=1024)
    """Channels of the images."""
    init: str | None = None
    """Weights to start from: a run folder, an export's folder, or a .pth or safetensors file or folder of
    MAE, timm, DeiT, DINO, DINOv2, DINOv3, Pixio, CLIP, SigLIP or transformers; a resumed run reads its own
    checkpoint instead. A recipe without `model.name` takes the network from them. A classifier's recipe
    takes over the network of a run whose weights would not fit its own."""
    init_licence: str | None = may_change(None)
    """What is to be said of the licence of `init`; the run writes it, and model cards repeat it."""
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
    """Of the forward and backward pass; weights and optimizer stay in float32. `fp16` needs a GPU."""
    log_every_steps: int = may_change(10, ge=1)
    """Optimizer steps between two rows of `metrics.jsonl`."""
    peer_timeout_minutes: float = may_change(30.0, gt=0)
    """How long one of several processes waits for another one, at its first step or at one that hangs, before
    it ends the run. A process that has ended is noticed at once."""
    data: Annotated[AnyData, Field(discriminator="name")]
    """Where the images come from."""
    curriculum: Annotated[AnyCurriculum, Field(discriminator="name")] = EfficientTrainConfig()
    """How much of the spectrum is shown when."""
    checkpoint: CheckpointConfig = may_change(CheckpointConfig())
    """When checkpoints are written."""
    nonfinite: NonfiniteConfig = may_change(NonfiniteConfig())
    """What happens at a step that is not finite."""
    tracker: TrackerConfig = may_change(TrackerConfig())
    """Where metrics go besides the run folder."""

    _notes: tuple[str, ...] = PrivateAttr(default=())

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
    def load(cls, source: str | Path, overrides: Sequence[str] = (), adapt: Adapt | None = None) -> Self:
        """Read a recipe.

        Args:
            source: path of a YAML file, folder of a run, or name of a recipe that comes with the package. A
                run folder becomes the output: it may have been moved.
            overrides: `section.key=value` each, as on the command line.
            adapt: changes the text first, such as `etpp_ssl.weights.from_init.with_network_of_init`.

        Raises:
            UserError: naming the key, its value and what would be valid, or for a recipe of another task.
        """
        text = RecipeText.read(source, overrides)
        return cls._of(text if adapt is None else adapt(text, cls))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), title: str = "recipe") -> Self:
        """A recipe from YAML text; see `load`."""
        return cls._of(RecipeText.of(text, overrides, title))

    @classmethod
    def _of(cls, text: RecipeText) -> Self:
        task, (own, *_) = task_of(text), _tasks(cls)
        if task != own:
            raise UserError(
                f"{text.title} is of task {task} (for etpp {task}), but this takes recipes and runs of task "
                f"{own}"
            )
        return cls.of_text(text)

    @classmethod
    def of_text(cls, text: RecipeText) -> Self:
        """The recipe that a text of this task states."""
        text = cls.adapted(text)
        recipe = text.validated(cls, cls.with_defaults)
        recipe._notes = text.notes
        return recipe

    @classmethod
    def adapted(cls, text: RecipeText) -> RecipeText:
        """The text with what another run settles for it."""
        return text

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan or a start should say of how the recipe's values came about."""
        return self._notes

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

    def for_images(self, num_images: int) -> Self:
        """The recipe with what follows from the number of its training images settled."""
        return self

    def normaliser(self, device: torch.device) -> Normalise:
        """Images as views have them to float32, with the data's range and statistics."""
        statistics = self.data.statistics(self.in_chans)
        return Normalise(*statistics, device, self.data.reading(self.in_chans))

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
            deep=self.data.range is not None,
            num_channels=self.data.channel_sampling,
        )

    def open_split(self, split: str) -> ImageSource:
        """The images of a split; see `etpp_ssl.data.sources.splits.open_split`."""
        return open_split(self.data, split, in_chans=self.in_chans, image_size=self.size, seed=self.seed)

    def open_training(self) -> TrainingImages:
        """The images to train on.

        Raises:
            NotAtHand: if they are not there.
            UserError: if they cannot be used.
        """
        self.data.reading(self.in_chans)
        return open_training(self.data, in_chans=self.in_chans, image_size=self.size, seed=self.seed)

    def compare_count(self, found: int) -> str:
        """A sentence where `data.num_images` says another number than that of the images found, or "".

        Raises:
            UserError: in its place, with `data.strict`.
        """
        expected = self.data.stated_images
        if expected is None or expected == found:
            return ""
        if self.data.strict:
            raise UserError(
                f"data.num_images is {expected}, but the data has {found} images, and data.strict is true; "
                f"data.strict=false takes what is there"
            )
        return f"data.num_images says {expected:,}, and {found:,} were found: those are used"

    def counted(self, images: TrainingImages) -> Self:
        """The recipe with what is counted in the training images and has to be recorded with the run."""
        return self

    def save(self, path: Path) -> None:
        """Write the resolved recipe, every default spelled out, as YAML, whole or not at all.

        The working folder is written with it: relative paths of data are looked for there again.

        Raises:
            UserError: if it cannot be written.
        """
        write_text(path, dump_yaml({**self.model_dump(mode="json"), STARTED_IN: os.getcwd()}))


def task_of(text: RecipeText) -> str:
    """The task that a recipe states; without one it is the first.

    Raises:
        UserError: for one that is not known.
    """
    known = _tasks(RunRecipe)
    task = text.task(default=known[0])
    if task not in known:
        raise UserError(f"{text.title}: task is {shown(task)}; valid are {', '.join(known)}")
    return str(task)


def _tasks(kind: type[BaseModel]) -> tuple[str, ...]:
    return get_args(kind.model_fields["task"].annotation)
