"""Keyed draws: the same words on every path, for every batch, in every version."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etpp_ssl.randomness import (
    derive_key,
    freshly_initialised,
    keyed_numpy,
    keyed_random,
    keyed_torch,
    keyed_words,
)

int64s = st.integers(-(2**63), 2**63 - 1)


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def splitmix64(state: int) -> int:
    """The generator's next output after `state`, as published (Steele, Lea and Flood, 2014)."""
    word = np.array([state % 2**64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((word ^ (word >> np.uint64(31)))[0])


def test_this_files_splitmix64_gives_the_published_sequence() -> None:
    gamma = 0x9E3779B97F4A7C15
    outputs = [splitmix64(1234567 + i * gamma) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(), st.lists(int64s, max_size=3), int64s)
@settings(deadline=None, max_examples=50)
def test_each_number_of_the_position_is_one_splitmix64_step(
    seed: int, position: list[int], last: int
) -> None:
    before = derive_key(seed, "crop", *position)
    assert derive_key(seed, "crop", *position, last) == splitmix64(before + last % 2**64)


@given(st.integers(), st.text(max_size=8), st.lists(int64s, min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_keyed_words_are_derive_key_of_position_and_column(
    seed: int, purpose: str, positions: list[int]
) -> None:
    words = keyed_words(seed, purpose, torch.tensor(positions), 5)
    assert words.dtype == torch.int64
    assert words.tolist() == [
        [signed(derive_key(seed, purpose, position, column)) for column in range(5)] for position in positions
    ]


def test_a_row_does_not_depend_on_the_rest_of_the_batch_or_on_the_number_of_draws() -> None:
    positions = torch.tensor([17, 3, 2**40, 3, 0])
    words = keyed_words(7, "mask", positions, 11)
    assert torch.equal(words[1], words[3])
    assert torch.equal(words.flip(0), keyed_words(7, "mask", positions.flip(0), 11))
    for row, position in zip(words, positions, strict=True):
        assert torch.equal(row[None], keyed_words(7, "mask", position[None], 11))
        assert torch.equal(row[None, :4], keyed_words(7, "mask", position[None], 4))


def test_int32_positions_give_the_words_of_the_same_int64_positions() -> None:
    positions = torch.tensor([0, 1, 2**31 - 1, -4])
    assert torch.equal(
        keyed_words(1, "mask", positions.to(torch.int32), 3), keyed_words(1, "mask", positions, 3)
    )


def bits_of(words: torch.Tensor) -> torch.Tensor:
    return (words[..., None] >> torch.arange(64)) & 1


def test_every_bit_is_as_often_one_as_zero() -> None:
    words = keyed_words(0, "mask", torch.arange(2048), 32)
    share = bits_of(words).double().mean(dim=(0, 1))
    deviation = 0.5 / words.numel() ** 0.5
    assert (share - 0.5).abs().max() < 5 * deviation
    assert words.unique().numel() == words.numel()


@pytest.mark.parametrize("neighbour", ["position", "column", "seed", "purpose"])
def test_neighbours_differ_in_half_of_their_bits(neighbour: str) -> None:
    positions = torch.arange(4096)
    words = keyed_words(5, "mask", positions, 2)
    first = words[:, 0]
    second = {
        "position": keyed_words(5, "mask", positions + 1, 1)[:, 0],
        "column": words[:, 1],
        "seed": keyed_words(6, "mask", positions, 1)[:, 0],
        "purpose": keyed_words(5, "mask2", positions, 1)[:, 0],
    }[neighbour]
    flipped = bits_of(first ^ second).double().mean(dim=0)
    assert (flipped - 0.5).abs().max() < 5 * 0.5 / len(positions) ** 0.5


def test_purposes_seeds_and_positions_have_keys_of_their_own() -> None:
    places: list[tuple[int, ...]] = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,)]
    keys = {
        derive_key(seed, purpose, *place)
        for seed in (-1, 0, 1, 2)
        for purpose in ("crop", "flip", "mask", "order", "")
        for place in places
    }
    assert len(keys) == 4 * 5 * 7
    assert all(0 <= key < 2**64 for key in keys)


def test_generators_repeat_at_their_key_and_differ_elsewhere() -> None:
    def draws(*where: int) -> list[float]:
        return [
            keyed_random(3, "crop", *where).random(),
            float(keyed_numpy(3, "crop", *where).random()),
            float(torch.rand((), generator=keyed_torch(3, "crop", *where), dtype=torch.float64)),
        ]

    assert draws(4, 2) == draws(4, 2)
    assert all(a != b for a, b in zip(draws(4, 2), draws(4, 3), strict=True))
    assert all(a != b for a, b in zip(draws(4, 2), draws(2, 4), strict=True))


def test_generators_neither_read_nor_move_the_global_ones() -> None:
    def draw_globally() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed_globally() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed_globally()
    expected = draw_globally()
    seed_globally()
    keyed_random(0, "a").random()
    keyed_numpy(0, "a").random()
    torch.rand(2, generator=keyed_torch(0, "a"))
    keyed_words(0, "a", torch.arange(3), 2)
    assert draw_globally() == expected


def test_known_answers_that_every_recorded_run_rests_on() -> None:
    # A change here changes the data order, crops and masks of every run, and breaks their resume.
    assert derive_key(0, "mask") == 10276963935945746565
    assert derive_key(0, "mask", 0) == 16959833732139076675
    assert derive_key(1, "mask", 0, 1) == 9663404358074986400
    assert derive_key(-1, "crop", 7) == 5294260943738286142
    assert derive_key(2**63 + 5, "flip", 2**40, 3) == 5710431003291088879
    assert keyed_random(0, "crop", 5).random() == 0.6083423597940617
    assert keyed_words(3, "mask", torch.tensor([0, -1, 2**62]), 2).tolist() == [
        [2097669279068799530, -2906508824468617436],
        [-7794665735072838416, 8098663495142255363],
        [-5817954598566111609, 5898890210213967344],
    ]


def test_initial_weights_are_of_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = freshly_initialised(7, lambda: torch.nn.Linear(4, 4)).weight
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.equal(first, freshly_initialised(7, lambda: torch.nn.Linear(4, 4)).weight)
    assert not torch.equal(first, freshly_initialised(8, lambda: torch.nn.Linear(4, 4)).weight)
