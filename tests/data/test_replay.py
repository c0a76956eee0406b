"""Replay: a buffer that forgets the oldest, keyed draws, and the same step for any way of loading it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etpp_ssl.curriculum.base import Curriculum, Portion, ReplaySpec
from etpp_ssl.data.augmentation import AugmentConfig
from etpp_ssl.data.loader import BadImage, Batch, BatchBuilder, load_batches
from etpp_ssl.data.replay import Replay, Ring, buffer_bytes, draw_places, sub_batch_size
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder, RequestSampler
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.views import TrainView
from etpp_ssl.randomness import keyed_torch

SIZE = (8, 12)
SEED = 5
BATCH_SIZE = 12


def curriculum_of(*replays: ReplaySpec | None, batch_size: int = BATCH_SIZE) -> Curriculum:
    """Stages of nine steps each, at growing bandwidths."""
    bandwidths = [(4, 6), (6, 8), SIZE][-len(replays) :]
    areas = [height * width for height, width in bandwidths]
    return Curriculum(
        [
            Portion(bandwidth, area / sum(areas), batch_size, replay)
            for bandwidth, area, replay in zip(bandwidths, areas, replays, strict=True)
        ],
        image_size=SIZE,
        num_images=30,
        budget_epochs=9 * batch_size * sum(areas) / (SIZE[0] * SIZE[1] * 30),
    )


def loaded(curriculum: Curriculum, first: int, num_workers: int = 0, **part: Any) -> Iterator[Batch]:
    """What the loader gives from step `first` on, cut by its workers as `lanczos` does.

    The views depend on the progress of the step that loads them.
    """
    source = SyntheticConfig(num_images=30, num_classes=7).open("train", in_chans=3, image_size=SIZE, seed=0)
    order = KeyedOrder(len(source), SEED)
    base = TrainView(image_size=SIZE, crop_scale=(0.5, 1.0), flip=True, lanczos=True, seed=SEED)
    view = AugmentConfig(ramp=True).build_view(base, mean=(0.5, 0.5, 0.5))
    requests = RequestSampler(order, curriculum.stage_at, range(first, curriculum.num_steps), **part)
    return load_batches(
        BatchBuilder(source, view, order),
        requests,
        num_workers=num_workers,
        prefetch=2,
        pin_memory=False,
    )


def trained(curriculum: Curriculum, start: int = 0, num_workers: int = 0, **part: Any) -> list[Batch]:
    """What a run that starts at `start` trains on."""
    replay = Replay(curriculum.stage_at, start, seed=SEED, say=lambda text: None, **part)
    fresh = loaded(curriculum, replay.first_read, num_workers, **part)
    replay.refill(fresh)
    return list(replay.batches(fresh))


def by_step(found: list[Batch]) -> dict[int, list[Batch]]:
    return {step: list(group) for step, group in groupby(found, key=lambda batch: batch.request.step)}


def whole(parts: list[Batch], key: str) -> torch.Tensor:
    return torch.cat([getattr(part, key) for part in parts])


def plain_replay(curriculum: Curriculum, rank: int, num_processes: int) -> Iterator[dict[str, torch.Tensor]]:
    """The definition: a list of mini-batches, cut into sub-batches, some of which are drawn."""
    kept: deque[Batch] = deque()
    stage_index = -1
    for fresh in loaded(curriculum, 0, rank=rank, num_processes=num_processes):
        stage = curriculum.stage_at(fresh.request.step)
        if stage.index != stage_index:
            kept, stage_index = deque(maxlen=stage.replay.buffer if stage.replay else 1), stage.index
        kept.append(fresh)
        images = [image for batch in kept for image in batch.images]
        labels = [label for batch in kept for label in batch.labels]
        size = sub_batch_size(len(fresh.images))
        sub_batches = [range(i, i + size) for i in range(0, len(images), size)]
        generator = keyed_torch(SEED, "replay", stage.step, rank)
        count = (stage.times - 1) * len(fresh.images) // size
        drawn = [
            sub_batches[i] for i in torch.randint(len(sub_batches), (count,), generator=generator).tolist()
        ]
        places = [place for sub_batch in drawn for place in sub_batch]
        yield {
            "images": torch.stack([*fresh.images, *(images[place] for place in places)]),
            "labels": torch.stack([*fresh.labels, *(labels[place] for place in places)]),
        }


def batch_of(first: int, count: int, bad: tuple[BadImage, ...] = ()) -> Batch:
    numbers = torch.arange(first, first + count)
    positions = tuple(numbers.tolist())
    request = BatchRequest(0, positions, tuple(n + 1000 for n in positions), (2, 3), 0.5, 1.0, True)
    images = (numbers % 256).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 3)
    return Batch(images, numbers % 7, numbers, first, request, bad)


@given(num_rows=st.integers(1, 9), counts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_ring_keeps_the_newest_in_order_as_a_deque_does(num_rows: int, counts: list[int]) -> None:
    ring, twin = Ring(num_rows, torch.zeros(3, 2, 3, dtype=torch.uint8)), deque[int](maxlen=num_rows)
    memory = ring._images.data_ptr()
    added = 0
    for count in (min(count, num_rows) for count in counts):
        ring.add(batch_of(added, count))
        twin.extend(range(added, added + count))
        added += count
        assert len(ring) == len(twin)
        images, labels, samples, indices = ring.take(torch.arange(len(twin)))
        assert images.dtype == torch.uint8
        assert images[:, 0, 0, 0].tolist() == [n % 256 for n in twin]
        assert labels.tolist() == [n % 7 for n in twin]
        assert samples == list(twin)
        assert indices == [n + 1000 for n in twin]
    assert ring._images.data_ptr() == memory
    assert ring._images.untyped_storage().nbytes() == buffer_bytes(num_rows, (3, 2, 3))


def test_what_was_taken_is_a_copy() -> None:
    ring = Ring(2, torch.zeros(3, 2, 3, dtype=torch.uint8))
    ring.add(batch_of(0, 2))
    images, labels, *_ = ring.take(torch.tensor([0, 1, 0]))
    ring.add(batch_of(5, 2))
    assert images[:, 0, 0, 0].tolist() == labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("mini_batch", "size"),
    [(1, 1), (5, 1), (32, 1), (63, 1), (64, 2), (97, 1), (100, 2), (128, 4), (512, 16)],
)
def test_a_sub_batch_is_a_32nd_or_the_next_smaller_divisor(mini_batch: int, size: int) -> None:
    assert sub_batch_size(mini_batch) == size


def draws(step: int = 0, rank: int = 0, seed: int = 0) -> list[int]:
    places = draw_places(3 * 128, 128, 3 * 128, seed=seed, step=step, rank=rank)
    rows = places.view(-1, 4)
    assert torch.equal(rows, rows[:, :1] + torch.arange(4)), "not whole sub-batches"
    assert (rows[:, 0] % 4 == 0).all()
    return (rows[:, 0] // 4).tolist()


def test_draws_are_whole_sub_batches_keyed_and_with_replacement() -> None:
    assert draws() == draws()
    assert len({tuple(draws(step, rank, seed)) for step in (0, 1) for rank in (0, 1) for seed in (0, 1)}) == 8
    # 96 draws from 96 sub-batches: without replacement none would come twice.
    assert all(max(Counter(draws(step)).values()) > 1 for step in range(5))


def test_draws_are_uniform_over_the_buffer_its_newest_mini_batch_included() -> None:
    counts = Counter(place for step in range(300) for place in draws(step))
    assert set(counts) == set(range(96))
    # 300 expected each, standard deviation 17.
    assert 220 < min(counts.values()) <= max(counts.values()) < 380


@pytest.mark.parametrize(
    ("num_processes", "micro_batch_size", "num_workers"),
    [(1, None, 0), (1, 1, 0), (1, 5, 0), (1, 100, 0), (1, None, 2), (1, 5, 2), (3, None, 0), (3, 3, 0)],
)
def test_a_step_is_that_of_the_plain_definition(
    num_processes: int, micro_batch_size: int | None, num_workers: int
) -> None:
    curriculum = curriculum_of(ReplaySpec(times=4, buffer=5), None, ReplaySpec(times=2, buffer=2))
    assert [stage.num_steps for stage in curriculum.stages] == [9, 9, 9]
    for rank in range(num_processes):
        found = by_step(
            trained(
                curriculum,
                num_workers=num_workers,
                rank=rank,
                num_processes=num_processes,
                micro_batch_size=micro_batch_size,
            )
        )
        twin = list(plain_replay(curriculum, rank, num_processes))
        assert list(found) == list(range(27))
        for step, parts in found.items():
            for key in ("images", "labels"):
                assert torch.equal(whole(parts, key), twin[step][key])
            assert all(len(part.images) <= (micro_batch_size or BATCH_SIZE) for part in parts)
            assert [part.request.last for part in parts] == [False] * (len(parts) - 1) + [True]
            assert {part.request.bandwidth for part in parts} == {curriculum.stage_at(step).bandwidth}


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_a_step_trains_on_a_whole_batch_with_numbers_that_never_come_twice(
    num_processes: int, micro_batch_size: int | None
) -> None:
    curriculum = curriculum_of(ReplaySpec(times=4, buffer=5), ReplaySpec(times=2, buffer=99), None)
    found = [
        batch
        for rank in range(num_processes)
        for batch in trained(
            curriculum, rank=rank, num_processes=num_processes, micro_batch_size=micro_batch_size
        )
    ]
    numbers = sorted(number for batch in found for number in batch.sample_ids.tolist())
    assert numbers == list(range(27 * BATCH_SIZE))
    order = KeyedOrder(30, SEED)
    for step in range(27):
        stage = curriculum.stage_at(step)
        parts = [batch for batch in found if batch.request.step == step]
        assert sum(len(part.images) for part in parts) == BATCH_SIZE
        assert sum(part.request.weight for part in parts) == pytest.approx(1.0)
        for part in parts:
            assert part.request.weight == len(part.images) / BATCH_SIZE
            assert set(part.sample_ids.tolist()) <= set(stage.slots)
            # The request says which sample, that is which view of which image, each of them is.
            assert part.request.progress == stage.progress
            assert part.first_sample_id == part.sample_ids[0]
            assert part.request.indices == tuple(order.index(number) for number in part.request.sample_ids)
            assert part.labels.tolist() == [index % 7 for index in part.request.indices]
            oldest = curriculum.stage_at(stage.oldest_step).samples.start
            assert set(part.request.sample_ids) <= set(range(oldest, stage.samples.stop))


def test_without_replay_every_batch_is_what_the_loader_gave() -> None:
    for curriculum in (curriculum_of(None, None), curriculum_of(ReplaySpec(times=1, buffer=7), None)):
        given = list(loaded(curriculum, 0, micro_batch_size=5))
        found = trained(curriculum, micro_batch_size=5)
        assert len(given) == len(found)
        for one, other in zip(given, found, strict=True):
            assert one.request == other.request
            for key in ("images", "labels", "sample_ids"):
                assert torch.equal(getattr(one, key), getattr(other, key))


def test_a_stage_starts_with_an_empty_buffer() -> None:
    # The same bandwidth, so that a buffer which is not emptied would go unnoticed otherwise.
    curriculum = Curriculum(
        [Portion(SIZE, 0.5, BATCH_SIZE, ReplaySpec(times=times, buffer=99)) for times in (4, 2)],
        image_size=SIZE,
        num_images=30,
        budget_epochs=6.0,
    )
    first = curriculum.stages[1].first_step
    order = KeyedOrder(30, SEED)
    parts = by_step(trained(curriculum))
    for step in (first - 1, first):
        stage = curriculum.stage_at(step)
        fresh = {order.index(position) for position in stage.samples}
        used = set(parts[step][0].request.indices)
        assert fresh <= used
        assert (used == fresh) == (step == first)


INTERRUPTED = curriculum_of(ReplaySpec(times=3, buffer=4), ReplaySpec(times=2, buffer=100), None)


@pytest.fixture(
    scope="module",
    params=[{}, {"micro_batch_size": 2}, {"rank": 1, "num_processes": 2, "micro_batch_size": 4}],
    ids=str,
)
def uninterrupted(request: pytest.FixtureRequest) -> tuple[dict[str, int], list[Batch]]:
    """A process's part, and what it trains on."""
    return request.param, trained(INTERRUPTED, **request.param)


