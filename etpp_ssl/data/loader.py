"""From requests to batches: whole batches are built in the workers, as uint8.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.loader_faults import LoaderFault
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder, safe_name
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import check_label
from etpp_ssl.data.views import View
from etpp_ssl.data.workers import MonitoredLoader, note, note_reading

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
    sample_ids: Tensor
    """int64 (B,): the images' numbers in the run, by which masks are drawn: the samples' own as they come
    from the loader, and one for each time that an image is trained on where images are replayed."""
    first_sample_id: int
    """The first of `sample_ids`, which the host knows without asking the device: the key of what is drawn
    once per micro-batch."""
    request: BatchRequest
    bad: tuple[BadImage, ...]
    """Unreadable images that were met and replaced."""
    cursor: dict[str, Any] | None = None
    """Where a stream's worker shard stands after it; None for images that are addressed by index."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device; copies from pinned memory do not block."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
        )

    def renumbered(self, offset: int) -> Batch:
        """The same images under numbers that are higher by `offset`."""
        return replace(
            self, sample_ids=self.sample_ids + offset, first_sample_id=self.first_sample_id + offset
        )

    def pin_memory(self) -> Batch:
        """Called by torch's loader where there is a GPU."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
        )

    def share_memory(self) -> Batch:
        """The same, its tensors in memory that another process can take over.

        Raises:
            RuntimeError: if there is no room for them.
        """
        for tensor in (self.images, self.labels, self.sample_ids):
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
            sample_ids=self.sample_ids.clone(),
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
        batch = request.described(self.source.name)
        for sample_id, index in zip(request.sample_ids, request.indices, strict=True):
            with named_errors(request, sample_id, index, self.source.name):
                image, used, broken = self._readable(sample_id, index, request, batch)
                bad.extend(broken)
                views.append(image)
                labels.append(self.source.label(used))
                if self.num_classes is not None:
                    check_label(self.source, used, labels[-1], self.num_classes)
        note("")
        return Batch(
            images=torch.stack(views),
            labels=torch.tensor(labels, dtype=torch.int64),
            sample_ids=torch.tensor(request.sample_ids, dtype=torch.int64),
            first_sample_id=request.sample_ids[0],
            request=request,
            bad=tuple(bad),
        )

    def _readable(
        self, sample_id: int, index: int, request: BatchRequest, batch: str
    ) -> tuple[Tensor, int, list[BadImage]]:
        """The view of the first image that can be read, its index, and those before it."""
        bad: list[BadImage] = []
        for attempt in range(MAX_ATTEMPTS):
            note_reading(sample_id, safe_name(self.source.name, index), batch)
            try:
                image = self.source.open(index)
                return self.view(image, sample_id, request.bandwidth, request.progress), index, bad
            except UnreadableImage as error:
                bad.append(BadImage(index, self.source.name(index), str(error)))
                index = self.order.replacement(sample_id, attempt + 1)
        raise all_unreadable(bad)


@contextmanager
def named_errors(
    request: BatchRequest, sample_id: int, index: int, name: Callable[[int], str]
) -> Iterator[None]:
    """Add to an unexpected error inside, which keeps its traceback, a line that names the image."""
    try:
        yield
    except (UnreadableImage, UserError):
        raise
    except Exception as error:
        image = repr(safe_name(name, index))
        error.add_note(f"etpp: it was raised for image {image} (sample {sample_id} of {request.place})")
        raise


def all_unreadable(bad: Sequence[BadImage]) -> UnreadableImage:
    """The end of a search for an image that can be read, after `MAX_ATTEMPTS` that cannot."""
    last = bad[-1]
    return UnreadableImage(
        f"{len(bad)} images in a row cannot be read, the last one {last.name!r}: {last.reason}"
    )


def load_batches(
    builder: Dataset[Batch],
    requests: Iterable[BatchRequest],
    *,
    num_workers: int,
    prefetch: int,
    pin_memory: bool,
    stall_seconds: float | None = None,
) -> Generator[Batch, None, None]:
    """Batches in the order of their requests; closing the generator ends the workers.

    Args:
        builder: builds the batches.
        requests: what to build.
        num_workers: worker processes; 0 builds in this process.
        prefetch: batches that each worker keeps ready.
        pin_memory: whether the batches go to a GPU.
        stall_seconds: how long to wait for a batch at most, the start of the workers included. Time in which
            the process is suspended does not count. None waits for ever.

    Raises:
        UserError: if no image can be read any more, or a label is not one of the classes.
        RunFault: if a worker ends before its time, a batch does not come within the limit, the machine has no
            room to hand batches over (see `MonitoredLoader`), or a shard of a stream cannot be read.
    """
    loader = MonitoredLoader(
        builder,
        requests,
        num_workers=num_workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        hand_over=_handed_over,
        stall_seconds=stall_seconds,
    )
    try:
        yield from loader
    except LoaderFault:
        raise
    except (UnreadableImage, UserError) as error:
        # From a worker the message arrives with a traceback in front of it.
        reason = str(error).strip().splitlines()[-1].split(f"{type(error).__name__}: ")[-1]
        kind = RunFault if isinstance(error, RunFault) else UserError
        raise kind(f"data: {reason}") from None
    finally:
        loader.close()


def evaluation_requests(
    indices: Sequence[int], *, size: tuple[int, int], batch_size: int
) -> list[BatchRequest]:
    """Requests that go through `indices` once, in order; an image's sample_id is its index."""
    chunks = [tuple(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    return [
        BatchRequest(
            step=number,
            sample_ids=chunk,
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
