"""Swin Transformer at any bandwidth: windows shrink with the image, parameters stay at base size.

A window of w patches at full resolution covers a part of the scene. At bandwidth B the same part is w B /
B_full patches wide: B / 32 for windows of 7 at 224 pixels. So the attention of every stage sees the same
region throughout a curriculum, and no window is padded. timm's own `dynamic_img_size` keeps windows of w
patches and pads them.

Relative positions follow: a patch at bandwidth B is B_full / B base patches wide, so an offset of d patches
is one of d B_full / B base patches, where the table is read, resampled in the forward pass. The table, its
gradient and its optimizer state stay at base size. At base size, timm's own code runs.

Legend: B batch, H, W patches of a stage, C width, h, w patches of a window, N = h w, G heads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

Pair = tuple[int, int]

_CUBIC = -0.5
"""Parameter of the cubic kernel: torch's for antialiased bicubic, as used for position embeddings."""
_MASKED = -100.0
"""What timm adds to the scores of patches that only a cyclic shift made neighbours."""


class WindowView(NamedTuple):
    """The windows of a stage that is not at its base size; the fields are per axis."""

    window: Pair
    """Patches of a window."""
    grid: Pair
    """Patches of the stage now."""
    base_grid: Pair
    """Patches of the stage at full resolution."""


def window_at(base_window: int, base_grid: int, grid: int) -> int:
    """Patches of a window along one axis: base_window * grid / base_grid, as a divisor of the grid.

    If that is not a divisor, the nearest divisor by ratio; of two equally near ones the larger.
    """
    asked = base_window * grid / base_grid
    divisors = [size for size in range(1, grid + 1) if grid % size == 0]
    return min(divisors, key=lambda size: (max(size / asked, asked / size), -size))


def make_resizable(net: nn.Module) -> None:
    """Let every Swin Transformer below `net` take images of any size, in place.

    timm's modules change their class, as `torch.nn.utils.parametrize` does: parameters, their names
    and shapes, and the result at base size are stock timm's.
    """
    for module in net.modules():
        if isinstance(module, SwinTransformer):
            module.patch_embed.strict_img_size = False
        if type(module) is SwinTransformerBlock:
            module.__class__ = ResizableSwinBlock
        if type(module) is WindowAttention:
            module.__class__ = ResizableWindowAttention


class ResizableSwinBlock(SwinTransformerBlock):
    """timm's block with windows that follow the size of the grid; `make_resizable` makes it."""

    def _attn(self, x: Tensor) -> Tensor:
        """Attention in windows, (B, H, W, C) to (B, H, W, C)."""
        grid: Pair = (x.shape[1], x.shape[2])
        base_grid: Pair = tuple(self.input_resolution)
        if grid == base_grid:
            return super()._attn(x)  # type: ignore[no-any-return]
        window = (
            window_at(self.window_size[0], base_grid[0], grid[0]),
            window_at(self.window_size[1], base_grid[1], grid[1]),
        )
        shift = self._shift_of(window, grid)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        h, w = window
        windows_BNC = rearrange(x, "b (i h) (j w) c -> (b i j) (h w) c", h=h, w=w)
        mask = shift_mask(window, shift, grid, x.device).to(x.dtype) if any(shift) else None
        windows_BNC = self.attn(windows_BNC, mask, WindowView(window, grid, base_grid))
        i, j = grid[0] // h, grid[1] // w
        x = rearrange(windows_BNC, "(b i j) (h w) c -> b (i h) (j w) c", i=i, j=j, h=h)
        return x.roll(shift, dims=(1, 2)) if any(shift) else x

    def _shift_of(self, window: Pair, grid: Pair) -> Pair:
        """Half a window in shifted blocks; none along an axis that one window spans, as in timm."""
        if not any(self.target_shift_size):
            return (0, 0)
        half = [0 if size == whole else size // 2 for size, whole in zip(window, grid, strict=True)]
        return (half[0], half[1])


class ResizableWindowAttention(WindowAttention):
    """timm's window attention that can read its table of relative positions at another spacing."""

    view: WindowView | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None, view: WindowView | None = None) -> Tensor:
        """Attention within windows.

        Args:
            x: (windows B, N, C).
            mask: (windows, N, N), added to the scores, or None.
            view: the windows' size and spacing; None are those of the table.
        """
        # timm's forward pass gets the bias from a method without arguments.
        self.view = view
        try:
            return super().forward(x, mask)  # type: ignore[no-any-return]
        finally:
            self.view = None

    def _get_rel_pos_bias(self) -> Tensor:
        """(1, G, N, N)."""
        if self.view is None:
            return super()._get_rel_pos_bias()  # type: ignore[no-any-return]
        window = self.view.window
        table = resampled_table(self.relative_position_bias_table, self.window_size, self.view)
        index = relative_index(window, table.device)
        return rearrange(table[index], "(n m) g -> 1 g n m", n=window[0] * window[1])


