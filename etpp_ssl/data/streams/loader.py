"""From a stream to batches: requests go to the worker shards in turn, and batches say where these stand.

torch's loader hands request number i to worker i % num_workers. Requests name their worker shard in the same
turn, so each worker has one and reads it in sequence. Its samples cannot be skipped to: which items are
images shows only when they are decoded. So a request says how many samples its worker shard has given before,
and a builder that stands elsewhere fails instead of giving another image.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.formats.open import open_picture
from etpp_ssl.data.loader import MAX_ATTEMPTS, BadImage, Batch, all_unreadable, named_errors
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.data.sources.splits import label_sentence
from etpp_ssl.data.streams.base import Cursor, Item, Stream, WorkerShard
from etpp_ssl.data.views import View
from etpp_ssl.data.workers import note, note_reading


@dataclass(frozen=True)
class WorkerShardPlace:
    """Where one worker shard stands."""

    num_samples: int = 0
    """Samples that it has given."""
    cursor: Cursor | None = None
    """Where the next one lies; None is the beginning."""


@dataclass(frozen=True)
class StreamPlace:
    """Where one process stands in a stream."""

    worker_shards: tuple[WorkerShardPlace, ...]
    """One for each data worker."""
    num_batches: int = 0
    """Micro-batches that the run has taken; says whose turn it is."""

    @classmethod
    def beginning(cls, num_workers: int) -> StreamPlace:
        """Of a process with so many data workers; without any it reads one worker shard itself."""
        return cls(worker_shards=(WorkerShardPlace(),) * max(1, num_workers))

    def after(self, batch: Batch) -> StreamPlace:
        """The place once a batch is taken; the batches come in the order of their requests."""
        places = list(self.worker_shards)
        worker = self.num_batches % len(places)
        num_samples = places[worker].num_samples + len(batch.request.sample_ids)
        places[worker] = WorkerShardPlace(num_samples, batch.cursor)
        return StreamPlace(tuple(places), self.num_batches + 1)

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        # "lanes" is what version 0.5 calls them in its checkpoints.
        return {"num_batches": self.num_batches, "lanes": [vars(place) for place in self.worker_shards]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StreamPlace:
        """The inverse of `to_json`."""
        places = tuple(WorkerShardPlace(place["num_samples"], place["cursor"]) for place in values["lanes"])
        return cls(places, values["num_batches"])


@dataclass(frozen=True)
class StreamRequest(BatchRequest):
    """A request that says which worker shard serves it; its `indices` are its sample_ids."""

    worker: int
    """The worker shard's number among those of the process."""
    num_samples: int
    """Samples that it has given before."""


@dataclass(frozen=True)
class StreamRequests:
    """One process's requests with their worker shards.

    Args:
        requests: from where the process stands on.
        place: where that is.
    """

    requests: Iterable[BatchRequest]
    place: StreamPlace

    def __iter__(self) -> Iterator[StreamRequest]:
        given = [place.num_samples for place in self.place.worker_shards]
        for number, request in enumerate(self.requests, self.place.num_batches):
            worker = number % len(given)
            yield StreamRequest(**vars(request), worker=worker, num_samples=given[worker])
            given[worker] += len(request.sample_ids)


class StreamBuilder(Dataset[Batch]):
    """Builds batches out of the worker shards of one process; beside `BatchBuilder`, for streams.

    An item that cannot be decoded is left out: the worker shard's next one takes its place.

    Args:
        stream: the images.
        view: the training view.
        place: where the process stands.
        rank, num_processes: which worker shards are its own.
        in_chans: channels to decode to.
        max_pixels: larger images count as unreadable.
        num_classes: what labels must be below and, if it is given, must not be missing.
    """

    def __init__(
        self,
        stream: Stream,
        view: View,
        place: StreamPlace,
        *,
        rank: int,
        num_processes: int,
        in_chans: int,
        max_pixels: int,
        num_classes: int | None = None,
    ) -> None:
        self.stream = stream
        self.view = view
        self.place = place
        self.rank = rank
        self.num_processes = num_processes
        self.in_chans = in_chans
        self.max_pixels = max_pixels
        self.num_classes = num_classes
        # Opened where they are read: in the data worker.
        self._opened: dict[int, WorkerShard] = {}
        self._given = [one.num_samples for one in place.worker_shards]

    def __getitem__(self, request: StreamRequest) -> Batch:
        assert request.num_samples == self._given[request.worker], "a worker shard is read in sequence"
        items = self._items(request.worker)
        views, labels, bad = [], [], []
        for sample_id in request.sample_ids:
            with named_errors(request, sample_id, sample_id, str):
                image, label, broken = self._readable(items, sample_id, request)
            views.append(image)
            labels.append(label)
            bad.extend(broken)
        note("")
        self._given[request.worker] += len(views)
        return Batch(
            images=torch.stack(views),
            labels=torch.tensor(labels, dtype=torch.int64),
            sample_ids=torch.tensor(request.sample_ids, dtype=torch.int64),
            first_sample_id=request.sample_ids[0],
            request=request,
            bad=tuple(bad),
            cursor=items.cursor(),
        )

    def _items(self, number: int) -> WorkerShard:
        if number not in self._opened:
            own = len(self.place.worker_shards)
            self._opened[number] = self.stream.worker_shard(
                self.rank * own + number, self.num_processes * own, self.place.worker_shards[number].cursor
            )
        return self._opened[number]

    def _readable(
        self, items: WorkerShard, sample_id: int, request: BatchRequest
    ) -> tuple[Tensor, int, list[BadImage]]:
        """The view and the label of the next image that can be read, and the bad ones before it."""
        bad: list[BadImage] = []
        for _ in range(MAX_ATTEMPTS):
            item = items.take()
            note_reading(sample_id, item.name, request.described())
            try:
                if item.fault:
                    raise UnreadableImage(item.fault)
                picture = open_picture(item.data, self.in_chans, self.max_pixels)
                view = self.view(picture, sample_id, request.bandwidth, request.progress)
            except UnreadableImage as error:
                bad.append(BadImage(number_of(item), item.name, str(error)))
                continue
            if self.num_classes is not None and not 0 <= item.label < self.num_classes:
                raise UserError(label_sentence(item.name, item.label, self.num_classes))
            return view, item.label, bad
        raise all_unreadable(bad)


def number_of(item: Item) -> int:
    """What a bad image is counted by, in the place of a number in the data set: a hash of its name."""
    digest = hashlib.blake2b(item.name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
