"""The replay buffer of EfficientTrain++: each loaded image is trained on several times.

With a `times` of 4, a step loads a mini-batch of a quarter of its images. The mini-batch enters the buffer
and the oldest one leaves. Then it trains together with three mini-batches' worth of sub-batches, drawn from
the buffer with replacement. Each process has its own buffer, so the images drawn depend on the number of
processes. A stage starts with an empty buffer, as its images have another size.

The buffer keeps the loader's uint8 views, which were drawn at the progress of the step that loaded them; so
are those of a buffer that is read again. What the device does to an image (low-frequency crop, mask, mixup)
comes after the draw, anew each time. Where the device crops, the buffer therefore keeps pictures of the
intermediate size: at 96 of 224 pixels 1.5 times what float16 crops would take, which would have to come back
from the device, and 2.7 times with `data.decode: full`. Where the workers crop (`lanczos`), it is half.

Legend: C channels, H, W pixels, R rows of the buffer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from etpp_ssl.data.loader import BadImage, Batch
from etpp_ssl.data.sampler import BatchRequest, StepPlan, micro_batch_of, process_part
from etpp_ssl.data.views import has_gaps
from etpp_ssl.randomness import keyed_torch

SUB_BATCHES = 32
"""Sub-batches of a mini-batch in the paper; here at least so many, or single images."""


class ReplayPlan(StepPlan, Protocol):
    """The part of a curriculum's stage that replay needs to know."""

    @property
    def first_step(self) -> int: ...
    @property
    def slots(self) -> range: ...
    @property
    def buffer_steps(self) -> int: ...
    @property
    def oldest_step(self) -> int: ...


