"""Several streams as one, mixed by weight."""

from __future__ import annotations

import hashlib
from bisect import bisect
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field, field_validator

from etpp_ssl.config import Config
from etpp_ssl.data.streams.base import Cursor, Item, Lane, StreamConfig
from etpp_ssl.data.streams.huggingface import HuggingFaceSettings
from etpp_ssl.data.streams.lanes import ShardStream
from etpp_ssl.data.streams.webdataset import WebDatasetSettings
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

    Which source a sample comes from is drawn for each of them by its number in its lane. Each source goes
    through its own epochs; those of the run, `num_images` long, are the recipe's measure of compute only.
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

    def check_lanes(self, num_lanes: int) -> None:
        """See `Stream.check_lanes`."""
        for stream in self.streams:
            stream.check_lanes(num_lanes)

    def lane(self, lane: int, num_lanes: int, cursor: Cursor | None) -> MixedLane:
        """See `Stream.lane`."""
        return MixedLane(self, lane, num_lanes, cursor)

    def source_of(self, lane: int, number: int) -> int:
        """The source that item `number` of a lane comes from."""
        draw = derive_key(self.seed, "mix", lane, number) / 2**64
        # The product can be rounded up to the last bound.
        return min(bisect(self.bounds, draw * self.bounds[-1]), len(self.streams) - 1)


class MixedLane:
    """One lane of a `MixedStream`: a lane of each source, opened when it is first drawn; see `Lane`.

    Args:
        stream: the whole.
        lane, num_lanes: which part of it.
        cursor: where to go on; None is the beginning.
    """

    def __init__(self, stream: MixedStream, lane: int, num_lanes: int, cursor: Cursor | None) -> None:
        self.stream = stream
        self.lane = lane
        self.num_lanes = num_lanes
        self._number = cursor["number"] if cursor else 0
        self._starts = cursor["sources"] if cursor else [None] * len(stream.streams)
        self._lanes: dict[int, Lane] = {}

    def take(self) -> Item:
        """See `Lane.take`."""
        source = self.stream.source_of(self.lane, self._number)
        if source not in self._lanes:
            self._lanes[source] = self.stream.streams[source].lane(
                self.lane, self.num_lanes, self._starts[source]
            )
        self._number += 1
        return self._lanes[source].take()

    def cursor(self) -> Cursor:
        """See `Lane.cursor`."""
        sources = [
            self._lanes[source].cursor() if source in self._lanes else start
            for source, start in enumerate(self._starts)
        ]
        return {"number": self._number, "sources": sources}
