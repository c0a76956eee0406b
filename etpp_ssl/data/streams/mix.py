"""Several streams as one, mixed by weight."""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field, field_validator

from etpp_ssl.config import Config
from etpp_ssl.data.streams.base import Cursor, Item, StreamConfig, WorkerShard
from etpp_ssl.data.streams.huggingface import HuggingFaceSettings
from etpp_ssl.data.streams.webdataset import WebDatasetSettings
from etpp_ssl.data.streams.worker_shards import ShardStream
from etpp_ssl.randomness import derive_key


class Weighted(Config):
    """How much of a mix comes from a source."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, in proportion to the other sources'; sizes do not matter. A small source of
    great weight is seen more often."""


class WebDatasetPart(WebDatasetSettings, Weighted):
    """See `WebDatasetSettings`."""

    name: Literal["webdataset"] = "webdataset"


class HuggingFacePart(HuggingFaceSettings, Weighted):
    """See `HuggingFaceSettings`."""

    name: Literal["huggingface"] = "huggingface"


# One line here makes a new stream known to mixes.
AnyPart = Annotated[WebDatasetPart | HuggingFacePart, Field(discriminator="name")]


class MixConfig(StreamConfig):
    """Samples of several streams.

    Which source a sample comes from is a keyed draw for each of them. Each source goes through its own
    epochs; those of the run, `num_images` long, are the recipe's measure of compute only.
    """

    name: Literal["mix"] = "mix"
    sources: tuple[AnyPart, ...]
    """The streams, each with the keys of its own kind (`webdataset`, `huggingface`) and a `weight`."""

    @field_validator("sources")
    @classmethod
    def _some_source(cls, sources: tuple[AnyPart, ...]) -> tuple[AnyPart, ...]:
        if not sources:
            raise ValueError("it is empty: give at least one source, with a weight")
        return sources

    def open_stream(self, seed: int) -> MixedStream:
        """Open the sources; see `StreamConfig.open_stream`."""
        streams = [
            source.open_stream(derive_key(seed, "mix source", number))
            for number, source in enumerate(self.sources)
        ]
        return MixedStream(streams, [source.weight for source in self.sources], seed)


class MixedStream:
    """See `MixConfig` and `etpp_ssl.data.streams.base.Stream`.

    Args:
        streams: the sources.
        weights: theirs, each above 0.
        seed: of the draws between them.
    """

    def __init__(self, streams: list[ShardStream], weights: list[float], seed: int) -> None:
        self.streams = streams
        self.bounds = list(accumulate(weights))
        self.seed = seed
        first = streams[0].classes
        self.classes = first if all(stream.classes == first for stream in streams) else None
        self.has_labels = all(stream.has_labels for stream in streams)

    def fingerprint(self) -> str:
        """Hash of the sources'."""
        text = " ".join(stream.fingerprint() for stream in self.streams)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def describe(self) -> str:
        """See `Stream.describe`."""
        return " and ".join(stream.describe() for stream in self.streams)

    def check_workers(self, num_workers: int) -> None:
        """See `Stream.check_workers`."""
        for stream in self.streams:
            stream.check_workers(num_workers)

    def sample(self, count: int) -> Iterator[Item]:
        """Of each source its share; see `Stream.sample`."""
        ends = [round(count * bound / self.bounds[-1]) for bound in self.bounds]
        for stream, start, end in zip(self.streams, (0, *ends), ends, strict=False):
            yield from stream.sample(end - start)

    def worker_shard(self, worker: int, num_workers: int, cursor: Cursor | None) -> MixedWorkerShard:
        """See `Stream.worker_shard`."""
        return MixedWorkerShard(self, worker, num_workers, cursor)

    def source_of(self, worker: int, number: int) -> int:
        """The source that item `number` of a worker comes from."""
        draw = derive_key(self.seed, "mix", worker, number) / 2**64
        # The product can be rounded up to the last bound.
        return min(bisect(self.bounds, draw * self.bounds[-1]), len(self.streams) - 1)


class MixedWorkerShard:
    """What one data worker reads of a `MixedStream`; sources are opened when they are first drawn.

    Args:
        stream: the whole.
        worker, num_workers: see `Stream.worker_shard`.
        cursor: where to resume; None is the beginning.
    """

    def __init__(self, stream: MixedStream, worker: int, num_workers: int, cursor: Cursor | None) -> None:
        self.stream = stream
        self.worker = worker
        self.num_workers = num_workers
        self._number = cursor["number"] if cursor else 0
        self._starts = cursor["sources"] if cursor else [None] * len(stream.streams)
        self._opened: dict[int, WorkerShard] = {}

    def take(self) -> Item:
        """See `WorkerShard.take`."""
        source = self.stream.source_of(self.worker, self._number)
        if source not in self._opened:
            self._opened[source] = self.stream.streams[source].worker_shard(
                self.worker, self.num_workers, self._starts[source]
            )
        self._number += 1
        return self._opened[source].take()

    def cursor(self) -> Cursor:
        """See `WorkerShard.cursor`."""
        sources = [
            self._opened[source].cursor() if source in self._opened else start
            for source, start in enumerate(self._starts)
        ]
        return {"number": self._number, "sources": sources}
