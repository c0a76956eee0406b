"""The masks of a run: how many patches are visible and predicted, at which ratio, and which ones.

A mask is drawn in three steps: the counts follow from the mask ratio, which may change over the run; a
pattern chooses the visible patches (`mask_patterns`); all removed patches, or a subset of them, are
predicted. Every mask is a function of (seed, sample) and exact in number.

Patches without data come last: they are visible, or predicted, only where the others do not suffice, and
`Masker.enough` tells which images have so few.

Legend: B batch, N patches, K kept (visible) patches, R = N - K removed patches, M <= R predicted patches,
h, w pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from etpp_ssl import moved
from etpp_ssl.config import Config, UserError, show_size
from etpp_ssl.model.patches import grid_of, patchify, unpatchify
from etpp_ssl.randomness import keyed_words

_TOLERANCE = 1e-9
"""Ratios of a schedule are computed in floating point."""
_LAST = 1 << 40
"""More than any number of blocks."""
LEAST_HIDDEN = 0.25
"""Share of the removed patches that must have data. The weight of an image in the loss does not depend on
their number, so it should not be a handful."""


class MaskRatioRamp(Config):
    """A mask ratio that changes linearly over the run's compute."""

    start: float = Field(gt=0, lt=1)
    """Ratio at the start of the run."""
    end: float = Field(gt=0, lt=1)
    """Ratio at its end."""


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches of an image: `round(num_patches * (1 - mask_ratio))`, the same for every image.

    MAE truncates in floating point instead: of 100 patches at 0.9 it keeps 9, this keeps 10. Both agree at
    the sizes of the published recipes.

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


def num_predicted(num_patches: int, mask_ratio: float, predict_ratio: float | None) -> int:
    """Predicted patches of an image, by the rule of `num_visible`, the same for every image.

    Args:
        num_patches: N.
        mask_ratio: share of the patches that is removed.
        predict_ratio: share of all patches that is predicted; equal to `mask_ratio`, or None, it means
            every removed one.

    Raises:
        UserError: if none would be predicted, or more than are removed.
    """
    num_removed = num_patches - num_visible(num_patches, mask_ratio)
    if predict_ratio is None:
        return num_removed
    if predict_ratio > mask_ratio + _TOLERANCE:
        raise UserError(
            f"model.decoder.predict_ratio {predict_ratio:g} is larger than model.mask_ratio {mask_ratio:g}: "
            f"both are shares of all patches, and only masked ones are predicted; use at most {mask_ratio:g}"
        )
    predicted = min(num_removed, num_patches - round(num_patches * (1 - predict_ratio)))
    if not predicted:
        raise UserError(
            f"model.decoder.predict_ratio {predict_ratio:g} leaves nothing to predict out of {num_patches} "
            f"patches; use a ratio between {1 / num_patches:.3g} and {mask_ratio:g}"
        )
    return predicted


class MaskCounts(NamedTuple):
    """Numbers of patches of one image."""

    num_patches: int
    num_keep: int
    num_predict: int

    @property
    def everything(self) -> MaskCounts:
        """The counts with every masked patch predicted."""
        return self._replace(num_predict=self.num_patches - self.num_keep)


def random_masking(sample_ids_B: Tensor, num_patches: int, num_keep: int, seed: int) -> Tensor:
    """Ids of the visible patches, uniform over all subsets, a function of (seed, sample) alone.

    Args:
        sample_ids_B: int64 (B,), the samples' numbers in the run; the result is on their device.
        num_patches: N.
        num_keep: K, 0 < K < N.
        seed: the run's seed.

    Returns:
        ids_keep, int64 (B, K), ascending in each row.
    """
    words_BN = keyed_words(seed, "mask", sample_ids_B, num_patches)
    return words_BN.argsort(dim=1)[:, :num_keep].sort(dim=1).values


def removed_ids(ids_keep: Tensor, num_patches: int) -> Tensor:
    """Ids of the masked patches: the complement of int64 (B, K), as int64 (B, R), ascending."""
    removed_BN = torch.ones(ids_keep.shape[0], num_patches, dtype=torch.bool, device=ids_keep.device).scatter(
        1, ids_keep, False
    )
    # A stable sort moves the kept ids to the front without the synchronisation of `nonzero`.
    order_BN = removed_BN.to(torch.uint8).argsort(dim=1, stable=True)
    return order_BN[:, ids_keep.shape[1] :]


def with_data_first(ids_keep: Tensor, sample_ids_B: Tensor, has_data_BN: Tensor, seed: int) -> Tensor:
    """The visible patches, with others in the place of those that have no data.

    A visible patch that has data stays. The rest is drawn from the removed patches with data, by the words
    that `random_masking` draws by: so its masks become uniform over the subsets of the patches with data.

    Args:
        ids_keep: int64 (B, K), ascending in each row.
        sample_ids_B: int64 (B,), the samples' numbers in the run.
        has_data_BN: bool (B, N).
        seed: the run's seed.

    Returns:
        int64 (B, K), ascending in each row; where fewer than K patches have data, others are among them.
    """
    num_patches = has_data_BN.shape[1]
    removed_BN = torch.ones_like(has_data_BN).scatter(1, ids_keep, False)
    words_BN = keyed_words(seed, "mask", sample_ids_B, num_patches)
    order_BN = in_order(removed_BN.int() + 2 * ~has_data_BN, words_BN)
    return order_BN[:, : ids_keep.shape[1]].sort(dim=1).values


