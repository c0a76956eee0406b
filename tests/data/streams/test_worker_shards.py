"""Lanes over shards: against the plain definition of their order, and how little they hold and read."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from etpp_ssl.config import RunFault
from etpp_ssl.data.streams import worker_shards
from etpp_ssl.data.streams.base import Item
from etpp_ssl.data.streams.worker_shards import ShardStream
from etpp_ssl.randomness import keyed_torch

SIZES = (5, 0, 3, 6, 1, 4)
SEED = 3


class Shards:
    """Shards in memory that note what is read of them, and fail when told to."""

    classes = None
    has_labels = True

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        self.sizes = sizes
        self.names = [f"far/{number}.tar" for number in range(len(sizes))]
        self.num_read = 0
        self.num_open = 0
        self.failures: list[tuple[int, int]] = []
        """(shard, item) at which reading fails, once each."""

    def read(self, shard: int, offset: int) -> Iterator[Item]:
        self.num_open += 1
        try:
            for number in range(self.sizes[shard]):
                if (shard, number) in self.failures:
                    self.failures.remove((shard, number))
                    raise ConnectionError("the line\nis dead")
                self.num_read += 1
                if number >= offset:
                    yield Item(f"{self.names[shard]} :: {number}", label=100 * shard + number)
        finally:
            self.num_open -= 1


def stream_of(shards: Shards, buffer: int = 4, retries: int = 0) -> ShardStream:
    return ShardStream(shards, buffer=buffer, retries=retries, seed=SEED)


def plain_order(worker: int, num_workers: int, buffer: int) -> Iterator[int]:
    """The order as it is defined: whole epochs, cut into blocks, each block shuffled."""
    epoch = block = 0
    while True:
        shards = torch.randperm(len(SIZES), generator=keyed_torch(SEED, "shards", epoch)).tolist()
        own = [
            shard
            for place, shard in enumerate(shards)
            if place % num_workers == (worker + epoch) % num_workers
        ]
        items = [100 * shard + number for shard in own for number in range(SIZES[shard])]
        for start in range(0, len(items), buffer):
            part = items[start : start + buffer]
            order = torch.randperm(len(part), generator=keyed_torch(SEED, "block", worker, block)).tolist()
            # Taken from the end.
            yield from [part[place] for place in order][::-1]
            block += 1
        epoch += 1


@pytest.mark.parametrize("buffer", [1, 4, 100])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_order_is_that_of_the_plain_definition(num_workers: int, buffer: int) -> None:
    for worker in range(num_workers):
        reader = stream_of(Shards(), buffer).worker_shard(worker, num_workers, None)
        found = [reader.take().label for _ in range(90)]
        assert found == list(islice(plain_order(worker, num_workers, buffer), 90))


@pytest.mark.parametrize("buffer", [1, 3, 7])
def test_a_worker_shard_holds_one_block_and_one_open_shard(buffer: int) -> None:
    shards = Shards((40, 30, 50))
    items = stream_of(shards, buffer).worker_shard(0, 1, None)
    for number in range(1, 300):
        items.take()
        assert items.num_held <= buffer + 1
        # Never more than the block that comes in, and the item after it.
        assert shards.num_read <= number + buffer + 1
        assert shards.num_open <= 1
    del items
    gc.collect()
    assert shards.num_open == 0


def test_it_goes_on_from_a_cursor_after_any_number_of_items() -> None:
    one, stream = stream_of(Shards()).worker_shard(1, 2, None), stream_of(Shards())
    cursors, items = [], []
    for _ in range(60):
        cursors.append(json.loads(json.dumps(one.cursor())))
        items.append(one.take())
    for start in range(60):
        other = stream.worker_shard(1, 2, cursors[start])
        for place in range(start, min(start + 25, 60)):
            assert other.cursor() == cursors[place]
            assert other.take() == items[place]


def test_going_on_reads_one_shard_to_the_block_and_the_block() -> None:
    shards = Shards((40, 30, 50))
    items = stream_of(shards, 7).worker_shard(0, 1, None)
    for _ in range(200):
        items.take()
    cursor = items.cursor()
    shards.num_read = 0
    stream_of(shards, 7).worker_shard(0, 1, cursor)
    assert shards.num_read <= cursor["offset"] + 7 + cursor["used"] + 1


def test_a_shard_that_fails_is_opened_again_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(worker_shards.time, "sleep", pauses.append)
    expected = stream_of(Shards()).worker_shard(0, 1, None)
    shards = Shards()
    # Twice in a row at the same place, at a first item, and at a last one.
    shards.failures = [(0, 3), (0, 3), (2, 0), (3, 5)]
    items = stream_of(shards, retries=2).worker_shard(0, 1, None)
    assert [items.take() for _ in range(40)] == [expected.take() for _ in range(40)]
    assert sorted(pauses) == [1.0, 1.0, 1.0, 2.0]
    assert not shards.failures


def test_a_shard_that_keeps_failing_is_one_sentence_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_shards.time, "sleep", lambda seconds: None)
    for retries, words in ((0, "after 1 try"), (2, "after 3 tries")):
        shards = Shards((5, 5))
        shards.failures = [(1, 2)] * 9
        items = stream_of(shards, retries=retries).worker_shard(0, 1, None)
        with pytest.raises(RunFault, match=f"shard 'far/1.tar' cannot be read {words}") as error:
            [items.take() for _ in range(20)]
        assert "ConnectionError: the line is dead" in str(error.value)
        assert "\n" not in str(error.value)


def test_shards_without_a_sample_are_one_sentence() -> None:
    with pytest.raises(RunFault, match=r"no image in the 2 shards"):
        stream_of(Shards((0, 0))).worker_shard(0, 1, None)


def test_the_fingerprint_is_of_the_shards_wherever_they_lie() -> None:
    here, there, fewer = Shards(), Shards(), Shards(SIZES[:-1])
    there.names = [name.replace("far/", "https://near/er/") for name in there.names]
    found = [stream_of(shards).fingerprint() for shards in (here, there, fewer)]
    assert found[0] == found[1] != found[2]
