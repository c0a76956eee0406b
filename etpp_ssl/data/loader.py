"""From requests to batches: whole batches are built in the workers, as uint8.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.augment import View
from etpp_ssl.data.images import ImageSource, UnreadableImage
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder
from etpp_ssl.data.splits import check_label

MAX_ATTEMPTS = 100
"""Images tried for one sample before the data set counts as unreadable altogether."""


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """A micro-batch and everything that says where in the run it belongs."""

    images: Tensor
    """uint8 (B, C, H, W): full size; with `decode: reduced` the stage's intermediate size; the stage's
    bandwidth where the worker crops (`lanczos`)."""
    labels: Tensor
    """int64 (B,), -1 without labels."""
    positions: Tensor
    """int64 (B,): the images' numbers in the run, by which masks are drawn: the samples' own as they come
    from the loader, and one for each time that an image is trained on where images are replayed."""
    first_position: int
    """The first of `positions`, which the host knows without asking the device: the key of what is drawn
    once per micro-batch."""
    request: BatchRequest
    bad: tuple[BadImage, ...]
    """Unreadable images that were met and replaced."""
    cursor: dict[str, Any] | None = None
    """Where a stream's lane stands after it; None for images that are addressed by index."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device; copies from pinned memory do not block."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )

    def renumbered(self, offset: int) -> Batch:
        """The same images under numbers that are higher by `offset`."""
        return replace(self, positions=self.positions + offset, first_position=self.first_position + offset)

    def pin_memory(self) -> Batch:
        """Called by torch's loader where there is a GPU."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            positions=self.positions.pin_memory(),
        )


class BatchBuilder(Dataset[Batch]):
    """Builds the batch that a request describes, the same in any process.

    Args:
        source: the images.
        view: the training or the evaluation view.
        order: says which image replaces an unreadable one.
        num_classes: what labels must be below and, if it is given, must not be missing.
    """

    def __init__(
        self, source: ImageSource, view: View, order: KeyedOrder, num_classes: int | None = None
    ) -> None:
        self.source = source
        self.view = view
        self.order = order
        self.num_classes = num_classes

    def __getitem__(self, request: BatchRequest) -> Batch:
        views, labels, bad = [], [], []
        for position, index in zip(request.positions, request.indices, strict=True):
            image, used, broken = self._readable(position, index, request)
            bad.extend(broken)
            views.append(image)
            labels.append(self.source.label(used))
            if self.num_classes is not None:
                check_label(self.source, used, labels[-1], self.num_classes)
        return Batch(
            images=torch.stack(views),
            labels=torch.tensor(labels, dtype=torch.int64),
            positions=torch.tensor(request.positions, dtype=torch.int64),
            first_position=request.positions[0],
            request=request,
            bad=tuple(bad),
        )

    def _readable(
        self, position: int, index: int, request: BatchRequest
    ) -> tuple[Tensor, int, list[BadImage]]:
        """The view of the first image that can be read, its index, and those before it."""
        bad: list[BadImage] = []
        for attempt in range(MAX_ATTEMPTS):
            try:
                image = self.source.open(index)
                return self.view(image, position, request.bandwidth, request.progress), index, bad
            except UnreadableImage as error:
                bad.append(BadImage(index, self.source.name(index), str(error)))
                index = self.order.replacement(position, attempt + 1)
        raise UnreadableImage(
            f"{MAX_ATTEMPTS} images in a row cannot be read, the last one {bad[-1].name!r}: {bad[-1].reason}"
        )


class _Requests(Sampler[BatchRequest]):
    def __init__(self, requests: Iterable[BatchRequest]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.requests)


def batch_loader(
    builder: Dataset[Batch],
    requests: Iterable[BatchRequest],
    *,
    num_workers: int,
    prefetch: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """A torch loader over requests; batches come in the order of the requests.

    Args:
        builder: builds the batches.
        requests: what to build.
        num_workers: worker processes; 0 builds in this process.
        prefetch: batches that each worker keeps ready.
        pin_memory: whether the batches go to a GPU.
    """
    return DataLoader(
        builder,
        sampler=_Requests(requests),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_main if num_workers else None,
    )


def batches(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    """Iterate over a loader.

    Raises:
        UserError: if nothing can be read any more, or a label is not one of the classes.
        RunFault: if a shard of a stream cannot be read.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except (UnreadableImage, UserError) as error:
        # From a worker the message arrives with a traceback in front of it.
        reason = str(error).strip().splitlines()[-1].split(f"{type(error).__name__}: ")[-1]
        kind = RunFault if isinstance(error, RunFault) else UserError
        raise kind(f"data: {reason}") from None
    finally:
        # An exception from a worker holds its traceback in a cycle. Left to the garbage collector, torch
        # can no longer tell the workers to end, and waits five seconds for each before it kills them.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def evaluation_requests(
    indices: Sequence[int], *, size: tuple[int, int], batch_size: int
) -> list[BatchRequest]:
    """Requests that go through `indices` once, in order; an image's position is its index."""
    chunks = [tuple(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    return [
        BatchRequest(
            step=number,
            positions=chunk,
            indices=chunk,
            bandwidth=size,
            progress=1.0,
            weight=len(chunk) / len(indices),
            last=number == len(chunks) - 1,
        )
        for number, chunk in enumerate(chunks)
    ]


def _leave_signals_to_main(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process still needs its
    # batches to finish the step, and stops the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it: there a SIGTERM ends the workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    # Ignoring SIGTERM altogether would make Python wait for the workers for ever when it exits.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