def in_order(groups_BN: Tensor, words_BN: Tensor) -> Tensor:
    """Columns by group, and by word within a group; int64 (B, N)."""
    order_BN = words_BN.argsort(dim=1)
    return order_BN.gather(1, groups_BN.gather(1, order_BN).argsort(dim=1, stable=True))


def block_ranks(
    sample_ids_B: Tensor, grid: tuple[int, int], blocks: tuple[int, int], seed: int, purpose: str
) -> Tensor:
    """The place of each patch's block in a keyed order of the blocks, int64 (B, N).

    Args:
        sample_ids_B: int64 (B,), the samples' numbers in the run; the result is on their device.
        grid: (h, w) patches. A patch belongs to the block in which its centre lies.
        blocks: per axis, of equal size; those smaller than a patch may hold none.
        seed: the run's seed.
        purpose: of the draw.
    """
    words = keyed_words(seed, purpose, sample_ids_B, blocks[0] * blocks[1])
    ranks = words.argsort(dim=1).argsort(dim=1)
    rows, columns = (
        (2 * torch.arange(length, device=words.device) + 1) * number // (2 * length)
        for length, number in zip(grid, blocks, strict=True)
    )
    return ranks[:, (rows[:, None] * blocks[1] + columns).flatten()]


def predicted_ids(
    sample_ids_B: Tensor,
    ids_removed: Tensor,
    num_predict: int,
    num_patches: int,
    seed: int,
    has_data_BN: Tensor | None = None,
    ranks_BN: Tensor | None = None,
) -> Tensor:
    """A uniform subset of the masked patches, a function of (seed, sample) and the mask alone.

    Args:
        sample_ids_B: int64 (B,), the samples' numbers in the run.
        ids_removed: int64 (B, R).
        num_predict: M, 0 < M <= R; the subset of a smaller M is part of a larger one's.
        num_patches: N.
        seed: the run's seed.
        has_data_BN: bool (B, N), patches that come before others; None where all have data.
        ranks_BN: int64 (B, N), places in an order that comes before the random one, from `block_ranks`.

    Returns:
        int64 (B, M), ascending in each row.
    """
    if num_predict == ids_removed.shape[1]:
        return ids_removed
    words_BR = keyed_words(seed, "predict", sample_ids_B, num_patches).gather(1, ids_removed)
    if ranks_BN is None and has_data_BN is None:
        order_BR = words_BR.argsort(dim=1)
    else:
        groups_BR = torch.zeros_like(words_BR) if ranks_BN is None else ranks_BN.gather(1, ids_removed)
        if has_data_BN is not None:
            groups_BR = groups_BR + _LAST * ~has_data_BN.gather(1, ids_removed)
        order_BR = in_order(groups_BR, words_BR)
    chosen_BM = order_BR[:, :num_predict]
    return ids_removed.gather(1, chosen_BM).sort(dim=1).values


class Pattern(Protocol):
    """A rule for where the visible patches lie; the Configs in `mask_patterns` are patterns."""

    def visible_ids(
        self,
        sample_ids_B: Tensor,
        grid: tuple[int, int],
        num_keep: int,
        seed: int,
        base_grid: tuple[int, int],
    ) -> Tensor:
        """Ids of the visible patches of a grid of (h, w), int64 (B, K), ascending in each row."""

    def blocks(self, grid: tuple[int, int], base_grid: tuple[int, int]) -> tuple[int, int] | None:
        """Blocks per axis that the patches to predict are drawn by; None draws each alone."""

    def check(self, grid: tuple[int, int], base_grid: tuple[int, int], num_keep: int, where: str) -> None:
        """Raise a UserError if the pattern does not suit a grid; `where` names its bandwidth."""


class Mask(NamedTuple):
    """The two sets of patches of a batch, each ascending in a row."""

    ids_keep: Tensor
    """int64 (B, K), visible to the encoder."""
    ids_predict: Tensor
    """int64 (B, M), masked and predicted."""


