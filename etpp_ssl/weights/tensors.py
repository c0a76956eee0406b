"""Single tensors of one model as the start of another's: input convolutions, positions, heads.

Every conversion adds a line to `notes`.

Legend: N patches, P prefix tokens, D width, C channels, p, q patch size.
"""

from __future__ import annotations

import math

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.model.pos_embed import resampled_pos_embed, sincos_pos_embed

UNSET_POSITIONS = (
    "are all zero, as transformers leaves those of a ViTMAE that it builds itself; the model's own are used"
)
"""What is said of a table of positions that nobody has filled in, and that was frozen so."""
HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Of the published ViTs; the heads of ViT-H are 80 wide."""
OTHER_HEADS = {"DINOv3": {1280: 20, 4096: 32}, "SigLIP": {1152: 16, 1536: 16}}
"""Of families that have others."""


def usual_heads(width: int, family: str = "") -> int | None:
    """The number of heads of published weights of width D, or None; `family` as `Architecture` names it."""
    return {**HEADS_OF_WIDTH, **OTHER_HEADS.get(family, {})}.get(width)


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """An input convolution for another number of channels (timm's rule).

    One channel gets the sum over channels, which keeps the response to a grey image. One or three channels
    become more or fewer by repeating them in turn, scaled by old / new.

    Args:
        weight: (D, C_old, p, q).
        in_chans: C.

    Returns:
        (D, C, p, q).

    Raises:
        UserError: from another number of channels, whose order does not tell the new ones.
    """
    old = weight.shape[1]
    if in_chans == old:
        return weight
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    if old not in (1, 3):
        raise UserError(
            f"in_chans is {in_chans}, but the weights are for {old} channels: there is a rule from 1 and 3 "
            f"channels, and to 1"
        )
    repeated = weight.repeat(1, math.ceil(in_chans / old), 1, 1)[:, :in_chans]
    return repeated * (old / in_chans)


def adapt_input(
    weight: Tensor, in_chans: int, source: str, notes: list[str], *, what: str = "patch projection"
) -> Tensor:
    """`adapt_channels` of a model's input convolution, with a note.

    Args:
        weight: (D, C_old, p, q).
        in_chans: C.
        source: names the weights in messages.
        notes: gets a line if something was converted.
        what: names the convolution.

    Returns:
        float32 (D, C, p, q).

    Raises:
        UserError: for a channel count without a rule.
    """
    try:
        adapted = adapt_channels(weight.float(), in_chans)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if in_chans != weight.shape[1]:
        how = "summed" if in_chans == 1 else "repeated in turn and scaled"
        notes.append(f"the {what}'s {weight.shape[1]} channels are {how} for {in_chans}")
    return adapted


def adapt_patch(weight: Tensor, patch: tuple[int, int], notes: list[str]) -> Tensor:
    """A patch projection for another patch size, by FlexiViT's rule, which keeps the tokens similar.

    Args:
        weight: (D, C, p_old, q_old).
        patch: (p, q) in pixels.
        notes: gets a line if something was converted.

    Returns:
        (D, C, p, q).
    """
    old = (weight.shape[2], weight.shape[3])
    if patch == old:
        return weight
    notes.append(f"the patch projection is resampled from {show_size(old)} to {show_size(patch)} px")
    resampled: Tensor = resample_patch_embed(weight, list(patch))
    return resampled


def adapt_positions(
    positions: Tensor,
    grid: tuple[int, int],
    num_prefix: int,
    source: str,
    notes: list[str],
    *,
    old_grid: tuple[int, int] | None = None,
    position_grid: tuple[int, int] | None = None,
    name: str = "positions",
) -> Tensor:
    """Position embeddings as the start of learned ones on another grid, over the same scene.

    A sin-cos table is computed at the new patch centres, as pre-training does for smaller images. Learned
    positions are resampled. Prefix tokens keep theirs.

    Args:
        positions: (1, P + N_old, D).
        grid: (h, w) patches now.
        num_prefix: P.
        source: names the weights in messages.
        notes: gets a line if something was converted.
        old_grid: patches per axis of `positions`, where that is known.
        position_grid: patches per axis in whose units `positions` are a sin-cos table, or None.
        name: what to call them.

    Returns:
        float32 (1, P + h w, D).

    Raises:
        UserError: if `positions` are not those of `old_grid`, or are learned and nothing tells their grid.
    """
    num_patches = positions.shape[1] - num_prefix
    old = old_grid or _square(num_patches, grid, source)
    if num_patches < 1 or old[0] * old[1] != num_patches:
        raise UserError(f"{source} has {num_patches} positions, but its config says {show_grid(old)} patches")
    positions = positions.float()
    if old == grid:
        return positions
    change = f"from {show_grid(old)} to {show_grid(grid)} patches"
    if position_grid is None:
        notes.append(f"the learned {name} are resampled {change}")
        return resampled_pos_embed(positions, grid, old, num_prefix)
    notes.append(f"the sin-cos {name} are computed anew over the same scene, {change}")
    table = sincos_pos_embed(grid, position_grid, positions.shape[2])
    return torch.cat([positions[:, :num_prefix], table[None]], dim=1)


def check_heads(
    known: int | None, num_heads: int, width: int, source: str, notes: list[str], family: str = ""
) -> None:
    """Check the number of attention heads, which no shape tells: a wrong one would go unnoticed.

    Args:
        known: number of the weights, or None.
        num_heads: number of the model.
        width: D.
        source: names the weights in messages.
        notes: gets a warning if nothing tells the number and the model's is not the usual one.
        family: of the weights.

    Raises:
        UserError: if it is known to be another.
    """
    if known is not None and num_heads != known:
        raise UserError(f"{source} has {known} heads, but model.num_heads is {num_heads}")
    usual = usual_heads(width, family)
    if known is None and usual not in (None, num_heads):
        notes.append(
            f"warning: model.num_heads is {num_heads}, but published weights of width {width} have "
            f"{usual}; no tensor tells which these have"
        )


def is_resizable(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor can be `wanted` at another size: it has as many axes, and none is empty."""
    return tensor.ndim == wanted.ndim and tensor.numel() > 0


def show_grid(grid: tuple[int, int]) -> str:
    """`14x14`: rows x columns."""
    return f"{grid[0]}x{grid[1]}"


def _square(num_patches: int, grid: tuple[int, int], source: str) -> tuple[int, int]:
    """The square grid of learned positions that come without one."""
    side = math.isqrt(max(num_patches, 0))
    square = side > 0 and side * side == num_patches
    if num_patches == grid[0] * grid[1] and not square:
        return grid
    if not square or (num_patches == grid[0] * grid[1] and grid != (side, side)):
        raise UserError(
            f"{source} has {num_patches} learned positions and nothing says of which grid; name a run "
            f"folder or the folder of an export, which say it"
        )
    return side, side