class Ring:
    """The newest images of a process, in memory that is allocated once.

    Args:
        num_rows: R, images that are kept.
        image: any of them, (C, H, W).
    """

    def __init__(self, num_rows: int, image: Tensor) -> None:
        self._images = torch.empty(num_rows, *image.shape, dtype=image.dtype)
        self._labels = torch.empty(num_rows, dtype=torch.int64)
        self._samples = torch.empty(num_rows, dtype=torch.int64)
        self._indices = torch.empty(num_rows, dtype=torch.int64)
        self._num_added = 0

    def __len__(self) -> int:
        return min(self._num_added, len(self._images))

    def add(self, batch: Batch) -> None:
        """Take a batch in; its first image is the oldest of it."""
        rows = (self._num_added + torch.arange(len(batch.images))) % len(self._images)
        self._images[rows] = batch.images
        self._labels[rows] = batch.labels
        self._samples[rows] = torch.tensor(batch.request.sample_ids)
        self._indices[rows] = torch.tensor(batch.request.indices)
        self._num_added += len(rows)

    def take(self, places: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Copies of images by age.

        Args:
            places: int64 (B,), 0 for the oldest image that is kept.

        Returns:
            images, (B, C, H, W); labels, int64 (B,); the samples' numbers in the run and in the
            data set, B each.
        """
        rows = (self._num_added - len(self) + places) % len(self._images)
        samples, indices = self._samples[rows].tolist(), self._indices[rows].tolist()
        # index_select copies whole images, several times as fast as indexing here.
        return self._images.index_select(0, rows), self._labels[rows], samples, indices


class Replay:
    """Turns the micro-batches that one process loads into those that it trains on.

    In a stage without replay only `Batch.sample_ids` change: they count the images that the run trains on, so
    that a replayed image gets a new number, hence a new mask, each time. A batch's request still names the
    samples and the images as they were loaded.

    Args:
        step_plan: from an optimizer step to its plan, pure.
        start: the first step to train; a buffer that it finds filled is read again first.
        seed: the run's seed.
        say: is told how much is read again, and how long it took.
        rank, num_processes: which part of every step is this process's.
        micro_batch_size, batch_size: images per forward pass; see `RequestSampler`.
        pin_memory: whether the batches go to a GPU.
    """

    def __init__(
        self,
        step_plan: Callable[[int], ReplayPlan],
        start: int,
        *,
        seed: int,
        say: Callable[[str], None],
        rank: int = 0,
        num_processes: int = 1,
        micro_batch_size: int | None = None,
        batch_size: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.step_plan = step_plan
        self.start = start
        self.seed = seed
        self.say = say
        self.rank = rank
        self.num_processes = num_processes
        self.micro_batch_size = micro_batch_size
        self.batch_size = batch_size
        self.pin_memory = pin_memory
        self._ring: Ring | None = None
        self._stage_start = -1
        self._bad: tuple[BadImage, ...] = ()
        self._num_outside = 0

    @property
    def first_read(self) -> int:
        """The step from which on the loader must read, to fill the buffer that `start` finds."""
        return self.step_plan(self.start).oldest_step

    def refill(self, fresh: Iterator[Batch]) -> None:
        """Read what the buffer held before `start`; nothing to do at the beginning of a stage.

        Args:
            fresh: the process's micro-batches from `first_read` on.
        """
        steps = range(self.first_read, self.start)
        if not steps:
            return
        count = sum(len(self._part(self.step_plan(step).samples)) for step in steps)
        self.say(
            f"replay: reading the last {len(steps)} mini-batches ({count:,} images per process) once more"
        )
        begin = time.perf_counter()
        for batch in fresh:
            self._add(batch)
            if batch.request.last and batch.request.step == steps[-1]:
                break
        # Counted when they were first read.
        self._num_outside = 0
        self._bad = tuple(image for image in self._bad if not image.without_data)
        self.say(f"replay: buffer refilled in {time.perf_counter() - begin:.0f} s")

    def batches(self, fresh: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches to train on.

        Args:
            fresh: the process's micro-batches from `start` on.
        """
        for batch in fresh:
            plan = self.step_plan(batch.request.step)
            if plan.buffer_steps == 0:
                self._ring = None
                yield self._pinned(batch.renumbered(plan.slots.start - plan.samples.start))
                continue
            self._add(batch)
            if batch.request.last:
                yield from self._step(batch.request.step, plan)

    def _add(self, batch: Batch) -> None:
        plan = self.step_plan(batch.request.step)
        if self._ring is None or plan.first_step != self._stage_start:
            self._ring = None  # Its memory is free before more is allocated.
            num_rows = plan.buffer_steps * len(self._part(plan.samples))
            self._ring = Ring(num_rows, batch.images[0])
            self._stage_start = plan.first_step
        self._ring.add(batch)
        self._bad += batch.bad
        self._num_outside += batch.num_outside

    def _step(self, step: int, plan: ReplayPlan) -> Iterator[Batch]:
        assert self._ring is not None
        slots, num_fresh = self._part(plan.slots), len(self._part(plan.samples))
        num_kept = len(self._ring)
        drawn = draw_places(
            num_kept, num_fresh, len(slots) - num_fresh, seed=self.seed, step=step, rank=self.rank
        )
        places = torch.cat([torch.arange(num_kept - num_fresh, num_kept), drawn])
        size = micro_batch_of(len(plan.slots), self.micro_batch_size, self.batch_size)
        for first in range(0, len(slots), size):
            images, labels, samples, indices = self._ring.take(places[first : first + size])
            batch = Batch(
                images=images,
                labels=labels,
                sample_ids=torch.tensor(slots[first : first + size], dtype=torch.int64),
                first_sample_id=slots[first],
                request=BatchRequest(
                    step=step,
                    sample_ids=tuple(samples),
                    indices=tuple(indices),
                    bandwidth=plan.bandwidth,
                    progress=plan.progress,
                    weight=len(images) / len(plan.slots),
                    last=first + size >= len(slots),
                ),
                bad=self._bad,
                num_outside=self._num_outside,
                has_gaps=has_gaps(images),
            )
            self._bad, self._num_outside = (), 0
            yield self._pinned(batch)

    def _pinned(self, batch: Batch) -> Batch:
        # Tensors that are pinned already stay as they are.
        return batch.pin_memory() if self.pin_memory else batch

    def _part(self, numbers: range) -> range:
        return process_part(numbers, self.rank, self.num_processes)


def draw_places(
    num_kept: int, mini_batch_size: int, num_drawn: int, *, seed: int, step: int, rank: int
) -> Tensor:
    """Which images of the buffer a step replays: whole sub-batches, uniform, with replacement.

    Args:
        num_kept: images in the buffer, whole mini-batches.
        mini_batch_size: images that the process loads per step.
        num_drawn: images to draw, whole mini-batches.
        seed, step, rank: the key.

    Returns:
        int64 (num_drawn,), places by age as `Ring.take` counts them.
    """
    size = sub_batch_size(mini_batch_size)
    generator = keyed_torch(seed, "replay", step, rank)
    starts = size * torch.randint(num_kept // size, (num_drawn // size,), generator=generator)
    return (starts[:, None] + torch.arange(size)).flatten()


def sub_batch_size(mini_batch_size: int) -> int:
    """Images that are drawn together: the largest divisor of the mini-batch that is at most 1/32 of it.

    One image where there is none: a mini-batch below 64 images, or of a prime number of them.
    """
    largest = max(1, mini_batch_size // SUB_BATCHES)
    return next(size for size in range(largest, 0, -1) if mini_batch_size % size == 0)


def buffer_bytes(num_rows: int, image_shape: tuple[int, ...], value_bytes: int = 1) -> int:
    """Memory of the images in a buffer of `num_rows`, each of `image_shape` (C, H, W)."""
    return num_rows * math.prod(image_shape) * value_bytes
