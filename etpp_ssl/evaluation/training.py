"""Training a head on a frozen encoder: its settings, its steps, its batches, and its state on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from etpp_ssl.config import UserError, may_change
from etpp_ssl.data.loader import Batch, BatchBuilder
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.views import View
from etpp_ssl.evaluation.base import LabelledConfig, ProbeContext
from etpp_ssl.evaluation.features import readable_rows
from etpp_ssl.files import replaced_file, save_tensors
from etpp_ssl.optim.schedules import Schedule


class HeadConfig(LabelledConfig):
    """Settings of a probe that trains a head."""

    epochs: int = Field(ge=1)
    """Passes over the training images."""
    warmup_epochs: float = Field(ge=0)
    """Epochs over which the learning rate rises linearly from 0; then a cosine to 0."""
    base_lr: float = Field(gt=0)
    """Peak learning rate per 256 images of the batch."""
    batch_size: int = Field(ge=2)
    """Images per step over all processes, at most the training set; what an epoch leaves over is dropped."""
    micro_batch_size: int = may_change(256, ge=1)
    """Images per forward pass of the encoder, and process, at most."""
    weight_decay: float = Field(ge=0)
    """Of the head's weight matrices."""
    crop_scale: tuple[float, float]
    """Area range of the random resized crop of training images."""
    flip: bool = True
    """Mirror half of the training images."""

    @model_validator(mode="after")
    def _ranges(self) -> HeadConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}: use less than the {self.epochs} epochs"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {[low, high]}: use two shares of the area, 0 < low <= high <= 1")
        return self

    def schedule(self, batch_size: int) -> Schedule:
        """The learning rate by the share of steps done, for steps of `batch_size` images."""
        return Schedule(
            peak=self.base_lr * batch_size / 256,
            minimum=0.0,
            warmup_share=self.warmup_epochs / self.epochs,
        )


class ProbeStep(NamedTuple):
    """One step of a head's training; see `StepPlan`."""

    samples: range
    bandwidth: tuple[int, int]
    progress: float


@dataclass(frozen=True)
class EpochSteps:
    """The steps of some epochs, each over a fresh order; what is left of an epoch is not trained on.

    Args:
        num_images: images of an epoch.
        batch_size: images of a step, at most `num_images`.
        epochs: how many.
        image_size: (H, W).
    """

    num_images: int
    batch_size: int
    epochs: int
    image_size: tuple[int, int]

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.num_images // self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps altogether."""
        return self.epochs * self.per_epoch

    def __call__(self, step: int) -> ProbeStep:
        """Step number `step`; sample g is image g mod `num_images` of the order of epoch g / `num_images`."""
        epoch, place = divmod(step, self.per_epoch)
        first = epoch * self.num_images + place * self.batch_size
        return ProbeStep(range(first, first + self.batch_size), self.image_size, step / self.num_steps)


def epoch_steps(context: ProbeContext, num_images: int, batch_size: int, epochs: int) -> EpochSteps:
    """The steps of a head's training; a batch is at most the whole set.

    Raises:
        UserError: if a step has fewer images than there are processes, or than two.
    """
    size = min(batch_size, num_images)
    processes = context.accelerator.num_processes
    if size < max(2, processes):
        raise UserError(
            f"probe.batch_size {batch_size} of {num_images} training images: a step needs at least 2 images, "
            f"and one for each of the {processes} processes"
        )
    return EpochSteps(num_images, size, epochs, context.view.image_size)


def training_batches(
    context: ProbeContext,
    train: ImageSource,
    view: View,
    plan: EpochSteps,
    steps: range,
    micro_batch_size: int,
) -> Iterator[Batch]:
    """This process's micro-batches of the given steps, on its device; `request.last` ends a step.

    Order and views are functions of the seed and the sample's number, for any number of workers.
    """
    accelerator = context.accelerator
    order = KeyedOrder(len(train), context.seed)
    requests = RequestSampler(
        order,
        plan,
        steps,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        micro_batch_size=micro_batch_size,
    )
    return context.load(BatchBuilder(train, view, order), requests, context.num_workers)


def evaluated(
    context: ProbeContext,
    source: ImageSource,
    forward: Callable[[Tensor], Tensor],
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(output of `forward` for normalised images, their labels), batch by batch, of this process's part.

    Each image comes once, in the evaluation view; unreadable ones are left out.
    """
    for batch in context.batches(source, range(len(source)), batch_size):
        rows = readable_rows(batch)
        if len(rows):
            yield frozen(context, forward, batch.images[rows]), batch.labels[rows]


def frozen(context: ProbeContext, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`forward` of uint8 images without gradients, in bf16 where the run is; float32 comes back."""
    accelerator = context.accelerator
    half = accelerator.mixed_precision == "bf16"
    with torch.no_grad(), torch.autocast(accelerator.device.type, dtype=torch.bfloat16, enabled=half):
        return forward(context.normalise(images)).float()


class ProbeState:
    """Head, optimizer and step of a probe that takes hours, so that it resumes bitwise after an interruption.

    They are in one file, which is written whole or not at all.

    Args:
        file: where; None keeps nothing.
        head: the trained part.
        optimizer: its optimizer.
    """

    def __init__(self, file: Path | None, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.file = file
        self.head = head
        self.optimizer = optimizer

    def load(self) -> int:
        """Restore head and optimizer from the file, if there is one; returns its step, or 0.

        Raises:
            UserError: if it is damaged.
        """
        if self.file is None or not self.file.is_file():
            return 0
        try:
            with safe_open(self.file, framework="pt") as file:
                step = int(file.metadata()["step"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"probe state {str(self.file)!r} is damaged ({error}); remove it to start the probe again"
            ) from error
        head: dict[str, Tensor] = {}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "head":
                head[name] = tensor
            else:
                number, _, slot = name.partition(".")
                slots.setdefault(int(number), {})[slot] = tensor
        self.head.load_state_dict(head)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        return step

    def save(self, step: int) -> None:
        """Write the state after `step` steps.

        Raises:
            UserError: if the disk is full or cannot be written to; the older state is intact.
        """
        if self.file is not None:
            with replaced_file(self.file) as aside:
                save_tensors(self._tensors(), aside, {"step": str(step)})

    def remove(self) -> None:
        """Remove the file, once the probe is done."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{slot}": tensor for slot, tensor in slots.items()}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}
