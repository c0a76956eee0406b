"""Grid masks: a lattice where the ratio allows one, trimmed or filled up where it does not."""

from __future__ import annotations

import pytest
import torch

from etpp_ssl.model.mask_patterns import grid_masking, lattice_strides


@pytest.mark.parametrize("grid", [(6, 6), (10, 10), (14, 14), (4, 6), (8, 2)])
def test_at_three_quarters_it_keeps_one_patch_of_every_two_by_two(grid: tuple[int, int]) -> None:
    ids = grid_masking(torch.arange(200), grid, grid[0] * grid[1] // 4, seed=0)
    rows, columns = ids // grid[1], ids % grid[1]
    for coordinate in (rows, columns):
        phase = coordinate[:, :1] % 2
        assert (coordinate % 2 == phase).all()
    # All four phases occur, each for about a quarter of the samples.
    phases = (2 * (rows[:, 0] % 2) + columns[:, 0] % 2).bincount(minlength=4)
    assert phases.min() > 25


@pytest.mark.parametrize("grid", [(5, 7), (14, 14), (7, 3), (9, 16)])
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.75, 0.85, 0.95])
def test_the_kept_patches_are_a_lattice_as_far_as_the_count_goes(grid: tuple[int, int], ratio: float) -> None:
    num_keep = max(1, round(grid[0] * grid[1] * (1 - ratio)))
    strides = lattice_strides(grid, num_keep)
    for row in grid_masking(torch.arange(30), grid, num_keep, seed=1).tolist():
        kept = {divmod(patch, grid[1]) for patch in row}
        fits = []
        for top in range(strides[0]):
            for left in range(strides[1]):
                lattice = {
                    (i, j) for i in range(top, grid[0], strides[0]) for j in range(left, grid[1], strides[1])
                }
                # Either the lattice was trimmed to the count or it was filled up to it.
                fits.append(kept <= lattice or lattice <= kept)
        assert any(fits)


@pytest.mark.parametrize(
    ("grid", "num_keep", "strides"),
    [
        ((14, 14), 49, (2, 2)),
        ((14, 14), 22, (3, 3)),
        ((14, 14), 98, (1, 2)),
        ((7, 14), 49, (1, 2)),
        ((14, 7), 49, (2, 1)),
        ((14, 14), 196 // 6, (2, 3)),
        ((1, 20), 2, (1, 2)),
        ((14, 14), 180, (1, 1)),
    ],
)
def test_the_strides_are_those_of_the_nearest_density(
    grid: tuple[int, int], num_keep: int, strides: tuple[int, int]
) -> None:
    assert lattice_strides(grid, num_keep) == strides


def test_known_masks_that_every_recorded_run_rests_on() -> None:
    # A change here changes the masks of every grid-wise run, and breaks the resume of those under way.
    assert grid_masking(torch.tensor([0, 123456789]), (5, 7), 9, seed=0).tolist() == [
        [5, 7, 9, 11, 13, 21, 23, 25, 27],
        [7, 9, 11, 13, 19, 21, 23, 25, 27],
    ]
