"""From requests to batches: whole batches are built in the workers, as uint8.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.loader_faults import LoaderFault, named_errors, safe_name
from etpp_ssl.data.reading import Reading, note_reading
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder
from etpp_ssl.data.sources.base import ImageSource, UnreadableImage
from etpp_ssl.data.sources.splits import check_label
from etpp_ssl.data.views import View
from etpp_ssl.data.watch import Watch

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

    def share_memory(self) -> Batch:
        """The same, its tensors in memory that another process can take over.

        Raises:
            RuntimeError: if there is no room for them.
        """
        for tensor in (self.images, self.labels, self.positions):
            tensor.share_memory_()
        return self

    def own_memory(self) -> Batch:
        """The same without shared memory, of which there is little, and each tensor an open file."""
        if not self.images.is_shared():
            return self
        return replace(
            self,
            images=self.images.clone(),
            labels=self.labels.clone(),
            positions=self.positions.clone(),
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
            with named_errors(request, position, index, self.image_name):
                image, used, broken = self._readable(position, index, request)
                bad.extend(broken)
                views.append(image)
                labels.append(self.source.label(used))
                if self.num_classes is not None:
                    check_label(self.source, used, labels[-1], self.num_classes)
        note_reading(None)
        return Batch(
            images=torch.stack(views),
            labels=torch.tensor(labels, dtype=torch.int64),
            positions=torch.tensor(request.positions, dtype=torch.int64),
            first_position=request.positions[0],
            request=request,
            bad=tuple(bad),
        )

    def image_name(self, index: int) -> str:
        """An image's name."""
        return self.source.name(index)

    def _readable(
        self, position: int, index: int, request: BatchRequest
    ) -> tuple[Tensor, int, list[BadImage]]:
        """The view of the first image that can be read, its index, and those before it."""
        bad: list[BadImage] = []
        for attempt in range(MAX_ATTEMPTS):
            note_reading(Reading(position, safe_name(self.image_name, index)))
            try:
                image = self.source.open(index)
                return self.view(image, position, request.bandwidth, request.progress), index, bad
            except UnreadableImage as error:
                bad.append(BadImage(index, self.source.name(index), str(error)))
                index = self.order.replacement(position, attempt + 1)
        raise all_unreadable(bad)


def all_unreadable(bad: Sequence[BadImage]) -> UnreadableImage:
    """The end of a search for an image that can be read, after `MAX_ATTEMPTS` that cannot."""
    last = bad[-1]
    return UnreadableImage(
        f"{len(bad)} images in a row cannot be read, the last one {last.name!r}: {last.reason}"
    )


@dataclass(frozen=True)
class BatchLoader:
    """What `batches` opens; see `batch_loader`."""

    builder: Dataset[Batch]
    requests: Iterable[BatchRequest]
    num_workers: int
    prefetch: int
    pin_memory: bool
    stall_seconds: float | None


def batch_loader(
    builder: Dataset[Batch],
    requests: Iterable[BatchRequest],
    *,
    num_workers: int,
    prefetch: int,
    pin_memory: bool,
    stall_seconds: float | None = None,
) -> BatchLoader:
    """A loader over requests; batches come in the order of the requests.

    Args:
        builder: builds the batches. If it has an `image_name`, from an image's index to its name, the images
            of a batch that does not come are named.
        requests: what to build.
        num_workers: worker processes; 0 builds in this process.
        prefetch: batches that each worker keeps ready.
        pin_memory: whether the batches go to a GPU.
        stall_seconds: how long to wait for a batch at most, the start of the workers included; None waits
            for ever.
    """
    return BatchLoader(builder, requests, num_workers, prefetch, pin_memory, stall_seconds)


def batches(loader: BatchLoader) -> Generator[Batch, None, None]:
    """Iterate over a loader.

    Raises:
        UserError: if nothing can be read any more, or a label is not one of the classes.
        RunFault: if a worker ends before its time, a batch does not come within the limit, the machine has no
            room to hand batches over (see `Watch`), or a shard of a stream cannot be read.
    """
    watch = Watch(
        loader.builder,
        loader.requests,
        num_workers=loader.num_workers,
        prefetch=loader.prefetch,
        pin_memory=loader.pin_memory,
        hand_over=_handed_over,
        stall_seconds=loader.stall_seconds,
    )
    try:
        yield from watch
    except LoaderFault:
        raise
    except (UnreadableImage, UserError) as error:
        # From a worker the message arrives with a traceback in front of it.
        reason = str(error).strip().splitlines()[-1].split(f"{type(error).__name__}: ")[-1]
        kind = RunFault if isinstance(error, RunFault) else UserError
        raise kind(f"data: {reason}") from None
    finally:
        watch.close()


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


def _handed_over(batch: Batch) -> Batch:
    # A worker's queue would move the tensors to shared memory by itself, in a thread whose errors get lost,
    # and the batch with them.
    return batch if get_worker_info() is None else batch.share_memory()
