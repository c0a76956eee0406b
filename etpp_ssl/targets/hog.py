"""MaskFeat's target: histograms of oriented gradients of the masked patches.

Definition (MaskFeat, Wei et al., CVPR 2022, section 3.2; operators of `facebookresearch/SlowFast`): per
channel, the 3x3 Sobel derivatives gx and gy under reflect padding; the orientation atan2(gx, gy), in this
order, falls into one of 9 unsigned bins, floor(angle / pi * 9) mod 9, with the gradient's length as its
weight; each cell's histogram is divided by its Euclidean norm. There is no Gaussian window.

Legend: B batch, C channels, H, W pixels, M masked patches, (p, q) patch and (r, s) cell in pixels,
K bins, V = (p / r) (q / s) C K values per patch; P, Q pixels of whatever histograms are taken of.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor

from etpp_ssl.config import Config, UserError, as_pair, show_size
from etpp_ssl.targets.base import Objective


class HogConfig(Config):
    """Mean squared error on histograms of oriented gradients (MaskFeat, section 3.2)."""

    name: Literal["hog"] = "hog"
    cell: int | tuple[int, int] | None = None
    """Pixels per cell, one number or [height, width]; None halves the patch (8 for /16, 7 for /14) and
    keeps an odd axis whole."""
    bins: int = Field(default=9, ge=2, le=1024)
    """Orientations between 0 and pi."""

    def build(self, *, patch_size: tuple[int, int], in_chans: int) -> HogObjective:
        """The objective for patches of (p, q) pixels and C channels.

        Raises:
            UserError: if the cell does not divide the patch.
        """
        if self.cell is None:
            cell = (_half_if_even(patch_size[0]), _half_if_even(patch_size[1]))
        else:
            cell = as_pair(self.cell)
        return HogObjective(patch_size, in_chans, cell=cell, bins=self.bins)


class HogObjective(Objective):
    """HOG of the low-frequency crop at its resolution; see `Objective` for the methods' shapes.

    Args:
        patch_size: (p, q) in pixels.
        in_chans: C.
        cell: (r, s) in pixels.
        bins: K.

    Raises:
        UserError: if the cell does not divide the patch.
    """

    def __init__(
        self, patch_size: tuple[int, int], in_chans: int, *, cell: tuple[int, int], bins: int
    ) -> None:
        if not _divides(cell, patch_size):
            raise UserError(
                f"cell {show_size(cell)} of the hog target does not divide the patch of "
                f"{show_size(patch_size)} pixels; {_valid_cells(patch_size)}"
            )
        self.patch_size = patch_size
        self.cell = cell
        self.bins = bins
        self.cells_per_patch = (patch_size[0] // cell[0], patch_size[1] // cell[1])
        self.num_values = self.cells_per_patch[0] * self.cells_per_patch[1] * in_chans * bins

    @torch.no_grad()
    def target(self, images: Tensor, ids_removed: Tensor) -> Tensor:
        """HOG of the masked patches, values in the order (cell row, cell column, C, K).

        A pixel's gradient needs its neighbours, also those of other patches, so what is computed is the
        masked patches with a halo of one pixel each. At a mask ratio of 0.75 this took 0.7 to 1.0 times as
        long as the whole image did, for patches of 16 to 2 pixels, whose halos overlap; at 0.25 a third.
        """
        windows = _windows(images.float(), ids_removed, self.patch_size)
        return rearrange(_histograms(windows, self.cell, self.bins), "b m c i j k -> b m (i j c k)")

    def target_with_gaps(self, images: Tensor, ids_removed: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """A cell counts if all of its pixels do and all that their gradients need, its frame of one pixel."""
        missing = _windows((~valid).float(), ids_removed, self.patch_size)
        frame = (self.cell[0] + 2, self.cell[1] + 2)
        cells = F.max_pool2d(missing.flatten(0, 1), frame, stride=self.cell).flatten(1) == 0
        counts = cells.repeat_interleave(self.num_values // cells.shape[1], dim=1)
        return self.target(images, ids_removed), counts.unflatten(0, ids_removed.shape)


@torch.no_grad()
def hog_features(images: Tensor, cell: int | tuple[int, int], bins: int = 9) -> Tensor:
    """Histograms of oriented gradients of whole images, without gradient.

    Args:
        images: floating point (B, C, H, W), at least 2 x 2 pixels, below 1e18 in magnitude; in what
            units does not matter: a factor changes nothing.
        cell: pixels per cell, one number or (height, width); it divides the image.
        bins: K, at least 2; bin k holds the angles atan2(gx, gy) from k pi / K to (k + 1) pi / K,
            modulo pi.

    Returns:
        float32 (B, C, K, H / cell, W / cell), values from 0 to 1, whatever the precision of `images`,
        also inside autocast. Each cell has Euclidean norm 1, or is zero where the image is flat. The
        norm has no floor worth the name (1e-12, as in the reference): in a cell that is flat but for
        rounding errors, these are what is described.

    Raises:
        UserError: if the images are integers or too small, or the cell does not divide them.
    """
    if not images.is_floating_point():
        raise UserError(f"hog_features needs floating-point images, not {images.dtype}")
    size = (images.shape[2], images.shape[3])
    if min(size) < 2:
        raise UserError(f"hog_features needs images of at least 2x2 pixels, not {show_size(size)}")
    if bins < 2:
        raise UserError(f"bins is {bins}; hog_features takes 2 or more")
    if not _divides(as_pair(cell), size):
        raise UserError(
            f"cell {show_size(as_pair(cell))} does not divide an image of {show_size(size)} pixels; "
            f"{_valid_cells(size)}"
        )
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    return rearrange(_histograms(padded, as_pair(cell), bins), "b c h w k -> b c k h w")


def _windows(images: Tensor, ids: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The patches at `ids` with one more pixel on each side, (B, M, C, p + 2, q + 2).

    Only the image is padded: inside it, a patch's halo is made of its neighbours' pixels.
    """
    p, q = patch_size
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    windows = padded.unfold(2, p + 2, p).unfold(3, q + 2, q)
    columns = windows.shape[3]
    batch = torch.arange(len(images), device=images.device)[:, None]
    return windows[batch, :, ids // columns, ids % columns]


def _histograms(padded: Tensor, cell: tuple[int, int], bins: int) -> Tensor:
    """Normalised histograms, float32 (..., P + 2, Q + 2) to (..., P / r, Q / s, K).

    Nothing here is a matrix product or a convolution, so autocast and TF32 do not reach it.
    """
    gx, gy = _sobel(padded)
    *leading, height, width = gx.shape
    count, rows, columns = math.prod(leading), height // cell[0], width // cell[1]
    length = (gx * gx).addcmul_(gy, gy).sqrt_()
    # From -bins to bins. A NaN has no bin; it stays in its length.
    level = torch.atan2(gx, gy).div_(math.pi).mul_(bins).floor_().nan_to_num_(0.0)

    # One scatter over all cells at once, modulo pi afterwards: the levels of a cell have slots of
    # their own, and opposite directions meet in the sum of a few slots instead of a pass over pixels.
    num_levels = 2 * bins + 1
    row = torch.arange(height, device=padded.device)[:, None] // cell[0]
    column = torch.arange(width, device=padded.device) // cell[1]
    slot = level.to(torch.int64).add_((row * columns + column) * num_levels + bins)
    sums = length.new_zeros(count, rows * columns * num_levels)
    sums.scatter_add_(1, slot.view(count, height * width), length.view(count, height * width))
    sums = sums.view(*leading, rows, columns, num_levels)
    histograms = sums[..., :bins] + sums[..., bins:-1]
    histograms[..., 0] += sums[..., -1]
    return F.normalize(histograms, dim=-1)


def _sobel(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel derivatives gx, gy, (..., P + 2, Q + 2) to (..., P, Q) each; left minus right, top minus bottom.

    Differences come first, so that equal neighbours give an exact zero and a flat cell no rounding error.
    """
    across = padded[..., :-2] - padded[..., 2:]
    gx = (across[..., :-2, :] + across[..., 2:, :]).add_(across[..., 1:-1, :], alpha=2)
    down = padded[..., :-2, :] - padded[..., 2:, :]
    gy = (down[..., :-2] + down[..., 2:]).add_(down[..., 1:-1], alpha=2)
    return gx, gy


def _half_if_even(size: int) -> int:
    return size // 2 if size % 2 == 0 else size


def _divides(cell: tuple[int, int], size: tuple[int, int]) -> bool:
    return min(cell) >= 1 and size[0] % cell[0] == 0 and size[1] % cell[1] == 0


def _valid_cells(size: tuple[int, int]) -> str:
    height, width = (", ".join(str(n) for n in range(1, side + 1) if side % n == 0) for side in size)
    return f"valid are {height}" + ("" if height == width else f" (height) and {width} (width)")