@pytest.mark.parametrize("start", [1, 3, 4, 8, 9, 10, 20])
def test_a_buffer_that_is_read_again_is_the_one_there_was(
    start: int, uninterrupted: tuple[dict[str, int], list[Batch]]
) -> None:
    part, batches = uninterrupted
    expected = [batch for batch in batches if batch.request.step >= start]
    found = trained(INTERRUPTED, start, **part)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.request == other.request
        for key in ("images", "labels", "sample_ids"):
            assert torch.equal(getattr(one, key), getattr(other, key))


def test_no_more_is_read_again_than_the_buffer_held_and_it_is_said() -> None:
    curriculum = curriculum_of(ReplaySpec(times=4, buffer=4), None)
    for start, first in {0: 0, 1: 0, 3: 0, 4: 1, 8: 5, 9: 9, 12: 12}.items():
        lines: list[str] = []
        replay = Replay(curriculum.stage_at, start, seed=SEED, say=lines.append)
        assert replay.first_read == first
        replay.refill(loaded(curriculum, first))
        assert bool(lines) == (first < start)
        if lines:
            assert f"last {start - first} mini-batches ({3 * (start - first)} images" in lines[0]


def test_bad_images_are_passed_on_once() -> None:
    curriculum = curriculum_of(ReplaySpec(times=4, buffer=3), batch_size=8)
    bad = tuple(BadImage(i, f"{i}.jpg", "it is torn") for i in range(3))
    fresh = [
        Batch(
            torch.zeros(1, 3, *SIZE, dtype=torch.uint8),
            torch.tensor([0]),
            torch.tensor([number]),
            number,
            BatchRequest(number // 2, (number,), (number,), SIZE, 0.5, 0.5, number % 2 == 1),
            (bad[number],) if number < 3 else (),
        )
        for number in range(4)
    ]
    replay = Replay(curriculum.stage_at, 0, seed=SEED, say=pytest.fail, micro_batch_size=3)
    found = by_step(list(replay.batches(iter(fresh))))
    assert [batch.bad for batch in found[0]] == [bad[:2], (), ()]
    assert [batch.bad for batch in found[1]] == [bad[2:], (), ()]
