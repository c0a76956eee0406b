"""Which patches the encoder sees: uniform random, keyed by sample, exact in number.

Legend: B batch, N patches, K kept (visible) patches, M = N - K removed patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.randomness import keyed_words


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of an image: `round(num_patches * (1 - mask_ratio))`, the same for every image.

    MAE truncates instead, in floating point, so that 100 patches at 0.9 keep 9; ours keep 10. At the
    sizes of the published recipes both agree.

    Raises:
        UserError: if no patch or every patch would be visible.
    """
    keep = round(num_patches * (1 - mask_ratio))
    if not 0 < keep < num_patches:
        left = "visible" if keep == 0 else "masked"
        raise UserError(
            f"model.mask_ratio {mask_ratio:g} leaves no {left} patch out of {num_patches}; "
            f"use a ratio between {1 / num_patches:.3g} and {1 - 1 / num_patches:.3g}"
        )
    return keep


def random_masking(positions_B: Tensor, num_patches: int, num_keep: int, seed: int) -> Tensor:
    """Ids of the visible patches, uniform over all subsets, a function of (seed, sample) alone.

    Args:
        positions_B: int64 (B,), the samples' numbers in the run; the result is on their device.
        num_patches: N.
        num_keep: K, 0 < K < N.
        seed: the run's seed.

    Returns:
        ids_keep, int64 (B, K), ascending in each row.
    """
    words_BN = keyed_words(seed, "mask", positions_B, num_patches)
    return words_BN.argsort(dim=1)[:, :num_keep].sort(dim=1).values


def removed_ids(ids_keep: Tensor, num_patches: int) -> Tensor:
    """Ids of the masked patches: the complement of int64 (B, K), as int64 (B, M), ascending."""
    removed_BN = torch.ones(ids_keep.shape[0], num_patches, dtype=torch.bool, device=ids_keep.device).scatter(
        1, ids_keep, False
    )
    # A stable sort moves the kept ids to the front without the synchronisation of `nonzero`.
    order_BN = removed_BN.to(torch.uint8).argsort(dim=1, stable=True)
    return order_BN[:, ids_keep.shape[1] :]
