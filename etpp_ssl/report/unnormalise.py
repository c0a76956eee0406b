"""Undoing the normalisation of predicted patches: honestly, from what the model sees, or with the answer.

A target of normalised pixels tells a patch's pattern, not its brightness and contrast. Undoing the
normalisation with the mean and standard deviation of the removed patch itself takes both from the
answer. The honest picture estimates them from the visible patches around.

Legend: B batch, N patches, K visible, M masked, V values per patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RADIUS = 1.0
"""Standard deviation, in patches, of the Gaussian that weighs visible neighbours."""


class PatchStatistics(NamedTuple):
    """What normalising a patch takes away, float32 (B, M, 1) each."""

    mean: Tensor
    std: Tensor


def patch_statistics(patches: Tensor) -> PatchStatistics:
    """Mean and sqrt(var + 1e-6) over the last axis, the variance unbiased.

    These are the numbers that `etpp_ssl.targets.pixels.normalise_patches` uses.

    Args:
        patches: float (B, M, V), V >= 2.
    """
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True, unbiased=True)
    return PatchStatistics(mean, (variance + 1e-6).sqrt())


def neighbour_statistics(
    visible_BKV: Tensor, ids_keep: Tensor, ids_removed: Tensor, grid: tuple[int, int]
) -> PatchStatistics:
    """Statistics of masked patches, estimated from the visible patches alone.

    The rule: a masked patch's mean is the weighted average of the visible patches' means, and its
    standard deviation that of their standard deviations. The weight of a visible patch at distance d is
    exp(-d^2 / (2 RADIUS^2)); d is Euclidean, in patches between centres on the grid. The weights of each
    masked patch are scaled to add up to 1, so one that is far from all visible patches takes the
    nearest ones.

    Args:
        visible_BKV: float (B, K, V), the visible patches' pixels.
        ids_keep: int64 (B, K), where they are.
        ids_removed: int64 (B, M), the patches to estimate.
        grid: (h, w), patches per axis.
    """
    visible = patch_statistics(visible_BKV)
    distance_BMK = torch.cdist(_centres(ids_removed, grid), _centres(ids_keep, grid))
    # A softmax divides by the sum without underflow, however far the nearest patch is.
    weights_BMK = (-(distance_BMK**2) / (2 * RADIUS**2)).softmax(dim=-1)
    return PatchStatistics(weights_BMK @ visible.mean, weights_BMK @ visible.std)


def unnormalise(values_BMV: Tensor, statistics: PatchStatistics) -> Tensor:
    """The inverse of `normalise_patches` with the given statistics: float32 (B, M, V)."""
    return values_BMV.float() * statistics.std + statistics.mean


def _centres(ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row and column of patches, float32 (B, n, 2)."""
    return torch.stack([ids // grid[1], ids % grid[1]], dim=-1).float()
