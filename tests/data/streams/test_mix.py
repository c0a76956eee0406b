"""A mix of streams: shares, and worker shards that know where each source stands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from stream_sources import write_tars

from etpp_ssl.data.streams.mix import MixConfig, MixedStream, WebDatasetPart


def opened(folder: Path, weights: list[float], seed: int = 0) -> MixedStream:
    for number in range(len(weights)):
        write_tars(folder / str(number), first=100 * number)
    parts = tuple(
        WebDatasetPart(urls=str(folder / str(number)), weight=weight, shuffle_buffer=5)
        for number, weight in enumerate(weights)
    )
    return MixConfig(sources=parts, num_images=31).open_stream(seed)


def test_samples_come_in_proportion_to_the_weights_from_a_keyed_draw(tmp_path: Path) -> None:
    stream = opened(tmp_path, [1.0, 4.0, 3.0])
    drawn = [stream.source_of(2, number) for number in range(8000)]
    counts = Counter(drawn)
    assert [counts[source] / 8000 for source in range(3)] == pytest.approx([1 / 8, 4 / 8, 3 / 8], abs=0.02)
    assert drawn == [stream.source_of(2, number) for number in range(8000)]
    assert drawn[:50] != [stream.source_of(3, number) for number in range(50)]
    assert drawn[:50] != [opened(tmp_path, [1.0, 4.0, 3.0], seed=1).source_of(2, n) for n in range(50)]
    items = stream.worker_shard(2, 3, None)
    assert [items.take().label // 100 for _ in range(200)] == drawn[:200]


def test_each_source_goes_through_its_own_worker_shard_and_epochs(tmp_path: Path) -> None:
    stream = opened(tmp_path, [1.0, 2.0])
    items = stream.worker_shard(1, 2, None)
    found = [items.take().label for _ in range(120)]
    for source, part in enumerate(stream.streams):
        alone = part.worker_shard(1, 2, None)
        own = [label for label in found if label // 100 == source]
        assert own == [alone.take().label for _ in own]
    orders = [[label % 100 for label in found if label // 100 == source][:20] for source in range(2)]
    assert orders[0] != orders[1], "the sources are read in the same order"


def test_a_source_that_was_not_drawn_yet_is_not_opened(tmp_path: Path) -> None:
    stream = opened(tmp_path, [1e-9, 1.0])
    items = stream.worker_shard(0, 1, None)
    labels = [items.take().label for _ in range(10)]
    assert min(labels) >= 100
    cursor = items.cursor()
    assert cursor["number"] == 10
    assert cursor["sources"][0] is None
    assert stream.worker_shard(0, 1, cursor).take() == items.take()


def test_wrong_weights_and_no_sources_are_refused() -> None:
    for sources, words in (
        ([], "give at least one source"),
        ([{"name": "webdataset", "urls": "x", "weight": 0}], "greater than 0"),
        ([{"name": "mix", "sources": []}], "does not match any of the expected tags"),
    ):
        with pytest.raises(ValidationError, match=words):
            MixConfig.model_validate({"sources": sources, "num_images": 1})
