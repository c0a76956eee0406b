"""Which image is sample number g, whoever asks; and who builds which part of a step."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etpp_ssl.data.sampler import (
    BalancedOrder,
    BatchRequest,
    KeyedOrder,
    RequestSampler,
    micro_batch_of,
    process_part,
)
from etpp_ssl.data.uneven import Balance, class_shares

bounded = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Plan:
    """Steps of one batch size, at a bandwidth that grows."""

    step: int
    batch_size: int

    @property
    def bandwidth(self) -> tuple[int, int]:
        return 8 + self.step, 16 + self.step

    @property
    def progress(self) -> float:
        return self.step / 100

    @property
    def samples(self) -> range:
        return range(self.step * self.batch_size, (self.step + 1) * self.batch_size)


def requests(
    num_images: int,
    batch_size: int,
    steps: range,
    rank: int = 0,
    num_processes: int = 1,
    micro_batch_size: int | None = None,
) -> list[BatchRequest]:
    sampler = RequestSampler(
        KeyedOrder(num_images, seed=3),
        lambda step: Plan(step, batch_size),
        steps,
        rank,
        num_processes,
        micro_batch_size,
    )
    return list(sampler)


@pytest.mark.parametrize("num_images", [1, 2, 17, 1000])
def test_every_epoch_shows_every_image_once(num_images: int) -> None:
    order = KeyedOrder(num_images, seed=5)
    for epoch in (0, 1, 2, 10**6):
        first = epoch * num_images
        shown = [order.index(position) for position in range(first, first + num_images)]
        assert sorted(shown) == list(range(num_images))


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [
        tuple(KeyedOrder(100, seed).index(epoch * 100 + place) for place in range(100))
        for seed in (0, 1)
        for epoch in range(6)
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(range(100)) not in orders


def test_the_order_is_a_shuffle_and_not_a_shift() -> None:
    # The image in the first place, over many epochs: each of five about equally often.
    order = KeyedOrder(5, seed=0)
    first = Counter(order.index(5 * epoch) for epoch in range(2000))
    assert set(first) == set(range(5))
    assert max(first.values()) < 1.25 * min(first.values())
    steps = {(order.index(5 * e + 1) - order.index(5 * e)) % 5 for e in range(100)}
    assert steps == {1, 2, 3, 4}


@bounded
@given(
    num_images=st.integers(1, 40),
    seed=st.integers(-(2**70), 2**70),
    positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=12),
)
def test_the_image_is_a_function_of_seed_and_position_in_any_order(
    num_images: int, seed: int, positions: list[int]
) -> None:
    order = KeyedOrder(num_images, seed)
    forward = [order.index(position) for position in positions]
    backward = [order.index(position) for position in reversed(positions)]
    alone = [KeyedOrder(num_images, seed).index(position) for position in positions]
    assert forward == backward[::-1] == alone
    assert all(0 <= index < num_images for index in forward)


def test_replacements_are_keyed_by_position_and_attempt() -> None:
    order, other = KeyedOrder(1000, seed=1), KeyedOrder(1000, seed=1)
    drawn = [[order.replacement(position, attempt) for attempt in range(1, 20)] for position in range(20)]
    again = [[other.replacement(position, attempt) for attempt in range(1, 20)] for position in range(20)]
    assert drawn == again
    flat = [index for row in drawn for index in row]
    assert min(flat) >= 0
    assert max(flat) < 1000
    assert len(set(flat)) > 250
    assert KeyedOrder(1000, seed=2).replacement(0, 1) != order.replacement(0, 1)
    # Whoever has asked before makes no difference to the order either.
    assert [order.index(i) for i in range(50)] == [KeyedOrder(1000, seed=1).index(i) for i in range(50)]


@bounded
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 3, 7, 40]), min_size=1, max_size=6).filter(any),
    balance=st.sampled_from(["sqrt", "uniform"]),
    epochs=st.integers(1, 7),
)
def test_balanced_classes_have_their_shares_and_their_images_are_drawn_equally_often(
    counts: list[int], balance: Balance, epochs: int
) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    num_samples = epochs * len(labels)
    order = BalancedOrder(labels, 3, balance)
    drawn = [order.index(sample) for sample in range(num_samples)]
    shares = class_shares(counts, balance)
    for label in set(labels):
        times = [drawn.count(image) for image, own in enumerate(labels) if own == label]
        assert max(times) - min(times) <= 1
        assert abs(sum(times) - num_samples * shares[label] / sum(shares)) < 1


def test_a_balanced_order_is_a_function_of_seed_and_sample_and_each_epoch_is_mixed() -> None:
    labels = [0] * 40 + [1] * 4 + [2] * 16
    order = BalancedOrder(labels, 3, "uniform")
    samples = [0, 59, 60, 61, 7, 10**7, 119, 0, 60]
    assert [order.index(g) for g in samples] == [
        BalancedOrder(labels, 3, "uniform").index(g) for g in samples
    ]
    epochs = [[order.index(60 * epoch + place) for place in range(60)] for epoch in range(6)]
    assert len(set(map(tuple, epochs))) == 6
    other = BalancedOrder(labels, 4, "uniform")
    assert [other.index(place) for place in range(60)] != epochs[0]
    for epoch in epochs:
        classes = [labels[image] for image in epoch]
        assert Counter(classes) == {0: 20, 1: 20, 2: 20}
        # Shuffled classes change at about two places of three.
        assert 30 < sum(a != b for a, b in pairwise(classes)) < 50


def test_balanced_replacements_are_keyed_and_come_in_the_classes_shares() -> None:
    labels = [0] * 90 + [2] * 10
    order = BalancedOrder(labels, 1, "uniform")
    drawn = [order.replacement(sample, attempt) for sample in range(200) for attempt in (1, 2)]
    again = BalancedOrder(labels, 1, "uniform")
    assert drawn == [again.replacement(sample, attempt) for sample in range(200) for attempt in (1, 2)]
    assert 150 < sum(labels[image] == 2 for image in drawn) < 250
    assert len(set(drawn)) > 80


@bounded
@given(start=st.integers(0, 10**6), count=st.integers(0, 300), num_processes=st.integers(1, 40))
def test_parts_of_a_step_are_contiguous_disjoint_complete_and_even(
    start: int, count: int, num_processes: int
) -> None:
    samples = range(start, start + count)
    parts = [process_part(samples, rank, num_processes) for rank in range(num_processes)]
    assert [position for part in parts for position in part] == list(samples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 4, 7, 100])
@pytest.mark.parametrize("batch_size", [5, 12, 13])
def test_a_step_is_the_same_for_any_number_of_processes_and_any_micro_batch_size(
    num_processes: int, micro_batch_size: int | None, batch_size: int
) -> None:
    steps = range(2, 6)
    whole = {request.step: request for request in requests(30, batch_size, steps)}
    assert list(whole) == list(steps)
    by_rank = [
        requests(30, batch_size, steps, rank, num_processes, micro_batch_size)
        for rank in range(num_processes)
    ]
    for step in steps:
        parts = [request for rank in by_rank for request in rank if request.step == step]
        assert sum((part.sample_ids for part in parts), ()) == whole[step].sample_ids
        assert sum((part.indices for part in parts), ()) == whole[step].indices
        assert math.isclose(sum(part.weight for part in parts), 1.0)
        for part in parts:
            assert part.weight == len(part.sample_ids) / batch_size
            assert 1 <= len(part.sample_ids) == len(part.indices) <= (micro_batch_size or batch_size)
            assert part.bandwidth == (8 + step, 16 + step)
            assert part.progress == step / 100


@bounded
@given(
    num_processes=st.integers(1, 5),
    micro_batch_size=st.none() | st.integers(1, 20),
    batch_size=st.integers(5, 30),
)
def test_every_process_ends_every_step_exactly_once(
    num_processes: int, micro_batch_size: int | None, batch_size: int
) -> None:
    for rank in range(num_processes):
        mine = requests(11, batch_size, range(3), rank, num_processes, micro_batch_size)
        steps = [(step, list(group)) for step, group in groupby(mine, key=lambda request: request.step)]
        assert [step for step, _ in steps] == [0, 1, 2]
        for _, group in steps:
            assert [request.last for request in group] == [False] * (len(group) - 1) + [True]


@pytest.mark.parametrize("first_step", [1, 3, 7])
def test_a_start_in_the_middle_gives_the_tail_of_the_whole(first_step: int) -> None:
    whole = requests(10, 7, range(8), rank=1, num_processes=2, micro_batch_size=2)
    tail = requests(10, 7, range(first_step, 8), rank=1, num_processes=2, micro_batch_size=2)
    assert tail
    assert tail == [request for request in whole if request.step >= first_step]


def test_a_step_may_straddle_two_epochs() -> None:
    shown = [index for request in requests(10, 4, range(5), micro_batch_size=3) for index in request.indices]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10))
    order = KeyedOrder(10, seed=3)
    assert shown == [order.index(position) for position in range(20)]


def test_a_batch_may_be_larger_than_the_data_set() -> None:
    (request,) = requests(3, 10, range(1))
    assert request.sample_ids == tuple(range(10))
    assert all(sorted(request.indices[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))


def test_iterating_twice_gives_the_same_requests() -> None:
    sampler = RequestSampler(KeyedOrder(9, seed=0), lambda step: Plan(step, 5), range(6))
    assert list(sampler) == list(sampler)


def test_no_steps_are_no_requests() -> None:
    assert requests(10, 4, range(5, 5)) == []


def test_larger_steps_get_larger_micro_batches_in_proportion() -> None:
    sizes = [10, 10, 54, 5, 1]
    starts = [sum(sizes[:step]) for step in range(len(sizes))]
    sampler = RequestSampler(
        KeyedOrder(30, seed=3),
        lambda step: Growing(range(starts[step], starts[step] + sizes[step])),
        range(len(sizes)),
        micro_batch_size=4,
        batch_size=10,
    )
    found = [[len(request.sample_ids) for request in step] for _, step in groupby(sampler, lambda r: r.step)]
    # 54 / 10 of 4 is 21.6; a half is 2; less than one is one.
    assert found == [[4, 4, 2], [4, 4, 2], [21, 21, 12], [2, 2, 1], [1]]
    assert [micro_batch_of(size, 4, 10) for size in sizes] == [4, 4, 21, 2, 1]
    assert [micro_batch_of(size, None, 10) for size in sizes] == sizes
    assert [micro_batch_of(size, 4, None) for size in sizes] == [4, 4, 4, 4, 1]


@dataclass(frozen=True)
class Growing:
    """A step of any size."""

    samples: range
    bandwidth: tuple[int, int] = (8, 16)
    progress: float = 0.5
