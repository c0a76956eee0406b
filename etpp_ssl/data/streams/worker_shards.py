"""Streams of shards (tars, parquet files): which of them a data worker reads, and in which order.

The shards of an epoch are in a keyed order. Each data worker takes every W-th of them, W being the number of
workers over all processes, so that every shard is read by one worker. Items are read in sequence and shuffled
in blocks of `shuffle_buffer`: an item changes places with those of its block, and with no others. What is
near in a shard stays near: where a shard holds images of one kind (one class, one video), shuffle them before
writing the shards.

A worker begins the next epoch when its shards are read. Where the number of shards is not a multiple of W,
workers with one shard less begin earlier; which ones these are changes with every epoch.

A block goes out while the next one comes in, item by item: a worker never holds more than `shuffle_buffer`
encoded images and one more. It waits for a whole block to be read only at its beginning and after the last
block of an epoch, which is as short as it comes. A cursor is the place in the shards where the current block
starts, and how much of the block is used. To resume from it, that block is read once more, behind whatever
lies before it in the same shard.
"""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from pydantic import Field

from etpp_ssl.config import Config, RunFault, UserError, listed, may_change
from etpp_ssl.data.streams.base import Cursor, Item
from etpp_ssl.randomness import keyed_torch

SAMPLED_SHARDS = 4
"""Shards that a sample is of, where they have enough items."""
RETRY_SECONDS = 1.0
"""Pause before a shard is opened again; twice as long each further time."""


class ShardReader(Protocol):
    """Reads the shards of one format; small to pickle."""

    @property
    def classes(self) -> list[str] | None:
        """See `Stream.classes`."""

    @property
    def has_labels(self) -> bool:
        """See `Stream.has_labels`."""

    @property
    def names(self) -> Sequence[str]:
        """The shards: their URLs, where they have some."""

    def read(self, shard: int, offset: int) -> Iterator[Item]:
        """The items of a shard from number `offset` on.

        Raises:
            Exception: whatever the library behind it raises; reading is then tried again.
        """


class ShardSettings(Config, ABC):
    """Settings of every stream that consists of shards."""

    shuffle_buffer: int = Field(default=1000, ge=1)
    """Images that are shuffled together. Every data worker keeps so many of them, encoded, in memory."""
    retries: int = may_change(3, ge=0)
    """Times that a shard which cannot be read is opened again before the run stops."""

    @abstractmethod
    def open_reader(self) -> ShardReader:
        """Find the shards.

        Raises:
            UserError: if they are not there, or the library that reads them is not installed.
        """

    def open_stream(self, seed: int) -> ShardStream:
        """See `StreamConfig.open_stream`."""
        return ShardStream(self.open_reader(), buffer=self.shuffle_buffer, retries=self.retries, seed=seed)


