"""Batches on the device, with the time spent waiting for them, unreadable images, and a stream's place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset

from etpp_ssl.config import UserError
from etpp_ssl.data.loader import BadImage, Batch, load_batches
from etpp_ssl.data.replay import Replay
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.data.streams.loader import StreamPlace
from etpp_ssl.run_state import TrainState
from etpp_ssl.train.log import Progress


def place_in_stream(state: TrainState, rank: int, num_workers: int) -> StreamPlace:
    """Where a process stands."""
    values = state.streams[rank] if state.streams else None
    return StreamPlace.beginning(num_workers) if values is None else StreamPlace.from_json(values)


def follow_stream(
    state: TrainState, accelerator: Accelerator, num_workers: int, micro_batch_size: int | None
) -> Callable[[Batch], None]:
    """What is told of each batch that is trained on, and keeps the process's place in `state`."""
    place = place_in_stream(state, accelerator.process_index, num_workers)

    def take(batch: Batch) -> None:
        nonlocal place
        if batch.cursor is None:
            return
        place = place.after(batch)
        entry: dict[str, Any] = {**place.to_json(), "micro_batch_size": micro_batch_size}
        others = state.streams or [None] * accelerator.num_processes
        rank = accelerator.process_index
        state.streams = [*others[:rank], entry, *others[rank + 1 :]]

    return take


def gather_streams(accelerator: Accelerator, state: TrainState) -> None:
    """Bring together where the processes stand; every process must call it."""
    own = state.streams[accelerator.process_index] if state.streams else None
    places = gather_object([own]) if accelerator.num_processes > 1 else [own]
    state.streams = places if any(place is not None for place in places) else []


class TrainingBatches:
    """This process's micro-batches, step after step.

    Args:
        builder: builds batches.
        requests: all micro-batches to load.
        accelerator: knows the device.
        num_workers, prefetch, stall_seconds: see `load_batches`.
        replay: turns the loaded micro-batches into those to train on; None trains on them as they are. A
            buffer that has to be read again is read here, before the first step.
        taken: told of each micro-batch that a step takes.
        clock: what waiting is measured by, in seconds.
    """

    def __init__(
        self,
        builder: Dataset[Batch],
        requests: Iterable[BatchRequest],
        accelerator: Accelerator,
        *,
        num_workers: int,
        prefetch: int,
        stall_seconds: float | None = None,
        replay: Replay | None = None,
        taken: Callable[[Batch], None] = lambda batch: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loaded = load_batches(
            builder,
            requests,
            num_workers=num_workers,
            prefetch=prefetch,
            pin_memory=accelerator.device.type == "cuda",
            stall_seconds=stall_seconds,
        )
        self._batches: Iterator[Batch] = self._loaded
        if replay is not None:
            replay.refill(self._loaded)
            self._batches = replay.batches(self._loaded)
        self._device = accelerator.device
        on_gpu = self._device.type == "cuda"
        self._copies = torch.cuda.Stream(self._device) if on_gpu else None
        self._taken = taken
        self._clock = clock
        self.wait_seconds = 0.0
        """Time that the current step has waited for data."""
        self.kept: dict[int, list[Batch]] = {}
        """Micro-batches of the step in work, as far as they have come, and of the one before it: on the host,
        those that were trained on. Twice a step's images of this process stay in memory for it, pinned where
        the batches go to a GPU; never in shared memory."""

    def step(self) -> Iterator[Batch]:
        """The micro-batches of the next step, on the device."""
        self.wait_seconds = 0.0
        last = False
        while not last:
            start = self._clock()
            batch = next(self._batches).own_memory()
            self.wait_seconds += self._clock() - start
            last = batch.request.last
            self._keep(batch)
            self._taken(batch)
            yield self._on_device(batch)

    def _on_device(self, batch: Batch) -> Batch:
        if self._copies is None:
            return batch.to(self._device)
        # The host is up to a step ahead: on a stream of its own the copy runs beside the step in work.
        with torch.cuda.stream(self._copies):
            batch = batch.to(self._device)
        training = torch.cuda.current_stream(self._device)
        training.wait_stream(self._copies)
        for tensor in (batch.images, batch.labels, batch.sample_ids):
            # Its memory is the other stream's, which may not use it again before this one is done with it.
            tensor.record_stream(training)
        return batch

    def _keep(self, batch: Batch) -> None:
        self.kept.setdefault(batch.request.step, []).append(batch)
        for step in sorted(self.kept)[:-2]:
            del self.kept[step]

    def close(self) -> None:
        """End the data workers; what they have prepared is lost."""
        self._loaded.close()


class BadImages:
    """Counts unreadable images, names each once, and ends the run when there are too many.

    Args:
        state: where they are remembered.
        num_images: N.
        max_share: of N.
    """

    def __init__(self, state: TrainState, num_images: int, max_share: float, progress: Progress) -> None:
        self.known = state.bad_images
        self.num_images = num_images
        self.max_share = max_share
        self.progress = progress
        self._told_of_gaps = False

    def note(self, batch: Batch) -> None:
        """Take the bad images of a batch.

        Raises:
            UserError: if more than the allowed share of the data set is unreadable.
        """
        for image in batch.bad:
            if image.without_data:
                self._tell_once(image)
            elif image.index not in self.known:
                self.known[image.index] = image.name
                self.progress.say(
                    f"unreadable image {image.name!r}: {image.reason}; another one takes its place"
                )
                self._check(image.reason)

    def share(self, num_processes: int, gather: Callable[[Any], Any] = gather_object) -> None:
        """Bring together what the processes have met; every process must call it.

        Args:
            num_processes: of the run.
            gather: brings the processes' lists together, in their order.
        """
        if num_processes > 1:
            for process, known in enumerate(gather([dict(self.known)])):
                for index in known.keys() - self.known.keys():
                    self.known[index] = known[index]
                    self.progress.say(
                        f"unreadable image {known[index]!r}, met by process {process}; another one "
                        f"takes its place"
                    )
            self._check("see the messages above")

    def _tell_once(self, image: BadImage) -> None:
        if not self._told_of_gaps:
            self._told_of_gaps = True
            self.progress.say(
                f"image {image.name!r} shows too little data ({image.reason}): another one takes its place; "
                f"such images are counted"
            )

    def _check(self, reason: str) -> None:
        if len(self.known) > self.max_share * self.num_images:
            raise UserError(
                f"{len(self.known)} of {self.num_images} images are unreadable, more than data.max_bad_share "
                f"{self.max_share:g} allows; the last one is {list(self.known.values())[-1]!r} ({reason})"
            )


class ImageCounts:
    """Counts images with values outside `data.range`, and those that others replace for lack of data.

    Args:
        state: where they are remembered.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._outside = self._without_data = 0

    def note(self, batch: Batch) -> None:
        """Take those of a batch."""
        self._outside += batch.num_outside
        self._without_data += sum(image.without_data for image in batch.bad)

    def share(self, num_processes: int, gather: Callable[[Any], Any] = gather_object) -> None:
        """Bring together what the processes have counted; every process must call it."""
        own = [(self._outside, self._without_data)]
        for outside, without_data in gather(own) if num_processes > 1 else own:
            self._state.num_outside += outside
            self._state.num_without_data += without_data
        self._outside = self._without_data = 0
