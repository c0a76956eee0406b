"""Masks: exact in number, uniform, and a function of (seed, sample) alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etpp_ssl.config import UserError
from etpp_ssl.model.mask_patterns import UniformMaskingConfig
from etpp_ssl.model.masking import Masker, num_visible, random_masking, removed_ids


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    num_patches = draw(st.integers(2, 80))
    return num_patches, draw(st.integers(1, num_patches - 1))


@given(counts(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
@settings(deadline=None, max_examples=60)
def test_every_row_keeps_exactly_k_distinct_patches_in_ascending_order(
    count: tuple[int, int], seed: int, first: int
) -> None:
    num_patches, num_keep = count
    ids = random_masking(torch.arange(first, first + 5), num_patches, num_keep, seed)
    assert ids.dtype == torch.int64
    assert ids.shape == (5, num_keep)
    assert ids.min() >= 0
    assert ids.max() < num_patches
    assert (ids.diff(dim=1) > 0).all()


def test_a_samples_mask_does_not_depend_on_its_batch() -> None:
    positions = torch.tensor([12, 5, 2**33, 7, 12])
    masks = random_masking(positions, 77, 19, seed=4)
    assert torch.equal(masks[0], masks[4])
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(random_masking(positions[order], 77, 19, seed=4), masks[order])
    for mask, position in zip(masks, positions, strict=True):
        assert torch.equal(random_masking(position[None], 77, 19, seed=4)[0], mask)


def test_a_mask_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(0)
    first = random_masking(torch.arange(4), 20, 5, seed=1)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(random_masking(torch.arange(4), 20, 5, seed=1), first)


def test_samples_and_seeds_have_masks_of_their_own() -> None:
    masks = [random_masking(torch.arange(200), 49, 12, seed) for seed in (0, 1, -1)]
    rows = torch.cat(masks)
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize(("num_patches", "num_keep"), [(35, 9), (36, 33), (10, 1)])
def test_every_patch_and_every_pair_is_kept_equally_often(num_patches: int, num_keep: int) -> None:
    num_samples = 6000
    ids = random_masking(torch.arange(num_samples), num_patches, num_keep, seed=0)
    kept = torch.zeros(num_samples, num_patches).scatter(1, ids, 1.0)
    share = num_keep / num_patches
    expected = num_samples * share
    # Pearson's statistic of a sample without replacement: chi-square with N - 1 degrees of freedom.
    statistic = ((kept.sum(0) - expected) ** 2).sum() / (expected * (1 - share))
    statistic = statistic * (num_patches - 1) / num_patches
    freedom = num_patches - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)

    together = (kept.T @ kept)[~torch.eye(num_patches, dtype=torch.bool)] / num_samples
    chance = share * (num_keep - 1) / (num_patches - 1)
    deviation = math.sqrt(max(chance * (1 - chance), 1e-12) / num_samples)
    assert (together - chance).abs().max() < 5 * deviation + 1e-6


def test_known_masks_that_every_recorded_run_rests_on() -> None:
    # A change here changes the masks of every run, and breaks the resume of those under way.
    assert random_masking(torch.tensor([0, 1, 123456789]), 35, 9, seed=0).tolist() == [
        [2, 9, 16, 20, 25, 27, 29, 32, 33],
        [3, 9, 14, 18, 23, 24, 31, 32, 34],
        [1, 3, 9, 11, 12, 17, 18, 30, 34],
    ]


@given(counts(), st.integers(0, 1000), st.booleans())
@settings(deadline=None, max_examples=60)
def test_removed_ids_are_the_ascending_complement(count: tuple[int, int], first: int, shuffled: bool) -> None:
    num_patches, num_keep = count
    ids = random_masking(torch.arange(first, first + 4), num_patches, num_keep, seed=0)
    if shuffled:
        ids = ids.flip(1)
    removed = removed_ids(ids, num_patches)
    assert removed.dtype == torch.int64
    for kept, left in zip(ids.tolist(), removed.tolist(), strict=True):
        assert left == sorted(set(range(num_patches)) - set(kept))


def test_nothing_is_removed_where_everything_is_kept() -> None:
    assert removed_ids(torch.arange(6).expand(2, 6), 6).shape == (2, 0)


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "keep"),
    [(196, 0.75, 49), (100, 0.9, 10), (100, 0.8, 20), (35, 0.6, 14), (9, 0.5, 4), (2, 0.5, 1)],
)
def test_the_visible_count_is_the_nearest_whole_number(
    num_patches: int, mask_ratio: float, keep: int
) -> None:
    # The original truncates, in floating point: 9 of 100 at a ratio of 0.9, and 19 at 0.8.
    assert num_visible(num_patches, mask_ratio) == keep


@pytest.mark.parametrize(
    ("patch", "size"),
    [(16, b) for b in (96, 160, 192, 224)] + [(14, b) for b in (98, 154, 168, 224)],
)
def test_the_visible_count_is_the_originals_at_the_published_sizes(patch: int, size: int) -> None:
    num_patches = (size // patch) ** 2
    assert num_visible(num_patches, 0.75) == int(num_patches * (1 - 0.75))


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "message"),
    [
        (24, 0.999, "mask_ratio 0.999 leaves no visible patch out of 24; .* 0.0417 and 0.958"),
        (24, 0.01, "mask_ratio 0.01 leaves no masked patch out of 24; .* 0.0417 and 0.958"),
        (4, 0.9, "leaves no visible patch out of 4"),
    ],
)
def test_a_ratio_that_leaves_nothing_on_one_side_gets_a_sentence(
    num_patches: int, mask_ratio: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        num_visible(num_patches, mask_ratio)


def test_among_patches_with_data_uniform_masks_are_uniform() -> None:
    num_images, has_data = 6000, torch.tensor([True, True, False, True, False, True])
    valid = has_data.view(1, 1, 2, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    masker = Masker(UniformMaskingConfig(), 2 / 3, None, (4, 4), 0)
    keep = masker(torch.arange(num_images), (8, 12), 0.0, valid.expand(num_images, -1, -1, -1)).ids_keep
    subsets = Counter(map(tuple, keep.tolist()))
    assert set(subsets) == set(itertools.combinations((0, 1, 3, 5), 2))
    # Six subsets, each of 1000 on average with a deviation of 29.
    assert max(abs(count - 1000) for count in subsets.values()) < 120


@pytest.mark.parametrize(("min_valid", "least"), [(0.0, 1), (0.25, 4), (0.26, 5), (0.3, 5), (1.0, 16)])
def test_a_patch_counts_from_a_share_of_pixels_on(min_valid: float, least: int) -> None:
    masker = Masker(UniformMaskingConfig(), 0.5, None, (2, 8), 0, min_valid)
    valid = torch.zeros(17, 1, 4, 8, dtype=torch.bool)
    for number in range(17):
        valid[number, 0, :2].view(-1)[:number] = True
    valid[:, 0, 2:] = True
    found = masker.counted(valid)
    assert found[:, 0, 2:].all()
    assert found[:, 0, :2].flatten(1).sum(dim=1).tolist() == [n if n >= least else 0 for n in range(17)]
    assert not (found & ~valid).any()
