"""Patches in MAE's order, by plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from etpp_ssl.model.patches import gather_patches, grid_of, patchify, unpatchify

SHAPES = [((2, 3, 12, 20), (4, 4)), ((1, 1, 9, 6), (3, 2)), ((2, 5, 14, 28), (14, 7))]


def cut_by_loops(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Row by row over the grid; within a patch row, column, then channel."""
    p, q = patch
    patches = [
        images[:, :, top : top + p, left : left + q].permute(0, 2, 3, 1).flatten(1)
        for top in range(0, images.shape[2], p)
        for left in range(0, images.shape[3], q)
    ]
    return torch.stack(patches, dim=1)


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_patchify_cuts_row_by_row_with_channels_last(shape: tuple[int, ...], patch: tuple[int, int]) -> None:
    images = torch.randn(shape)
    patches = patchify(images, patch)
    assert torch.equal(patches, cut_by_loops(images, patch))
    # One value by hand: sample, patch (row 1, column 1), pixel (1, 0), last channel.
    grid = grid_of((shape[2], shape[3]), patch)
    number, value = grid[1] + 1, (1 * patch[1] + 0) * shape[1] + shape[1] - 1
    if grid[0] > 1:
        assert patches[0, number, value] == images[0, -1, patch[0] + 1, patch[1]]


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_unpatchify_is_the_inverse(shape: tuple[int, ...], patch: tuple[int, int]) -> None:
    images = torch.randn(shape)
    grid = grid_of((shape[2], shape[3]), patch)
    assert torch.equal(unpatchify(patchify(images, patch), grid, patch), images)


def test_gather_takes_each_rows_own_patches_in_the_order_of_the_ids() -> None:
    patches = torch.randn(3, 10, 4)
    ids = torch.tensor([[9, 0, 3], [1, 1, 2], [5, 7, 6]])
    gathered = gather_patches(patches, ids)
    for row in range(3):
        for place in range(3):
            assert torch.equal(gathered[row, place], patches[row, ids[row, place]])


def test_the_grid_counts_whole_patches_per_axis() -> None:
    assert grid_of((96, 160), (16, 8)) == (6, 20)
    assert grid_of((154, 98), (14, 14)) == (11, 7)


@pytest.mark.parametrize("size", [(97, 160), (96, 150)])
def test_a_size_of_broken_patches_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        grid_of(size, (16, 16))
