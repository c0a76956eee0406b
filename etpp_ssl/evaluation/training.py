"""What the probes that train a head share: labelled images, keyed steps, and the frozen encoder's batches.

The state of a probe that takes hours: one file, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.data.loader import Batch, BatchBuilder, batch_loader, batches
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import Subset, keyed_indices
from etpp_ssl.data.views import View
from etpp_ssl.evaluation.base import ProbeContext
from etpp_ssl.evaluation.features import evaluation_batches, readable_rows
from etpp_ssl.evaluation.labelled import LabelledImages
from etpp_ssl.files import replaced_file


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


def open_labelled(
    context: ProbeContext, probe: str, num_train: int | None, num_eval: int | None
) -> LabelledImages:
    """Open both splits, or a keyed draw of each; see `LabelledImages.open`."""
    images = LabelledImages.open(context, probe)
    return LabelledImages(
        _drawn(images.train, num_train, context.seed, "knn-train"),
        _drawn(images.evaluation, num_eval, context.seed, "knn-eval"),
        images.num_classes,
    )


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
    loader = batch_loader(
        BatchBuilder(train, view, order),
        requests,
        num_workers=context.num_workers,
        prefetch=2,
        pin_memory=accelerator.device.type == "cuda",
        stall_seconds=context.stall_seconds,
    )
    for batch in batches(loader):
        yield batch.to(accelerator.device)


def evaluated(
    context: ProbeContext,
    source: ImageSource,
    forward: Callable[[Tensor], Tensor],
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(what `forward` makes of normalised images, their labels) of this process's part of a source.

    Each image comes once, in the evaluation view; unreadable ones are left out.
    """
    for batch in evaluation_batches(
        source,
        list(range(len(source))),
        context.view,
        context.accelerator,
        batch_size=batch_size,
        num_workers=context.num_workers,
        stall_seconds=context.stall_seconds,
    ):
        rows = readable_rows(batch)
        if len(rows):
            yield frozen(context, forward, batch.images[rows]), batch.labels[rows]


def frozen(context: ProbeContext, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`forward` of uint8 images without gradients, in bf16 where the run is; float32 comes back."""
    accelerator = context.accelerator
    half = accelerator.mixed_precision == "bf16"
    with torch.no_grad(), torch.autocast(accelerator.device.type, dtype=torch.bfloat16, enabled=half):
        return forward(context.normalise(images)).float()


def _drawn(source: ImageSource, count: int | None, seed: int, purpose: str) -> ImageSource:
    if count is None or count >= len(source):
        return source
    # The names of kNN's draws, which was the first probe: the same images for all of them.
    return Subset(source, keyed_indices(len(source), count, seed, purpose))


class ProbeState:
    """Head, optimizer and step of a probe, so that it goes on bitwise where it was interrupted.

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
        """Put the file's tensors, if there is one, into head and optimizer; returns its step, or 0.

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
                save_file(self._tensors(), aside, metadata={"step": str(step)})

    def remove(self) -> None:
        """The probe is done."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{slot}": tensor for slot, tensor in slots.items()}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def state_key(encoder: nn.Module, **protocol: Any) -> str:
    """What a state belongs to, as 12 hexadecimal digits: the encoder's tensors, and all that is named.

    Args:
        encoder: every tensor of its state dict counts, to the last bit.
        protocol: what JSON can hold.
    """
    digest = hashlib.blake2b(json.dumps(protocol, sort_keys=True).encode(), digest_size=6)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
