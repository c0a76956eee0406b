"""Position embeddings on any grid, in units of the base grid.

A patch at bandwidth B covers B_full / B times more of the scene, so patch i of g on an axis has its
centre at (i + 0.5) G / g - 0.5 on the base axis of G patches (the align_corners=False rule). Fixed
sin-cos embeddings are evaluated there; learned ones are resampled, inside the forward pass, so that
the parameter, its gradient and its optimizer state stay at the base resolution.

Legend: N patches, P prefix tokens, D width.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from etpp_ssl.config import UserError

POSITION_TOLERANCE = 1e-4
"""Between two ways to compute the table in float32; rows of neighbours differ by about 1."""


def patch_centres(num_patches: int, base: int) -> Tensor:
    """Centres of the patches of one axis, float64 (num_patches,), in units of base patches."""
    return (torch.arange(num_patches, dtype=torch.float64) + 0.5) * (base / num_patches) - 0.5


def sincos_pos_embed(grid: tuple[int, int], base_grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed two-dimensional sin-cos embedding at the patch centres of `grid`.

    For each axis half of the width, as [sin | cos] with omega_i = 10000^(-i / (D / 4)); the column
    coordinate fills the first half, the row coordinate the second (MAE, `util/pos_embed.py`).

    Args:
        grid: (h, w) patches now.
        base_grid: (H, W) patches at full resolution; equal to `grid`, this is MAE's own table.
        dim: D, a multiple of 4.

    Returns:
        float32 (N, D), N = h w, row by row.

    Raises:
        UserError: if D is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"sin-cos positions need a width that is a multiple of 4, not {dim}")
    rows = _axis_embedding(patch_centres(grid[0], base_grid[0]), dim // 2)
    columns = _axis_embedding(patch_centres(grid[1], base_grid[1]), dim // 2)
    both = torch.cat(
        [
            columns[None, :, :].expand(grid[0], -1, -1),
            rows[:, None, :].expand(-1, grid[1], -1),
        ],
        dim=-1,
    )
    return both.flatten(0, 1).float()


@lru_cache(maxsize=64)
def sincos_on(device: torch.device, grid: tuple[int, int], base_grid: tuple[int, int], dim: int) -> Tensor:
    """`sincos_pos_embed` on a device, computed once."""
    # A tensor made in inference mode could not take part in training later.
    with torch.inference_mode(False):
        return sincos_pos_embed(grid, base_grid, dim).to(device)


class SincosTable(NamedTuple):
    """What a table of sin-cos positions says of itself."""

    grid: tuple[int, int]
    """(h, w) patches."""
    position_grid: tuple[int, int]
    """(H, W) patches in whose units it counts."""


def sincos_table(
    pos_embed: Tensor, num_prefix: int, grid: tuple[int, int] | None = None
) -> SincosTable | None:
    """The grids whose sin-cos table this is, with zeros for prefix tokens, or None for learned positions.

    A table tells its grid, so that 4 x 9 patches are not taken for 6 x 6, and its units: those of another
    grid are found from the slowest of its waves, if these are at least two.

    Args:
        pos_embed: (1, P + N, D).
        num_prefix: P.
        grid: the one it must be, where that is known.
    """
    # Tables that were stored in half precision are known to its last place only.
    tolerance = max(POSITION_TOLERANCE, torch.finfo(pos_embed.dtype).eps)
    prefix, table = pos_embed[0, :num_prefix].float(), pos_embed[0, num_prefix:].float()
    num_patches, width = table.shape
    if width % 4 or (prefix.numel() and prefix.abs().max() > tolerance):
        return None
    for rows in range(1, num_patches + 1):
        candidate = (rows, num_patches // rows)
        if num_patches % rows or (grid is not None and candidate != grid):
            continue
        other = _units(table, rows, 1), _units(table, candidate[1], 0)
        for units in (candidate, other) if min(other) > 0 else (candidate,):
            if torch.allclose(table, sincos_pos_embed(candidate, units, width), 0, tolerance):
                return SincosTable(candidate, units)
    return None


def _units(table: Tensor, num_patches: int, axis: int) -> int:
    """The base G of one axis of g patches, if this is a table: its last row is that of the last patch."""
    half = table.shape[1] // 2
    sines, cosines = table[-1, axis * half :][:half].double().view(2, -1)
    slowest = 10000.0 ** -(1 - 1 / len(sines))
    last = float(torch.atan2(sines[-1], cosines[-1])) / slowest
    return round((last + 0.5) / (1 - 0.5 / num_patches)) if math.isfinite(last) else 0


def _axis_embedding(coordinates: Tensor, dim: int) -> Tensor:
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = coordinates[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def resampled_pos_embed(
    pos_embed: Tensor, grid: tuple[int, int], base_grid: tuple[int, int], num_prefix: int
) -> Tensor:
    """A learned embedding on another grid: bicubic, antialiased, differentiable.

    Args:
        pos_embed: (1, P + N_base, D) at the base grid.
        grid: (h, w) patches now.
        base_grid: (H, W) of the parameter.
        num_prefix: P, the rows at the front that belong to prefix tokens and are never resampled.

    Returns:
        (1, P + h w, D).
    """
    if grid == base_grid:
        return pos_embed
    if pos_embed.is_cuda and torch.are_deterministic_algorithms_enabled():
        # torch refuses the backward pass of its interpolation there; that of a product is deterministic.
        return resampled_by_products(pos_embed, grid, base_grid, num_prefix)
    from timm.layers import resample_abs_pos_embed

    # Without old_size, timm takes any grid of the same number of tokens for a square one.
    resampled: Tensor = resample_abs_pos_embed(
        pos_embed, new_size=list(grid), old_size=list(base_grid), num_prefix_tokens=num_prefix
    )
    return resampled


def resampled_by_products(
    pos_embed: Tensor, grid: tuple[int, int], base_grid: tuple[int, int], num_prefix: int
) -> Tensor:
    """`resampled_pos_embed` as one matrix product per axis, equal up to rounding."""
    prefix, table = pos_embed[:, :num_prefix], pos_embed[0, num_prefix:].float()
    rows, columns = (
        _resampling(base, new, pos_embed.device) for base, new in zip(base_grid, grid, strict=True)
    )
    with torch.autocast(device_type=pos_embed.device.type, enabled=False):
        along_rows = rows @ table.view(base_grid[0], -1)
        resampled = columns @ along_rows.view(grid[0], base_grid[1], -1)
    return torch.cat([prefix, resampled.flatten(0, 1)[None].to(pos_embed.dtype)], dim=1)


@lru_cache(maxsize=64)
def _resampling(base: int, new: int, device: torch.device) -> Tensor:
    """What torch's antialiased bicubic interpolation does to an axis, float32 (new, base)."""
    with torch.inference_mode(False), torch.no_grad():
        # Two equal columns: of one, torch's result is wrong.
        unit_vectors = torch.eye(base)[:, None, :, None].expand(-1, -1, -1, 2)
        columns = interpolate(unit_vectors, size=(new, 2), mode="bicubic", antialias=True)
        return columns[:, 0, :, 0].T.contiguous().to(device)
