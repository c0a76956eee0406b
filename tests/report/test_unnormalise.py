"""Undoing the normalisation of patches, with the answer and without."""

from __future__ import annotations

import math

import pytest
import torch

from etpp_ssl.model.masking import random_masking, removed_ids
from etpp_ssl.report.reconstruction import neighbour_statistics, patch_statistics, unnormalise
from etpp_ssl.targets.pixels import normalise_patches

GRIDS = [(3, 5), (1, 4), (7, 2)]


def random_patches(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def split(grid: tuple[int, int], keep: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids_keep = random_masking(torch.arange(batch), grid[0] * grid[1], keep, seed=3)
    return ids_keep, removed_ids(ids_keep, grid[0] * grid[1])


def test_true_statistics_undo_the_targets_normalisation() -> None:
    patches = 5 + 3 * random_patches(2, 4, 18)
    back = unnormalise(normalise_patches(patches), patch_statistics(patches))
    torch.testing.assert_close(back, patches)


@pytest.mark.parametrize("grid", GRIDS)
def test_neighbour_statistics_equal_their_definition(grid: tuple[int, int]) -> None:
    ids_keep, ids_removed = split(grid, keep=2)
    visible = random_patches(2, 2, 12)
    found = neighbour_statistics(visible, ids_keep, ids_removed, grid)
    for b in range(2):
        for m, wanted in enumerate(ids_removed[b].tolist()):
            weights, means, stds = [], [], []
            for k, seen in enumerate(ids_keep[b].tolist()):
                down, right = wanted // grid[1] - seen // grid[1], wanted % grid[1] - seen % grid[1]
                weights.append(math.exp(-(down**2 + right**2) / 2))
                values = visible[b, k].double()
                mean = values.sum().item() / 12
                variance = sum((value - mean) ** 2 for value in values.tolist()) / 11
                means.append(mean)
                stds.append(math.sqrt(variance + 1e-6))
            total = sum(weights)
            mean = sum(w * value for w, value in zip(weights, means, strict=True)) / total
            std = sum(w * value for w, value in zip(weights, stds, strict=True)) / total
            assert found.mean[b, m, 0].item() == pytest.approx(mean, rel=1e-4, abs=1e-6)
            assert found.std[b, m, 0].item() == pytest.approx(std, rel=1e-4)


def test_visible_patches_that_are_alike_give_their_own_statistics_everywhere() -> None:
    grid = (4, 6)
    ids_keep, ids_removed = split(grid, keep=5)
    visible = random_patches(1, 1, 27).expand(2, 5, 27)
    found = neighbour_statistics(visible, ids_keep, ids_removed, grid)
    wanted = patch_statistics(visible[:, :1])
    torch.testing.assert_close(found.mean, wanted.mean.expand_as(found.mean))
    torch.testing.assert_close(found.std, wanted.std.expand_as(found.std))


def test_a_patch_far_from_all_visible_ones_takes_the_nearest() -> None:
    # 60 patches away every weight underflows on its own.
    visible = torch.stack([torch.full((8,), 2.0), torch.full((8,), -7.0)])[None]
    ids_keep, ids_removed = torch.tensor([[0, 3]]), torch.tensor([[63]])
    found = neighbour_statistics(visible, ids_keep, ids_removed, (1, 64))
    assert found.mean.item() == pytest.approx(-7.0)
