"""Block-wise masks against a plain loop over rectangles and patches."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from etpp_ssl.model.mask_patterns import BlockMaskingConfig, block_masking, rectangles_needed, side_range
from etpp_ssl.randomness import derive_key

MASK64 = (1 << 64) - 1


def word(seed: int, purpose: str, position: int, draw: int) -> int:
    """One 64-bit word of `keyed_words`, by Python's own integers."""
    key = (derive_key(seed, purpose, position) + 0x9E3779B97F4A7C15 + draw) & MASK64
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK64
    return key ^ (key >> 31)


def plain_block_masking(
    position: int, grid: tuple[int, int], num_keep: int, seed: int, sides: tuple[float, float]
) -> list[int]:
    """Remove rectangle after rectangle; the last one, and a rest that none reaches, in keyed order."""
    everything = {(i, j) for i in range(grid[0]) for j in range(grid[1])}
    num_removed = len(everything) - num_keep
    removed: list[tuple[int, int]] = []

    def remove(patches: set[tuple[int, int]]) -> None:
        def chance(patch: tuple[int, int]) -> int:
            return word(seed, "mask", position, patch[0] * grid[1] + patch[1]) & ((1 << 48) - 1)

        for patch in sorted(patches - set(removed), key=chance):
            if len(removed) < num_removed:
                removed.append(patch)

    for number in range(rectangles_needed(grid, num_keep, sides)):
        axes = []
        for axis, length in enumerate(grid):
            smallest, largest = side_range(length, sides)
            size_word, start_word = (
                word(seed, "mask-blocks", position, 4 * number + 2 * axis + k) & (MASK64 >> 1) for k in (0, 1)
            )
            size = smallest + size_word % (largest - smallest + 1)
            start = start_word % (length + size - 1) - (size - 1)
            axes.append([place for place in range(start, start + size) if 0 <= place < length])
        remove({(i, j) for i in axes[0] for j in axes[1]})
    remove(everything)
    return sorted(i * grid[1] + j for i, j in everything - set(removed))


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (4, 6), (2, 3), (7, 16)])
@pytest.mark.parametrize("ratio", [0.4, 0.75, 0.9])
@pytest.mark.parametrize("sides", [(0.2, 0.5), (0.05, 0.05), (1.0, 1.0)])
def test_the_masks_are_those_of_a_plain_loop(
    grid: tuple[int, int], ratio: float, sides: tuple[float, float]
) -> None:
    num_keep = max(1, round(grid[0] * grid[1] * (1 - ratio)))
    positions = torch.tensor([0, 7, 2**40])
    ours = block_masking(positions, grid, num_keep, seed=3, sides=sides)
    for row, position in zip(ours.tolist(), positions.tolist(), strict=True):
        assert row == plain_block_masking(position, grid, num_keep, 3, sides)


def test_the_default_needs_no_filling_up_and_is_blockier_than_uniform() -> None:
    grid, num_keep = (14, 14), 49
    positions = torch.arange(500)
    kept = torch.zeros(500, 196).scatter(1, block_masking(positions, grid, num_keep, seed=0), 1.0)
    kept = kept.unflatten(1, grid)
    same = (kept[:, 1:] == kept[:, :-1]).float().mean().item()
    # Neighbours of a uniform mask agree with probability 0.75^2 + 0.25^2.
    assert same > 0.75 > 0.63

    # More rectangles than are drawn change hardly any mask: those drawn reach the count by themselves.
    more = block_masking(positions, grid, num_keep - 20, seed=0)
    inside = [
        set(a) <= set(b)
        for a, b in zip(more.tolist(), kept.flatten(1).topk(49).indices.tolist(), strict=True)
    ]
    assert sum(inside) > 490


def test_every_patch_is_visible_about_equally_often() -> None:
    # Rectangles that had to lie inside would leave the corners visible five times as often as the middle.
    ids = block_masking(torch.arange(4000), (6, 10), 15, seed=0)
    share = torch.zeros(4000, 60).scatter(1, ids, 1.0).mean(dim=0)
    assert share.min() > 0.21
    assert share.max() < 0.29


def test_a_mask_of_a_higher_ratio_removes_more_of_the_same() -> None:
    few, many = (block_masking(torch.arange(20), (8, 12), num_keep, seed=0) for num_keep in (20, 30))
    contained = [set(a) <= set(b) for a, b in zip(few.tolist(), many.tolist(), strict=True)]
    assert sum(contained) >= 19


def test_known_masks_that_every_recorded_run_rests_on() -> None:
    # A change here changes the masks of every block-wise run, and breaks the resume of those under way.
    assert block_masking(torch.tensor([0, 123456789]), (5, 7), 9, seed=0).tolist() == [
        [9, 11, 13, 17, 18, 19, 20, 27, 34],
        [5, 6, 11, 12, 13, 16, 17, 21, 24],
    ]


def test_sides_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"min_side 0\.6 is larger than max_side 0\.5"):
        BlockMaskingConfig(min_side=0.6)
