"""Says which image is sample number g of a run: a function of (seed, g) alone.

A run counts its samples 0, 1, 2 ... over all epochs; sample g is image `permutation(seed, g // N)[g % N]`,
or where classes are balanced, entry g % N of what is drawn for epoch g // N. A step's samples are split
over the processes in contiguous parts, and each part into micro-batches, so the global batch is the same for
any number of processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from etpp_ssl.data.uneven import Balance, class_shares
from etpp_ssl.messages import shown_text
from etpp_ssl.randomness import derive_key, keyed_permutation, keyed_words


class StepPlan(Protocol):
    """The part of a curriculum's stage that the data needs to know."""

    @property
    def bandwidth(self) -> tuple[int, int]: ...
    @property
    def progress(self) -> float: ...
    @property
    def samples(self) -> range: ...


class KeyedOrder:
    """The shuffled order of a data set over all epochs.

    Args:
        num_images: N.
        seed: the run's seed.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def index(self, sample_id: int) -> int:
        """The image that is sample number `sample_id` of the run, sample_id >= 0."""
        epoch, place = divmod(sample_id, self.num_images)
        return int(self._order(epoch)[place])

    def indices(self, sample_ids: range) -> list[int]:
        """The images that are these samples, whose numbers ascend one by one."""
        found: list[int] = []
        while sample_ids:
            epoch, place = divmod(sample_ids[0], self.num_images)
            part = self._order(epoch)[place : place + len(sample_ids)]
            found += part.tolist()
            sample_ids = sample_ids[len(part) :]
        return found

    def replacement(self, sample_id: int, attempt: int) -> int:
        """The image that takes the place of an unreadable one: attempt 1, 2, ... of a sample."""
        return derive_key(self.seed, "replacement", sample_id, attempt) % self.num_images

    def _order(self, epoch: int) -> Tensor:
        # A step can straddle two epochs, but the samples' numbers ascend: one permutation at a time is
        # enough.
        if epoch != self._epoch:
            self._permutation = self._draw(epoch)
            self._epoch = epoch
        return self._permutation

    def _draw(self, epoch: int) -> Tensor:
        """The images of an epoch in their order, int32 or int64 (N,)."""
        return keyed_permutation(self.num_images, self.seed, "order", epoch)


class BalancedOrder(KeyedOrder):
    """An order in which classes come in other shares than they have images.

    An epoch keeps its N samples. After any number of epochs a class has had its share of all samples, up to
    one sample, and its images have been drawn equally often, up to once: each class goes through its own
    images in one keyed permutation after another.

    Args:
        labels: each image's class, at least 0.
        seed: the run's seed.
        balance: the shares; see `class_shares`.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, seed: int, balance: Balance) -> None:
        super().__init__(len(labels), seed)
        label = torch.from_numpy(np.array(labels, dtype=np.int64))
        counts = torch.bincount(label).tolist()
        self._members = label.argsort(stable=True).split(counts)
        self._bounds = [0, *accumulate(class_shares(counts, balance))]

    def replacement(self, sample_id: int, attempt: int) -> int:
        """See `KeyedOrder.replacement`; classes are drawn by their shares."""
        place = derive_key(self.seed, "replacement class", sample_id, attempt) % self._bounds[-1]
        members = self._members[bisect_right(self._bounds, place) - 1]
        return int(members[super().replacement(sample_id, attempt) % len(members)])

    def _draw(self, epoch: int) -> Tensor:
        # Rounded where classes meet, so that the numbers of all classes add up to N in every epoch. None is
        # negative: of any share here, N times it is at least 1.
        start, end = (
            [number * self.num_images * bound // self._bounds[-1] for bound in self._bounds]
            for number in (epoch, epoch + 1)
        )
        drawn = [
            self._of_class(label, start[label + 1] - start[label], end[label + 1] - end[label])
            for label in range(len(self._members))
        ]
        images: Tensor = torch.cat(drawn)[super()._draw(epoch)]
        return images

    def _of_class(self, label: int, first: int, last: int) -> Tensor:
        """Entries `first` to `last`, exclusive, of a class's images in one permutation after another."""
        members: Tensor = self._members[label]
        if first == last:
            return members[:0]
        cycles = torch.arange(first // len(members), -(-last // len(members)))
        words = keyed_words(derive_key(self.seed, "balance", label), "cycle", cycles, len(members))
        order = words.argsort(dim=1, stable=True).flatten()
        skipped = int(cycles[0]) * len(members)
        return members[order[first - skipped : last - skipped]]


@dataclass(frozen=True)
class BatchRequest:
    """One micro-batch, for a data worker to build."""

    step: int
    sample_ids: tuple[int, ...]
    """Numbers of the samples in the run."""
    indices: tuple[int, ...]
    """Their images."""
    bandwidth: tuple[int, int]
    progress: float
    """Share of the run's compute spent before the step, in [0, 1); 1 in evaluation."""
    weight: float
    """The micro-batch's share of the step's global batch."""
    last: bool
    """Whether it is this process's last micro-batch of the step."""

    @property
    def place(self) -> str:
        """`step 12`, or in an evaluation `evaluation batch 12`."""
        return f"{'step' if self.progress < 1 else 'evaluation batch'} {self.step}"

    def described(self, name: Callable[[int], str] | None = None) -> str:
        """Its place, the numbers of its samples and, with the function that tells them, its images' names."""
        numbers = f"{self.place}, samples {_first_five(self.sample_ids, str)}"
        if name is None:
            return numbers
        return (
            f"{numbers} ({_first_five(self.indices, lambda index: repr(shown_text(safe_name(name, index))))})"
        )


@dataclass(frozen=True)
class RequestSampler:
    """All micro-batches of one process in the given steps.

    Args:
        order: the order of the images; None for images that have no index of their own.
        step_plan: from an optimizer step to its samples, bandwidth and progress, pure.
        steps: the optimizer steps to serve.
        rank, num_processes: which part of every step is this process's.
        micro_batch_size: images per forward pass at most; None takes the whole part at once.
        batch_size: the step size that `micro_batch_size` is meant for: steps of other sizes, at other
            bandwidths, get micro-batches in proportion. None takes it as it is for all steps.
    """

    order: KeyedOrder | None
    step_plan: Callable[[int], StepPlan]
    steps: range
    rank: int = 0
    num_processes: int = 1
    micro_batch_size: int | None = None
    batch_size: int | None = None

    def __iter__(self) -> Iterator[BatchRequest]:
        for step in self.steps:
            plan = self.step_plan(step)
            samples = plan.samples
            part = process_part(samples, self.rank, self.num_processes)
            size = micro_batch_of(len(samples), self.micro_batch_size, self.batch_size)
            micro_batches = [part[i : i + size] for i in range(0, len(part), size)]
            for number, sample_ids in enumerate(micro_batches):
                yield BatchRequest(
                    step=step,
                    sample_ids=tuple(sample_ids),
                    indices=tuple(sample_ids if self.order is None else self.order.indices(sample_ids)),
                    bandwidth=plan.bandwidth,
                    progress=plan.progress,
                    weight=len(sample_ids) / len(samples),
                    last=number == len(micro_batches) - 1,
                )


def safe_name(name: Callable[[int], str], index: int) -> str:
    """An image's name for a message, or its number where the data set cannot tell the name."""
    try:
        return name(index)
    except Exception:
        # A data set that raises here may be the one whose error the message is about.
        return f"image {index}"


def _first_five(numbers: tuple[int, ...], text: Callable[[int], str]) -> str:
    more = f", and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return ", ".join(map(text, numbers[:5])) + more


def micro_batch_of(num_samples: int, micro_batch_size: int | None, batch_size: int | None) -> int:
    """Images per forward pass at most, in a step of `num_samples`; see `RequestSampler`."""
    if micro_batch_size is None:
        return num_samples
    if batch_size is not None:
        micro_batch_size = max(1, micro_batch_size * num_samples // batch_size)
    return min(micro_batch_size, num_samples)


def process_part(samples: range, rank: int, num_processes: int) -> range:
    """The contiguous part of `samples` that is process `rank`'s; parts differ by one at most."""
    start = len(samples) * rank // num_processes
    end = len(samples) * (rank + 1) // num_processes
    return samples[start:end]
