"""Grid masks: the visible patches are a regular lattice at a keyed phase.

MAE's grid-wise sampling (section 4.3) keeps one patch of every two by two. Other ratios take the lattice
whose density is nearest; what it has too many is removed and what it lacks is added in keyed order, so
that the count is exact at every bandwidth.

Legend: B batch, h, w grid, N = h w patches, K kept patches.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from etpp_ssl.config import Config
from etpp_ssl.model.masking import keyed_order
from etpp_ssl.randomness import keyed_words

_POSITIVE = (1 << 63) - 1


class GridMaskingConfig(Config):
    """A regular lattice of patches stays."""

    name: Literal["grid"] = "grid"

    def visible_ids(self, positions_B: Tensor, grid: tuple[int, int], num_keep: int, seed: int) -> Tensor:
        """Ids of the visible patches of a grid of (h, w), int64 (B, K), ascending in each row."""
        return grid_masking(positions_B, grid, num_keep, seed)


def grid_masking(positions_B: Tensor, grid: tuple[int, int], num_keep: int, seed: int) -> Tensor:
    """Ids of the visible patches, a function of (seed, sample) and the grid alone.

    Args:
        positions_B: int64 (B,), the samples' numbers in the run; the result is on their device.
        grid: (h, w) patches.
        num_keep: K, 0 < K < N.
        seed: the run's seed.

    Returns:
        ids_keep, int64 (B, K), ascending in each row.
    """
    num_patches = grid[0] * grid[1]
    strides = lattice_strides(grid, num_keep)
    phases_B2 = keyed_words(seed, "mask-phase", positions_B, 2) & _POSITIVE
    rows, columns = (
        torch.arange(length, device=positions_B.device) % stride == phases_B2[:, axis, None] % stride
        for axis, (length, stride) in enumerate(zip(grid, strides, strict=True))
    )
    off_lattice_BN = ~(rows[:, :, None] & columns[:, None, :]).flatten(1)
    words_BN = keyed_words(seed, "mask", positions_B, num_patches)
    order_BN = keyed_order(off_lattice_BN.to(torch.int64), words_BN)
    return order_BN[:, :num_keep].sort(dim=1).values


def lattice_strides(grid: tuple[int, int], num_keep: int) -> tuple[int, int]:
    """Patches from one lattice point to the next, per axis, differing by one at most.

    Of all such pairs that fit the grid, the one whose cell is nearest, as a ratio, to N / K patches;
    among equals the one with the longer stride along the longer axis.
    """
    wanted = grid[0] * grid[1] / num_keep
    sides = range(1, math.isqrt(math.ceil(wanted)) + 2)
    pairs = [(a, b) for a in sides for b in (a - 1, a, a + 1) if 1 <= b <= grid[1] and a <= grid[0]]

    def distance(pair: tuple[int, int]) -> tuple[float, bool]:
        against = (pair[0] - pair[1]) * (grid[0] - grid[1]) < 0
        return abs(math.log(pair[0] * pair[1] / wanted)), against

    return min(pairs, key=distance)
