"""Mask patterns: which patches stay visible. Uniform, in blocks, in aligned blocks, or on a grid.

Each is a Config whose `visible_ids` is a function of (seed, sample), the grid and the count, in integer
arithmetic, so that CPU and GPU agree to the bit.

Legend: B batch, R rectangles, h, w grid, N = h w patches, K kept patches.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from etpp_ssl.config import Config, UserError, listed
from etpp_ssl.model.masking import block_ranks, in_order, random_masking
from etpp_ssl.randomness import keyed_words

_POSITIVE = (1 << 63) - 1
_WORD_BITS = 48
_MAX_RECTANGLES = 512


class PatternKeys(Config):
    """What patterns have in common: any grid suits, and patches are predicted one by one."""

    name: str

    def blocks(self, grid: tuple[int, int], base_grid: tuple[int, int]) -> tuple[int, int] | None:
        """Blocks per axis that the patches to predict are drawn by, or None where each is drawn alone.

        Args:
            grid: (h, w) patches now.
            base_grid: (H, W) patches at full resolution.
        """
        return None

    def check(self, grid: tuple[int, int], base_grid: tuple[int, int], num_keep: int, where: str) -> None:
        """Raise a UserError if the pattern does not suit a grid; `where` names its bandwidth."""


class UniformMaskingConfig(PatternKeys):
    """Every subset of the patches is equally likely (MAE, section 3)."""

    name: Literal["uniform"] = "uniform"

    def visible_ids(
        self,
        sample_ids_B: Tensor,
        grid: tuple[int, int],
        num_keep: int,
        seed: int,
        base_grid: tuple[int, int],
    ) -> Tensor:
        """Ids of the visible patches of a grid of (h, w), int64 (B, K), ascending in each row."""
        return random_masking(sample_ids_B, grid[0] * grid[1], num_keep, seed)


class BlockMaskingConfig(PatternKeys):
    """Rectangles are removed one after the other until the count is reached.

    BEiT (Bao et al., ICLR 2022, algorithm 1) draws area and aspect, and stops near its count. Here height and
    width are drawn independently, as shares of the grid, so that a mask covers the same shares of the scene
    at every bandwidth. A rectangle may hang over the border; otherwise the corners would nearly always stay
    visible. The last one is trimmed to the exact count.
    """

    name: Literal["block"] = "block"
    min_side: float = Field(default=0.2, gt=0, le=1)
    """Smallest height and width of a rectangle, as shares of the grid's."""
    max_side: float = Field(default=0.5, gt=0, le=1)
    """Largest height and width of a rectangle, as shares of the grid's."""

    @model_validator(mode="after")
    def _ordered(self) -> BlockMaskingConfig:
        if self.min_side > self.max_side:
            raise ValueError(f"min_side {self.min_side:g} is larger than max_side {self.max_side:g}")
        return self

    def visible_ids(
        self,
        sample_ids_B: Tensor,
        grid: tuple[int, int],
        num_keep: int,
        seed: int,
        base_grid: tuple[int, int],
    ) -> Tensor:
        """Ids of the visible patches of a grid of (h, w), int64 (B, K), ascending in each row."""
        return block_masking(sample_ids_B, grid, num_keep, seed, sides=(self.min_side, self.max_side))


def block_masking(
    sample_ids_B: Tensor,
    grid: tuple[int, int],
    num_keep: int,
    seed: int,
    *,
    sides: tuple[float, float] = (0.2, 0.5),
) -> Tensor:
    """Ids of the visible patches, a function of (seed, sample) and the grid alone.

    Patches are removed in the order in which rectangles reach them, in keyed order within a rectangle,
    until N - K are gone. Where all rectangles together do not reach so many, the rest is drawn uniformly.

    Args:
        sample_ids_B: int64 (B,), the samples' numbers in the run; the result is on their device.
        grid: (h, w) patches.
        num_keep: K, 0 < K < N.
        seed: the run's seed.
        sides: smallest and largest side of a rectangle, as shares of the grid's.

    Returns:
        ids_keep, int64 (B, K), ascending in each row.
    """
    num_patches = grid[0] * grid[1]
    num_rectangles = rectangles_needed(grid, num_keep, sides)
    words = (keyed_words(seed, "mask-blocks", sample_ids_B, 4 * num_rectangles) & _POSITIVE).unflatten(
        1, (-1, 4)
    )
    rows_BRh = _interval(words[..., 0], words[..., 1], grid[0], sides)
    columns_BRw = _interval(words[..., 2], words[..., 3], grid[1], sides)
    covered_BRN = (rows_BRh[..., :, None] & columns_BRw[..., None, :]).flatten(2)
    # Ranks fall from R to 1, so the largest is the first rectangle's; 0 where none covers the patch.
    ranks_R = torch.arange(num_rectangles, 0, -1, dtype=torch.int16, device=sample_ids_B.device)
    first_BN = num_rectangles - (covered_BRN * ranks_R[:, None]).amax(dim=1).to(torch.int64)
    order_BN = keyed_order(first_BN, keyed_words(seed, "mask", sample_ids_B, num_patches))
    return order_BN[:, num_patches - num_keep :].sort(dim=1).values