@dataclass(frozen=True)
class Masker:
    """The masks of a run: a pure function of the samples' numbers, the bandwidth and the progress."""

    pattern: Pattern
    ratio: float | MaskRatioRamp
    predict_ratio: float | None
    """Share of all patches that is predicted; None predicts every masked one."""
    patch_size: tuple[int, int]
    seed: int
    min_valid: float = 0.0
    """Share of a patch's pixels that must have data, and one at least; see `data.min_valid`."""
    base_grid: tuple[int, int] | None = None
    """(H, W) patches at full resolution, for patterns that follow the scene; None takes each grid for it."""

    def mask_ratio(self, progress: float) -> float:
        """The share of patches to remove when a share `progress`, in [0, 1], of the compute is spent."""
        if isinstance(self.ratio, MaskRatioRamp):
            return self.ratio.start * (1 - progress) + self.ratio.end * progress
        return self.ratio

    def counts(self, bandwidth: tuple[int, int], progress: float) -> MaskCounts:
        """Exact numbers of patches of every image at a bandwidth.

        Raises:
            UserError: if nothing would be visible, masked or predicted.
        """
        grid = grid_of(bandwidth, self.patch_size)
        num_patches, ratio = grid[0] * grid[1], self.mask_ratio(progress)
        return MaskCounts(
            num_patches,
            num_visible(num_patches, ratio),
            num_predicted(num_patches, ratio, self.predict_ratio),
        )

    def check(self, bandwidth: tuple[int, int], span: tuple[float, float]) -> None:
        """Raise a UserError if the masks at a bandwidth are impossible at an end of a span of progress."""
        grid = grid_of(bandwidth, self.patch_size)
        where = f"bandwidth {show_size(bandwidth)} ({grid[0]}x{grid[1]} patches)"
        for progress in span:
            num_keep = self.counts(bandwidth, progress).num_keep
            self.pattern.check(grid, self.base_grid or grid, num_keep, where)

    def __call__(
        self,
        sample_ids_B: Tensor,
        bandwidth: tuple[int, int],
        progress: float,
        valid: Tensor | None = None,
    ) -> Mask:
        """The masks of a step.

        Args:
            sample_ids_B: int64 (B,), the samples' numbers in the run; the masks are on their device.
            bandwidth: (height, width) of the low-frequency crop in pixels.
            progress: share of the run's compute that is spent, in [0, 1].
            valid: of `counted`; None where all pixels have data.
        """
        return self._draw(sample_ids_B, bandwidth, self.counts(bandwidth, progress), valid)

    def everything(
        self, sample_ids_B: Tensor, bandwidth: tuple[int, int], valid: Tensor | None = None
    ) -> Mask:
        """The masks at the end of the run, with every masked patch predicted: for evaluation."""
        return self._draw(sample_ids_B, bandwidth, self.counts(bandwidth, 1.0).everything, valid)

    def counted(self, valid: Tensor) -> Tensor:
        """The pixels that count: those with data, in patches in which enough pixels have it.

        Args:
            valid: bool (B, 1, h, w), whether a pixel of the crop has data.

        Returns:
            bool (B, 1, h, w).
        """
        grid = grid_of((valid.shape[-2], valid.shape[-1]), self.patch_size)
        patches = patchify(valid, self.patch_size)
        least = max(1, math.ceil(self.min_valid * patches.shape[-1] - _TOLERANCE))
        enough = patches.sum(dim=-1, keepdim=True) >= least
        return unpatchify(patches & enough, grid, self.patch_size)

    def enough(self, valid: Tensor, progress: float) -> Tensor:
        """Whether an image has as many patches with data as its mask needs, bool (B,).

        Args:
            valid: of `counted`.
            progress: share of the run's compute that is spent, in [0, 1].
        """
        num_patches, num_keep, _ = self.counts((valid.shape[-2], valid.shape[-1]), progress)
        needed = num_keep + math.ceil(LEAST_HIDDEN * (num_patches - num_keep))
        return self._has_data(valid).sum(dim=1) >= needed

    def _has_data(self, valid: Tensor) -> Tensor:
        """bool (B, N): patches in which a pixel counts."""
        return patchify(valid, self.patch_size).any(dim=-1)

    def _draw(
        self,
        sample_ids_B: Tensor,
        bandwidth: tuple[int, int],
        counts: MaskCounts,
        valid: Tensor | None,
    ) -> Mask:
        num_patches, num_keep, num_predict = counts
        grid = grid_of(bandwidth, self.patch_size)
        base = self.base_grid or grid
        ids_keep = self.pattern.visible_ids(sample_ids_B, grid, num_keep, self.seed, base)
        has_data_BN = None if valid is None else self._has_data(valid)
        if has_data_BN is not None:
            ids_keep = with_data_first(ids_keep, sample_ids_B, has_data_BN, self.seed)
        ids_removed = removed_ids(ids_keep, num_patches)
        ranks_BN, blocks = None, self.pattern.blocks(grid, base)
        if blocks is not None and num_predict < num_patches - num_keep:
            ranks_BN = block_ranks(sample_ids_B, grid, blocks, self.seed, "predict-blocks")
        ids_predict = predicted_ids(
            sample_ids_B, ids_removed, num_predict, num_patches, self.seed, has_data_BN, ranks_BN
        )
        return Mask(ids_keep, ids_predict)


if not TYPE_CHECKING:
    __getattr__ = moved.names_of("model.masking")
