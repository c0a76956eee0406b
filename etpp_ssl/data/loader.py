"""From requests to batches: whole batches are built in the workers.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from etpp_ssl.config import UserError
from etpp_ssl.data.channels import stacked
from etpp_ssl.data.formats.base import Picture, UnreadableImage, WithoutData
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder, safe_name
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import check_label
from etpp_ssl.data.views import View, has_gaps
from etpp_ssl.data.workers import MonitoredLoader, note, note_reading

MAX_ATTEMPTS = 100
"""Images tried for one sample before the data set counts as unreadable altogether."""


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read, or shows too little data."""

    index: int
    name: str
    reason: str
    without_data: bool = False
    """Whether that is all: it is replaced, but nothing is wrong with it."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch and everything that says where in the run it belongs."""

    images: Tensor
    """uint8, or float32 under `data.range`, (B, C, H, W): full size; with `decode: reduced` the stage's
    intermediate size; the stage's bandwidth where the worker crops (`lanczos`)."""
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
    """Images that were met and replaced, as they cannot be read or show too little data."""
    num_outside: int = 0
    """Images with values outside `data.range` that were read for it."""
    cursor: dict[str, Any] | None = None
    """Where a stream's worker shard stands after it; None for images that are addressed by index."""
    has_gaps: bool = False
    """Whether `images` has NaN, pixels without data: the host knows without asking the device."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device; copies from pinned memory do not block."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def renumbered(self, offset: int) -> Batch:
        """The same images under numbers that are higher by `offset`."""
        sample_ids, first = self.sample_ids + offset, self.first_sample_id + offset
        return replace(self, sample_ids=sample_ids, first_sample_id=first)

    def pin_memory(self) -> Batch:
        """The same in pinned memory; torch's loader calls it where there is a GPU."""
        return self._with(Tensor.pin_memory)

    def share_memory(self) -> Batch:
        """The same, in memory that another process can take over.

        Raises:
            RuntimeError: if there is no room for it.
        """
        return self._with(Tensor.share_memory_)

    def own_memory(self) -> Batch:
        """The same without shared memory, of which there is little, and each tensor an open file."""
        return self._with(Tensor.clone) if self.images.is_shared() else self

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            key: change(getattr(self, key)) for key in ("images", "labels", "sample_ids")
        }
        return replace(self, **tensors)


class Candidate(NamedTuple):
    """An image for a sample, which may turn out to be unreadable."""

    number: int
    """By which unreadable images are told apart: in the data set or, in a stream, a hash of the name."""
    name: str
    open: Callable[[], Picture]
    label: Callable[[], int]


class Builder(Dataset[Batch], ABC):
    """Builds the batch that a request describes.

    Args:
        view: the training or the evaluation view.
        num_classes: what labels must be below and, if it is given, must not be missing.
    """

    image_name: Callable[[int], str] | None = None
    """From an image's index to its name, where images have indices."""

    def __init__(self, view: View, num_classes: int | None) -> None:
        self.view = view
        self.num_classes = num_classes

    @abstractmethod
    def candidates(self, sample_id: int, index: int, request: BatchRequest) -> Iterator[Candidate]:
        """Images for a sample, endless: the next one takes the place of one that cannot be read."""

    def __getitem__(self, request: BatchRequest) -> Batch:
        views, labels, bad, num_outside = [], [], [], 0
        described = request.described(self.image_name)
        for sample_id, index in zip(request.sample_ids, request.indices, strict=True):
            try:
                view, label, broken, outside = self._sample(sample_id, index, request, described)
            except (UnreadableImage, UserError):
                raise
            except Exception as error:
                image = repr(safe_name(self.image_name or str, index))
                error.add_note(
                    f"etpp: it was raised for image {image} (sample {sample_id} of {request.place})"
                )
                raise
            views.append(view)
            labels.append(label)
            bad.extend(broken)
            num_outside += outside
        note(f"\n{described}")
        images = stacked(views)
        return Batch(
            images=images,
            labels=torch.tensor(labels, dtype=torch.int64),
            sample_ids=torch.tensor(request.sample_ids, dtype=torch.int64),
            first_sample_id=request.sample_ids[0],
            request=request,
            bad=tuple(bad),
            num_outside=num_outside,
            has_gaps=has_gaps(images),
        )

    def _sample(
        self, sample_id: int, index: int, request: BatchRequest, described: str
    ) -> tuple[Tensor, int, list[BadImage], bool]:
        """View and label of the first image that can be read, those before it, and whether it has values
        outside `data.range`."""
        bad: list[BadImage] = []
        for candidate in islice(self.candidates(sample_id, index, request), MAX_ATTEMPTS):
            note_reading(sample_id, candidate.name, described)
            try:
                picture = candidate.open()
                view = self.view(picture, sample_id, request.bandwidth, request.progress)
            except UnreadableImage as error:
                too_little = isinstance(error, WithoutData)
                bad.append(BadImage(candidate.number, candidate.name, str(error), too_little))
                continue
            label = candidate.label()
            if self.num_classes is not None:
                check_label(candidate.name, label, self.num_classes)
            return view, label, bad, getattr(picture, "outside", False)
        raise UnreadableImage(
            f"{len(bad)} images in a row cannot be read, the last one {bad[-1].name!r}: {bad[-1].reason}"
        )


class BatchBuilder(Builder):
    """Builds batches of images that are addressed by index, the same in any process.

    Args:
        source: the images.
        view, num_classes: see `Builder`.
        order: says which image replaces an unreadable one.
    """

    def __init__(
        self, source: ImageSource, view: View, order: KeyedOrder, num_classes: int | None = None
    ) -> None:
        super().__init__(view, num_classes)
        self.source = source
        self.order = order
        self.image_name = source.name

    def candidates(self, sample_id: int, index: int, request: BatchRequest) -> Iterator[Candidate]:
        """The sample's own image, then keyed draws from the data set."""
        for attempt in count(1):
            open_one, label = partial(self.source.open, index), partial(self.source.label, index)
            yield Candidate(index, safe_name(self.source.name, index), open_one, label)
            index = self.order.replacement(sample_id, attempt)


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
        RunFault: if a worker ends before its time, a batch does not come within the limit, shared memory has
            no room, the system refuses a process or a file, or a shard of a stream cannot be read.
    """
    loader = MonitoredLoader(builder, requests, num_workers, prefetch, pin_memory, stall_seconds)
    try:
        yield from loader
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