def side_range(length: int, sides: tuple[float, float]) -> tuple[int, int]:
    """Smallest and largest side of a rectangle, in patches, on an axis of `length` patches."""
    smallest = max(1, round(length * sides[0]))
    return smallest, max(smallest, round(length * sides[1]))


def rectangles_needed(grid: tuple[int, int], num_keep: int, sides: tuple[float, float]) -> int:
    """Rectangles to draw, so that they nearly always reach N - K patches together.

    Each reaches a patch with the same chance a, and R of them leave (1 - a)^R of the patches on average;
    twice that R allows for bad luck. A larger R never changes a mask that is complete without it.
    """
    chances = []
    for length in grid:
        smallest, largest = side_range(length, sides)
        sizes = range(smallest, largest + 1)
        chances.append(sum(size / (length + size - 1) for size in sizes) / len(sizes))
    left = num_keep / (grid[0] * grid[1])
    rest = max(0.1, 1 - chances[0] * chances[1])
    return min(_MAX_RECTANGLES, 4 + math.ceil(2 * math.log(left) / math.log(rest)))


def _interval(size_words: Tensor, start_words: Tensor, length: int, sides: tuple[float, float]) -> Tensor:
    """Keyed intervals of one axis as bool (B, R, length)."""
    smallest, largest = side_range(length, sides)
    # Words of 63 bits: the bias of the remainder is far too small to matter.
    size = smallest + size_words % (largest - smallest + 1)
    start = start_words % (length + size - 1) - (size - 1)
    places = torch.arange(length, device=size.device)
    return (places >= start[..., None]) & (places < (start + size)[..., None])


