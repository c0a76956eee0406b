"""MAE's target: the pixels of the masked patches, normalised per patch or as they are.

Legend: B batch, C channels, M masked patches, V = p q C values per patch.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etpp_ssl.config import Config, UserError
from etpp_ssl.model.patches import gather_patches, patchify
from etpp_ssl.targets.base import Objective


class PixelsConfig(Config):
    """Mean squared error on pixels (MAE, section 3)."""

    name: Literal["pixels"] = "pixels"
    norm_pix: bool = True
    """Subtract each target patch's mean and divide by its standard deviation (`norm_pix_loss`)."""

    def build(self, *, patch_size: tuple[int, int], in_chans: int) -> PixelObjective:
        """The objective for patches of (p, q) pixels and C channels.

        Raises:
            UserError: if a patch of one value is to be divided by its standard deviation.
        """
        if self.norm_pix and math.prod(patch_size) * in_chans == 1:
            raise UserError(
                "norm_pix of the pixels target divides by a patch's standard deviation, but a patch of one "
                "pixel and channel has none; use norm_pix: false, or larger patches"
            )
        return PixelObjective(patch_size, in_chans, norm_pix=self.norm_pix)


class PixelObjective(Objective):
    """Pixels of the low-frequency crop; see `Objective` for the methods' shapes."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, *, norm_pix: bool) -> None:
        self.patch_size = patch_size
        self.num_values = patch_size[0] * patch_size[1] * in_chans
        self.norm_pix = norm_pix

    @torch.no_grad()
    def target(self, images: Tensor, ids_removed: Tensor) -> Tensor:
        """Pixels of the masked patches in MAE's order (p, q, C), float32 (B, M, V)."""
        patches = gather_patches(patchify(images.float(), self.patch_size), ids_removed)
        return normalise_patches(patches) if self.norm_pix else patches

    @torch.no_grad()
    def target_with_gaps(self, images: Tensor, ids_removed: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels that count, normalised by their own mean and standard deviation."""
        patches = gather_patches(patchify(images.float(), self.patch_size), ids_removed)
        counts = values_that_count(valid, ids_removed, self.patch_size, self.num_values)
        return normalise_patches(patches, counts) if self.norm_pix else patches, counts


def values_that_count(valid: Tensor, ids: Tensor, patch_size: tuple[int, int], num_values: int) -> Tensor:
    """Which values of patches are of pixels that count: bool (B, 1, H, W) and int64 (B, M) to (B, M, V)."""
    pixels = gather_patches(patchify(valid, patch_size), ids)
    return pixels.repeat_interleave(num_values // pixels.shape[-1], dim=-1)


class PatchStatistics(NamedTuple):
    """What normalising a patch takes away, float32 (B, M, 1) each."""

    mean: Tensor
    std: Tensor


def patch_statistics(patches: Tensor, counts: Tensor | None = None) -> PatchStatistics:
    """Mean and sqrt(var + 1e-6) over the last axis, the variance unbiased, as in MAE.

    Args:
        patches: float (B, M, V), V >= 2.
        counts: bool (B, M, V), the values that count; None where all do. The variance of one is 0, and so are
            mean and variance of none.
    """
    patches = patches.float()
    if counts is None:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, unbiased=True)
    else:
        number = counts.sum(dim=-1, keepdim=True)
        mean = (patches * counts).sum(dim=-1, keepdim=True) / number.clamp(min=1)
        squares = ((patches - mean) * counts).square()
        variance = squares.sum(dim=-1, keepdim=True) / (number - 1).clamp(min=1)
    return PatchStatistics(mean, (variance + 1e-6).sqrt())


def normalise_patches(patches: Tensor, counts: Tensor | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-6) over the last axis, float32 (B, M, V); see `patch_statistics`."""
    mean, std = patch_statistics(patches, counts)
    return (patches - mean) / std