class ShardStream:
    """A stream that consists of shards; see `etpp_ssl.data.streams.base.Stream`.

    Args:
        reader: reads the shards.
        buffer: images that are shuffled together.
        retries: see `ShardSettings`.
        seed: of the order.
    """

    def __init__(self, reader: ShardReader, *, buffer: int, retries: int, seed: int) -> None:
        self.reader = reader
        self.buffer = buffer
        self.retries = retries
        self.seed = seed
        self.classes = reader.classes
        self.has_labels = reader.has_labels

    def fingerprint(self) -> str:
        """Hash of the shards' file names in their order; they may lie elsewhere."""
        names = "\n".join(map(os.path.basename, self.reader.names))
        return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()

    def describe(self) -> str:
        """See `Stream.describe`."""
        names = [*map(os.path.basename, self.reader.names)]
        return f"{len(names):,} shard{'s' * (len(names) != 1)} ({listed(names)})"

    def check_workers(self, num_workers: int) -> None:
        """See `Stream.check_workers`."""
        found = len(self.reader.names)
        if found < num_workers:
            raise UserError(
                f"data has {found} shard{'s' * (found != 1)} ({self.reader.names[0]!r} ...), fewer than the "
                f"{num_workers} data workers of all processes, each of which reads its own; give more "
                f"shards or a smaller data.num_workers"
            )

    def sample(self, count: int) -> Iterator[Item]:
        """The first items of the first shards of the run, without a second try; see `Stream.sample`."""
        left, each = count, -(-count // min(SAMPLED_SHARDS, len(self.reader.names)))
        for shard in self.shards_of(0, 1, 0):
            with closing(self.read_shard(shard, 0, retries=0)) as items:
                for item in islice(items, min(each, left)):
                    yield item
                    left -= 1
            if left == 0:
                return

    def read_shard(self, shard: int, offset: int, retries: int) -> Generator[Item]:
        """Items of a shard from number `offset` on; see `read_patiently`."""
        reader = self.reader
        return read_patiently(
            lambda start: reader.read(shard, start), offset, retries=retries, name=reader.names[shard]
        )

    def worker_shard(self, worker: int, num_workers: int, cursor: Cursor | None) -> ShuffledWorkerShard:
        """See `Stream.worker_shard`."""
        return ShuffledWorkerShard(self, worker, num_workers, cursor)

    def shards_of(self, worker: int, num_workers: int, epoch: int) -> list[int]:
        """The shards that a worker reads in an epoch, in order."""
        order = torch.randperm(
            len(self.reader.names), generator=keyed_torch(self.seed, "shards", epoch)
        ).tolist()
        # Another worker has one shard more than others in each epoch.
        own: list[int] = order[(worker + epoch) % num_workers :: num_workers]
        return own


class _Found(NamedTuple):
    """An item and where it lies."""

    epoch: int
    place: int
    """Number of its shard among those that the worker reads in the epoch."""
    offset: int
    """Number of the item in the shard."""
    item: Item


class ShuffledWorkerShard:
    """What one data worker reads of a `ShardStream`; see `WorkerShard` and the head of this file.

    Args:
        stream: the whole.
        worker, num_workers: see `Stream.worker_shard`.
        cursor: where to resume; None is the beginning.
    """

    def __init__(self, stream: ShardStream, worker: int, num_workers: int, cursor: Cursor | None) -> None:
        self.stream = stream
        self.worker = worker
        self.num_workers = num_workers
        cursor = cursor or {"epoch": 0, "place": 0, "offset": 0, "block": 0, "used": 0}
        self._found = self._read(cursor["epoch"], cursor["place"], cursor["offset"])
        self._ahead = next(self._found)
        self._next: list[_Found] = []
        self._block: list[Item] = []
        self._start = cursor
        self._number = cursor["block"] - 1
        self._used = 0
        self._turn_block()
        for _ in range(cursor["used"]):
            self.take()

    def take(self) -> Item:
        """See `WorkerShard.take`."""
        if not self._block:
            self._turn_block()
        item = self._block.pop()
        self._used += 1
        self._read_ahead()
        return item

    def cursor(self) -> Cursor:
        """See `WorkerShard.cursor`."""
        return {**self._start, "used": self._used}

    @property
    def num_held(self) -> int:
        """Items in memory."""
        return len(self._block) + len(self._next) + 1

    def _turn_block(self) -> None:
        """Take the next block, read to its end and shuffled."""
        while self._read_ahead():
            pass
        first = self._next[0]
        self._number += 1
        self._start = {
            "epoch": first.epoch,
            "place": first.place,
            "offset": first.offset,
            "block": self._number,
        }
        generator = keyed_torch(self.stream.seed, "block", self.worker, self._number)
        order = torch.randperm(len(self._next), generator=generator).tolist()
        self._block = [self._next[place].item for place in order]
        self._next = []
        self._used = 0

    def _read_ahead(self) -> bool:
        """Take one more item into the next block; false if the block is complete."""
        full = len(self._next) == self.stream.buffer
        if full or (self._next and self._next[0].epoch != self._ahead.epoch):
            return False
        self._next.append(self._ahead)
        self._ahead = next(self._found)
        return True

    def _read(self, epoch: int, place: int, offset: int) -> Iterator[_Found]:
        """Everything from a place on, epoch after epoch."""
        while True:
            shards = self.stream.shards_of(self.worker, self.num_workers, epoch)
            empty = (place, offset) == (0, 0)
            while place < len(shards):
                for item in self.stream.read_shard(shards[place], offset, self.stream.retries):
                    yield _Found(epoch, place, offset, item)
                    offset += 1
                    empty = False
                place, offset = place + 1, 0
            if empty:
                names = self.stream.reader.names
                raise RunFault(f"there is no image in the {len(shards)} shards like {names[shards[0]]!r}")
            epoch, place = epoch + 1, 0


def read_patiently(
    read: Callable[[int], Iterator[Item]], offset: int, *, retries: int, name: str
) -> Generator[Item]:
    """Items of a shard, which is opened again where reading fails.

    Args:
        read: from the number of the first item to the items.
        offset: that number.
        retries: failures in a row that are allowed.
        name: of the shard.

    Raises:
        RunFault: after one failure more than that.
    """
    failures = 0
    while True:
        try:
            for item in read(offset):
                yield item
                offset, failures = offset + 1, 0
            return
        except Exception as error:
            # Libraries of storage and of formats raise whatever they like. Most of it passes by itself.
            failures += 1
            if failures > retries:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                tries = f"{failures} tr{'ies' if failures > 1 else 'y'}"
                raise RunFault(f"shard {name!r} cannot be read after {tries} ({reason})") from error
        time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