class AlignedMaskingConfig(PatternKeys):
    """Whole blocks of n x n patches, aligned to the grid, stay visible (Pixio, arXiv 2512.15715).

    Blocks are taken in keyed order until `mask_ratio` leaves no more; where that number is not a multiple of
    a block's patches, the last block is trimmed to the exact count, in keyed order. At Pixio's own sizes (256
    px, patches of 16, blocks of 4, ratio 0.75) 4 of 16 blocks are visible, as there. A `predict_ratio` draws
    the patches to predict by the same blocks.
    """

    name: Literal["aligned"] = "aligned"
    block: int = Field(default=4, ge=1, le=512)
    """Patches per side of a block. It divides the patches of both axes at every bandwidth (`unit: patches`)
    or at full resolution (`unit: scene`), and a block has at most as many patches as are visible there."""
    unit: Literal["patches", "scene"] = "patches"
    """`patches`: `block` counts patches at every bandwidth, so that a block covers more of the scene at a
    lower one. `scene`: it counts patches at full resolution, and blocks cover the same part of the scene at
    every bandwidth; a patch belongs to the block in which its centre lies, so that of 6 patches in place of
    16 blocks of 4, now 1.5, are 1, 2, 1 and 2 wide. Where a block is smaller than a patch it is a patch."""

    def visible_ids(
        self,
        sample_ids_B: Tensor,
        grid: tuple[int, int],
        num_keep: int,
        seed: int,
        base_grid: tuple[int, int],
    ) -> Tensor:
        """Ids of the visible patches of a grid of (h, w), int64 (B, K), ascending in each row."""
        ranks_BN = block_ranks(sample_ids_B, grid, self.blocks(grid, base_grid), seed, "mask-aligned")
        words_BN = keyed_words(seed, "mask", sample_ids_B, grid[0] * grid[1])
        return in_order(ranks_BN, words_BN)[:, :num_keep].sort(dim=1).values

    def blocks(self, grid: tuple[int, int], base_grid: tuple[int, int]) -> tuple[int, int]:
        """Blocks per axis."""
        counted = grid if self.unit == "patches" else base_grid
        return -(-counted[0] // self.block), -(-counted[1] // self.block)

    def check(self, grid: tuple[int, int], base_grid: tuple[int, int], num_keep: int, where: str) -> None:
        """See that blocks fit the grid that they are counted on, and that a whole one is visible.

        Raises:
            UserError: if not.
        """
        counted = grid
        if self.unit == "scene":
            counted, where = base_grid, f"full resolution ({base_grid[0]}x{base_grid[1]} patches)"
            if grid != base_grid:
                # The count is of another grid, and a run ends at full resolution.
                num_keep = math.prod(counted)
        if self.block > min(counted):
            fault = f"is larger than the grid of {where}"
        elif any(length % self.block for length in counted):
            fault = f"does not divide the grid of {where}"
        elif self.block**2 > num_keep:
            fault = f"has {self.block**2} patches, more than the {num_keep} that are visible at {where}"
        else:
            return
        legal = [
            n for n in range(1, min(counted) + 1) if not any(g % n for g in counted) and n * n <= num_keep
        ]
        scene = "; model.masking.unit=scene needs to divide full resolution only"
        raise UserError(
            f"model.masking.block {self.block} {fault}; legal {'is' if len(legal) == 1 else 'are'} "
            f"{listed([str(n) for n in legal])} there{scene if self.unit == 'patches' else ''}"
        )


class GridMaskingConfig(PatternKeys):
    """A regular lattice of patches stays visible, at a random phase.

    MAE's grid-wise sampling (section 4.3) keeps one patch of every two by two. Other ratios take the lattice
    of the nearest density; patches in excess are removed and missing ones added in random order, so that the
    count is exact at every bandwidth.
    """

    name: Literal["grid"] = "grid"

    def visible_ids(
        self,
        sample_ids_B: Tensor,
        grid: tuple[int, int],
        num_keep: int,
        seed: int,
        base_grid: tuple[int, int],
    ) -> Tensor:
        """Ids of the visible patches of a grid of (h, w), int64 (B, K), ascending in each row."""
        return grid_masking(sample_ids_B, grid, num_keep, seed)


def grid_masking(sample_ids_B: Tensor, grid: tuple[int, int], num_keep: int, seed: int) -> Tensor:
    """Ids of the visible patches, a function of (seed, sample) and the grid alone.

    Args:
        sample_ids_B: int64 (B,), the samples' numbers in the run; the result is on their device.
        grid: (h, w) patches.
        num_keep: K, 0 < K < N.
        seed: the run's seed.

    Returns:
        ids_keep, int64 (B, K), ascending in each row.
    """
    num_patches = grid[0] * grid[1]
    strides = lattice_strides(grid, num_keep)
    phases_B2 = keyed_words(seed, "mask-phase", sample_ids_B, 2) & _POSITIVE
    rows, columns = (
        torch.arange(length, device=sample_ids_B.device) % stride == phases_B2[:, axis, None] % stride
        for axis, (length, stride) in enumerate(zip(grid, strides, strict=True))
    )
    off_lattice_BN = ~(rows[:, :, None] & columns[:, None, :]).flatten(1)
    words_BN = keyed_words(seed, "mask", sample_ids_B, num_patches)
    order_BN = keyed_order(off_lattice_BN.to(torch.int64), words_BN)
    return order_BN[:, :num_keep].sort(dim=1).values


def lattice_strides(grid: tuple[int, int], num_keep: int) -> tuple[int, int]:
    """Patches from one lattice point to the next, per axis, differing by one at most.

    Of all such pairs that fit the grid, this is the one whose cell is nearest, as a ratio, to N / K patches;
    among equals the one with the longer stride along the longer axis.
    """
    wanted = grid[0] * grid[1] / num_keep
    sides = range(1, math.isqrt(math.ceil(wanted)) + 2)
    pairs = [(a, b) for a in sides for b in (a - 1, a, a + 1) if 1 <= b <= grid[1] and a <= grid[0]]

    def distance(pair: tuple[int, int]) -> tuple[float, bool]:
        against = (pair[0] - pair[1]) * (grid[0] - grid[1]) < 0
        return abs(math.log(pair[0] * pair[1] / wanted)), against

    return min(pairs, key=distance)


def keyed_order(groups_BN: Tensor, words_BN: Tensor) -> Tensor:
    """Ids of the patches by group, in random order within a group.

    Args:
        groups_BN: int64 (B, N), 0 <= group < 2^15.
        words_BN: int64 (B, N), random words; 48 bits of each break the ties.

    Returns:
        int64 (B, N).
    """
    ties_BN = words_BN & ((1 << _WORD_BITS) - 1)
    return ((groups_BN << _WORD_BITS) | ties_BN).argsort(dim=1)
