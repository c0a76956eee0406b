"""From a stream to batches: requests go to the lanes in turn, and each batch says where it leaves its lane.

torch's loader hands request number i to worker i % num_workers. Requests name their lane in the same turn, so
each worker has one lane and reads it in sequence. A lane's samples cannot be skipped to: which items
are images shows only when they are decoded. So a request says how many samples its lane has
given before, and a builder that stands elsewhere fails instead of giving another image.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.picture import open_picture
from etpp_ssl.data.loader import MAX_ATTEMPTS, BadImage, Batch, all_unreadable, named_errors
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.data.sources.base import UnreadableImage
from etpp_ssl.data.sources.splits import label_sentence
from etpp_ssl.data.streams.base import Cursor, Item, Lane, Stream
from etpp_ssl.data.views import View
from etpp_ssl.data.workers import note, note_reading


@dataclass(frozen=True)
class LanePlace:
    """Where one lane stands."""

    num_samples: int = 0
    """Samples that it has given."""
    cursor: Cursor | None = None
    """Where the next one lies; None is the beginning."""


@dataclass(frozen=True)
class StreamPlace:
    """Where one process stands in a stream."""

    lanes: tuple[LanePlace, ...]
    """Its lanes, one for each data worker."""
    num_batches: int = 0
    """Micro-batches that the run has taken; says whose turn it is."""

    @classmethod
    def beginning(cls, num_workers: int) -> StreamPlace:
        """Of a process with so many data workers; without any it reads one lane itself."""
        return cls(lanes=(LanePlace(),) * max(1, num_workers))

    def after(self, batch: Batch) -> StreamPlace:
        """The place once a batch is taken; the batches come in the order of their requests."""
        lanes = list(self.lanes)
        lanes[self.num_batches % len(lanes)] = LanePlace(
            self.lanes[self.num_batches % len(lanes)].num_samples + len(batch.request.positions), batch.cursor
        )
        return replace(self, lanes=tuple(lanes), num_batches=self.num_batches + 1)

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON."""
        lanes = [{"num_samples": lane.num_samples, "cursor": lane.cursor} for lane in self.lanes]
        return {"num_batches": self.num_batches, "lanes": lanes}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StreamPlace:
        """The inverse of `to_json`."""
        lanes = tuple(LanePlace(lane["num_samples"], lane["cursor"]) for lane in values["lanes"])
        return cls(lanes=lanes, num_batches=values["num_batches"])


@dataclass(frozen=True)
class StreamRequest(BatchRequest):
    """A request that says which lane serves it. Its `indices` are its positions: a stream has no others."""

    lane: int
    """Number of the lane among those of the process."""
    num_samples: int
    """Samples that the lane has given before."""


@dataclass(frozen=True)
class StreamRequests:
    """One process's requests with their lanes.

    Args:
        requests: from where the process stands on.
        place: where that is.
    """

    requests: Iterable[BatchRequest]
    place: StreamPlace

    def __iter__(self) -> Iterator[StreamRequest]:
        given = [lane.num_samples for lane in self.place.lanes]
        for number, request in enumerate(self.requests, self.place.num_batches):
            lane = number % len(given)
            yield StreamRequest(**vars(request), lane=lane, num_samples=given[lane])
            given[lane] += len(request.positions)


class StreamBuilder(Dataset[Batch]):
    """Builds batches out of the lanes of one process; beside `BatchBuilder`, for streams.

    An item that cannot be decoded is left out: the lane's next one takes its place.

    Args:
        stream: the images.
        view: the training view.
        place: where the process stands.
        rank, num_processes: which lanes are its own.
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
        self._lanes: dict[int, Lane] = {}
        self._given = [lane.num_samples for lane in place.lanes]

    def __getitem__(self, request: StreamRequest) -> Batch:
        assert request.num_samples == self._given[request.lane], "a lane is read in sequence"
        lane = self._lane(request.lane)
        views, labels, bad = [], [], []
        for position in request.positions:
            with named_errors(request, position, position, str):
                image, label, broken = self._readable(lane, position, request)
            views.append(image)
            labels.append(label)
            bad.extend(broken)
        note("")
        self._given[request.lane] += len(views)
        return Batch(
            images=torch.stack(views),
            labels=torch.tensor(labels, dtype=torch.int64),
            positions=torch.tensor(request.positions, dtype=torch.int64),
            first_position=request.positions[0],
            request=request,
            bad=tuple(bad),
            cursor=lane.cursor(),
        )

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            own = len(self.place.lanes)
            self._lanes[number] = self.stream.lane(
                self.rank * own + number, self.num_processes * own, self.place.lanes[number].cursor
            )
        return self._lanes[number]

    def _readable(
        self, lane: Lane, position: int, request: BatchRequest
    ) -> tuple[Tensor, int, list[BadImage]]:
        """The view and the label of the lane's next image that can be read, and the bad ones before it."""
        bad: list[BadImage] = []
        for _ in range(MAX_ATTEMPTS):
            item = lane.take()
            note_reading(position, item.name, request.described())
            try:
                if item.fault:
                    raise UnreadableImage(item.fault)
                picture = open_picture(item.data, self.in_chans, self.max_pixels)
                view = self.view(picture, position, request.bandwidth, request.progress)
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
