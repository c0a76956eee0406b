"""What training needs to know of a task, and the forward and backward pass that all of them share.

Whoever needs a training step calls a task: the loop, the measuring of a budget in hours, the FLOP count of
the plan and the reproduction of a bad step. Nobody writes the step out a second time.

Legend: B batch, C channels, h, w pixels at the bandwidth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from etpp_ssl.curriculum.cost import Cost
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.views import View
from etpp_ssl.evaluation.collapse import Sign

Inputs = dict[str, Tensor]
"""What model and losses are given: `images`, float32 (B, C, h, w) at the bandwidth, and other tensors with
one row per sample."""


class Shown(Protocol):
    """What of a stage, or of a batch's own request, shapes the inputs."""

    @property
    def bandwidth(self) -> tuple[int, int]:
        """(height, width) in pixels."""

    @property
    def progress(self) -> float:
        """Share of the run's compute that is spent, in [0, 1]."""


class Measured(NamedTuple):
    """What an evaluation finds."""

    numbers: Mapping[str, float | None]
    sign: Sign | None = None
    """That a classifier has collapsed."""


@dataclass(frozen=True)
class Evaluation:
    """How a trained model is measured, and when."""

    name: str
    """One word that names its seconds in `metrics.jsonl`."""
    how: str
    """What it does, for people."""
    run: Callable[[Any], Measured]
    """Of a model, whole and bare, the moving average where a run keeps one."""
    images: ImageSource
    """What it measures on."""
    data: dict[str, Any]
    """The same as a record; see `etpp_ssl.evaluation.measured_on`."""
    every_steps: int | None
    """Optimizer steps between two evaluations, beside the one after the last step."""


class Task(ABC):
    """Masked autoencoding, classification: what is special about each of them.

    `losses(forward(model, inputs), inputs)` is what the loop minimises.
    """

    model: nn.Module
    """The bare model: neither wrapped for several processes nor for a precision."""
    net: nn.Module
    """The part whose parameters the optimizer groups by name: timm's model inside a classifier."""
    view: View
    """The training view, which the data workers make."""
    kernels: str
    """What a checkpoint remembers of the kernels chosen, because others change the last bits."""
    num_classes: int | None = None
    """Of a classifier."""
    evaluation: Evaluation | None = None
    """How the model is evaluated after the last step; set by whoever opens a run."""

    @abstractmethod
    def inputs(self, batch: Batch, stage: Shown) -> Inputs:
        """Normalise, crop to the bandwidth, then mask or mix.

        Args:
            batch: a micro-batch on the model's device.
            stage: the stage of the step, or the batch's own request.
        """

    @abstractmethod
    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The output, (B, ...), of the bare model or of what wraps it."""

    @abstractmethod
    def losses(self, output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """`loss` first, which is minimised, then its parts where it has some: float32 scalars."""

    @abstractmethod
    def target(self, inputs: Inputs) -> Tensor:
        """What the output is compared with, (B, ...)."""

    @abstractmethod
    def blank_inputs(self, stage: Shown) -> Inputs:
        """Inputs of one image on the meta device, for counting operations."""

    @abstractmethod
    def load_init(self, init: str, say: Callable[[str], None]) -> str | None:
        """Start from other weights; see `etpp_ssl.weights.loading`.

        Returns:
            What is to be said of their licence.

        Raises:
            UserError: if they cannot be read or are of another model.
        """

    @abstractmethod
    def describe(self) -> str:
        """The model in one line of `etpp plan`."""

    @abstractmethod
    def plan_rows(self, stage: Shown, cost: Cost) -> dict[str, str]:
        """What `etpp plan` prints of a stage beside what all tasks have, by the title of its column."""

    def plan_notes(self, full: Cost) -> list[str]:
        """Sentences below the table of `etpp plan`; `full` is an image's cost at full resolution."""
        return []


def forward_backward(
    task: Task,
    model: nn.Module,
    batch: Batch,
    stage: Shown,
    backward: Callable[[Tensor], None],
    num_processes: int,
) -> dict[str, Tensor]:
    """One micro-batch of a training step: its gradients are added to those that are there.

    Args:
        task: says what is computed.
        model: the task's, as accelerate prepared it.
        batch: on the model's device.
        stage: of the step.
        backward: takes the scaled loss.
        num_processes: of the run.

    Returns:
        The micro-batch's own losses; see `Task.losses`.
    """
    inputs = task.inputs(batch, stage)
    output = task.forward(model, inputs)
    losses = task.losses(output, inputs)
    # DDP averages over the processes; the weights are shares of the global batch.
    backward(losses["loss"] * batch.request.weight * num_processes)
    return losses


def blank_images(in_chans: int, bandwidth: tuple[int, int]) -> Tensor:
    """One image on the meta device, float32 (1, C, h, w)."""
    return torch.zeros(1, in_chans, *bandwidth, device="meta")
