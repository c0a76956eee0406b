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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from etpp_ssl.config import UserError, listed
from etpp_ssl.data.formats import open_picture
from etpp_ssl.data.formats.base import Picture, Reading, UnreadableImage
from etpp_ssl.data.loader import Batch, Builder, Candidate
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.data.streams.base import Cursor, Item, Stream, WorkerShard
from etpp_ssl.data.views import View


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


class StreamBuilder(Builder):
    """Builds batches out of the worker shards of one process.

    An item that cannot be decoded is left out: the worker shard's next one takes its place.

    Args:
        stream: the images.
        view, num_classes: see `Builder`.
        place: where the process stands.
        rank, num_processes: which worker shards are its own.
        reading: how its items become pictures.
        classes: class names in the order of the labels, where they are known.
    """

    def __init__(
        self,
        stream: Stream,
        view: View,
        place: StreamPlace,
        *,
        rank: int,
        num_processes: int,
        reading: Reading,
        num_classes: int | None = None,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__(view, num_classes)
        self.stream = stream
        self.place = place
        self.rank = rank
        self.num_processes = num_processes
        self.reading = reading
        self.classes = classes or []
        # Opened where they are read: in the data worker.
        self._opened: dict[int, WorkerShard] = {}
        self._given = [one.num_samples for one in place.worker_shards]

    def __getitem__(self, request: BatchRequest) -> Batch:
        assert isinstance(request, StreamRequest)
        assert request.num_samples == self._given[request.worker], "a worker shard is read in sequence"
        batch = super().__getitem__(request)
        self._given[request.worker] += len(request.sample_ids)
        return replace(batch, cursor=self._items(request.worker).cursor())

    def candidates(self, sample_id: int, index: int, request: BatchRequest) -> Iterator[Candidate]:
        """The next items of the request's worker shard."""
        assert isinstance(request, StreamRequest)
        items = self._items(request.worker)
        while True:
            item = items.take()
            yield Candidate(number_of(item), item.name, partial(self._open, item), partial(self._label, item))

    def _open(self, item: Item) -> Picture:
        if item.fault:
            raise UnreadableImage(item.fault)
        return open_picture(item.data, self.reading)

    def _label(self, item: Item) -> int:
        """The class index, -1 for none or, where labels do not matter, for a name that is not known."""
        label = item.label
        if isinstance(label, int):
            return label
        if label in self.classes:
            return self.classes.index(label)
        if not self.classes and label.isdecimal():
            return int(label)
        if self.num_classes is None:
            return -1
        known = f"has {listed(self.classes)}" if self.classes else "is not given"
        raise UserError(f"image {item.name!r} has label {label!r}, but data.classes {known}")

    def _items(self, number: int) -> WorkerShard:
        if number not in self._opened:
            own = len(self.place.worker_shards)
            self._opened[number] = self.stream.worker_shard(
                self.rank * own + number, self.num_processes * own, self.place.worker_shards[number].cursor
            )
        return self._opened[number]


def number_of(item: Item) -> int:
    """What a bad image is counted by, in the place of a number in the data set: a hash of its name."""
    digest = hashlib.blake2b(item.name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