def resampled_table(table: Tensor, base_window: Pair, view: WindowView) -> Tensor:
    """The table of relative positions for windows of another size and spacing.

    The entry for an offset of d patches is read at d base_grid / grid base patches, bicubic and antialiased,
    so that every base entry is used, and trained, at every bandwidth. Offsets beyond the table, which only
    windows larger than at full resolution have, take its last entry.

    Args:
        table: ((2 H - 1) (2 W - 1), G) for base windows of H x W patches, row by row.
        base_window: (H, W).
        view: the windows now.

    Returns:
        ((2 h - 1) (2 w - 1), G), differentiable in `table`.
    """
    rows, columns = (
        offset_weights(
            view.window[axis], base_window[axis], view.grid[axis], view.base_grid[axis], table.device
        )
        for axis in (0, 1)
    )
    square = rearrange(table, "(a b) g -> a b g", b=2 * base_window[1] - 1)
    # Products and sums, because autocast would run a matrix product in half precision.
    down_ybg = (rows[:, :, None, None] * square.float()).sum(dim=1)
    both_yxg = (columns[:, :, None] * down_ybg[:, None]).sum(dim=2)
    return both_yxg.flatten(0, 1).to(table.dtype)


@lru_cache(maxsize=128)
def offset_weights(window: int, base_window: int, grid: int, base_grid: int, device: torch.device) -> Tensor:
    """How the offsets of one axis are interpolated from those of the base, each row summing to 1.

    Returns:
        float32 (2 window - 1, 2 base_window - 1).
    """
    # A tensor made in inference mode could not take part in training later.
    with torch.inference_mode(False):
        spacing = base_grid / grid
        offsets = torch.arange(1 - window, window, dtype=torch.float64) * spacing
        base_offsets = torch.arange(1 - base_window, base_window, dtype=torch.float64)
        centres = offsets.clamp(1 - base_window, base_window - 1)
        # Entries that lie closer than in the base are interpolated, not averaged.
        weights = _cubic((centres[:, None] - base_offsets) / max(spacing, 1.0))
        return (weights / weights.sum(dim=1, keepdim=True)).float().to(device)


@lru_cache(maxsize=128)
def relative_index(window: Pair, device: torch.device) -> Tensor:
    """Entry of the table for each ordered pair of patches of a window, int64 (N * N,)."""
    with torch.inference_mode(False):
        rows = torch.arange(window[0]).repeat_interleave(window[1])
        columns = torch.arange(window[1]).repeat(window[0])
        down = rows[:, None] - rows + window[0] - 1
        right = columns[:, None] - columns + window[1] - 1
        return (down * (2 * window[1] - 1) + right).flatten().to(device)


@lru_cache(maxsize=128)
def shift_mask(window: Pair, shift: Pair, grid: Pair, device: torch.device) -> Tensor:
    """What is added to the scores after a cyclic shift, so that only true neighbours see each other.

    Returns:
        float32 (windows, N, N), 0 or -100.
    """
    with torch.inference_mode(False):
        # Along an axis, the last `shift` places hold patches from the other end.
        wrapped = [torch.arange(grid[axis]) >= grid[axis] - shift[axis] for axis in (0, 1)]
        part = wrapped[0][:, None].long() * 2 + wrapped[1]
        parts = rearrange(part, "(i h) (j w) -> (i j) (h w)", h=window[0], w=window[1])
        apart = parts[:, :, None] != parts[:, None, :]
        return (apart * _MASKED).to(device)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, zero beyond distance 2."""
    x = x.abs()
    near = (_CUBIC + 2) * x**3 - (_CUBIC + 3) * x**2 + 1
    far = _CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
