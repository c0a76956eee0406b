"""An encoder's architecture, read off the shapes of its tensors.

Legend: N patches, P prefix tokens, D width, C channels, p, q patch size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from etpp_ssl.config import UserError, listed, show_size
from etpp_ssl.model.pos_embed import sincos_table

HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Published ViTs, ViT-H among them, whose heads are 80 wide."""


@dataclass(frozen=True)
class Shape:
    """An encoder's architecture, as its tensors tell it."""

    dims: dict[str, Any]
    """embed_dim, depth, num_heads, mlp_ratio, class_token, reg_tokens."""
    patch_size: tuple[int, int]
    in_chans: int
    grid: tuple[int, int]
    position_grid: tuple[int, int] | None
    """Patches per axis in whose units its positions are the sin-cos table of that grid; None of learned
    ones."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]


def shape_of(
    tensors: Mapping[str, Tensor],
    source: str,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Shape:
    """The architecture of `encoder.*`.

    Args:
        tensors: under our names.
        source: names them in messages.
        image_size: (H, W) in pixels; None takes the grid from a sin-cos table, which tells it, and learned
            positions for those of a square.
        num_heads: or None for `num_heads_of`.

    Raises:
        UserError: if tensors that say it are missing, or the positions are no such grid.
    """
    needed = ("encoder.patch_embed.proj.weight", "encoder.pos_embed", "encoder.blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"{source} is of another architecture: {listed(missing)} is missing")
    width, in_chans, p, q = tensors[needed[0]].shape
    blocks = {int(m[1]) for name in tensors if (m := re.match(r"encoder\.blocks\.(\d+)\.", name))}
    registers = tensors["encoder.reg_token"].shape[1] if "encoder.reg_token" in tensors else 0
    class_token = "encoder.cls_token" in tensors
    prefix = int(class_token) + registers
    pos_embed = tensors["encoder.pos_embed"]
    known = None if image_size is None else (image_size[0] // p, image_size[1] // q)
    table = sincos_table(pos_embed, prefix, known)
    side = math.isqrt(pos_embed.shape[1] - prefix)
    grid = known or (table.grid if table else (side, side))
    if grid[0] * grid[1] != pos_embed.shape[1] - prefix:
        what = "are no square grid" if image_size is None else f"are not those of {show_size(image_size)} px"
        raise UserError(
            f"{source} has {pos_embed.shape[1] - prefix} patch positions, which {what}; "
            f"image_size=(height, width) must be given"
        )
    dims = {
        "embed_dim": width,
        "depth": max(blocks) + 1,
        "num_heads": num_heads or num_heads_of(width, source),
        "mlp_ratio": tensors[needed[2]].shape[0] / width,
        "class_token": class_token,
        "reg_tokens": registers,
    }
    return Shape(dims, (p, q), in_chans, grid, table.position_grid if table else None)


def num_heads_of(width: int, source: str) -> int:
    """Attention heads of an encoder of width D: the published ViTs', otherwise heads 64 wide.

    Raises:
        UserError: if 64 does not divide the width.
    """
    if width in HEADS_OF_WIDTH:
        return HEADS_OF_WIDTH[width]
    if width % 64:
        raise UserError(
            f"{source} has width {width}, which tells no number of heads; num_heads must be given"
        )
    return width // 64
