"""The architecture of an encoder, read off its tensors, and the licence that they hint at.

Shapes tell width, depth, patch and tokens; which tensors there are tells the family. No shape tells the
number of attention heads: it is that of the published weights, unless a config beside the file says it.

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
from etpp_ssl.model.encoders import EXPLICIT_NAME
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.weights.layouts import Weights, num_prefix_tokens
from etpp_ssl.weights.tensors import usual_heads

PROJECTION = "encoder.patch_embed.proj.weight"
POSITIONS = "encoder.pos_embed"
PIXIO_TOKENS = 8
LICENCES = {
    "DINOv3": "the DINOv3 License, which goes with what is made from them",
    "Pixio": "the FAIR Noncommercial Research License",
    "MAE": "CC BY-NC 4.0, which allows no commercial use",
}
"""Of the weights that Meta published of a family."""


@dataclass(frozen=True)
class Architecture:
    """An encoder's architecture."""

    family: str
    """"MAE", "Pixio", "DINOv2", "DINOv3", "CLIP" or "SigLIP"; "ViT" for what none of these tells."""
    name: str
    """For `model.name`: timm's, of a network that differs in its dimensions alone, or `vit`."""
    dims: dict[str, Any]
    """embed_dim, depth, num_heads, mlp_ratio, class_token, reg_tokens; fewer where a config tells them."""
    patch_size: tuple[int, int]
    in_chans: int
    grid: tuple[int, int] | None
    """Patches per axis of its positions; None without."""
    position_grid: tuple[int, int] | None
    """Patches per axis in whose units its positions are a sin-cos table; None for learned positions."""
    notes: tuple[str, ...] = ()
    """What was assumed."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        assert self.grid is not None
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of a recipe's `model` that build it."""
        patch = self.patch_size[0] if self.patch_size[0] == self.patch_size[1] else list(self.patch_size)
        keys = {"name": self.name, "patch_size": patch, **self.dims}
        if self.position_grid is not None:
            return {**keys, "pos_embed": "sincos", "position_grid": list(self.position_grid)}
        return {**keys, "pos_embed": "learned"} if self.grid is not None else keys


def architecture_of(
    weights: Weights,
    source: str,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Architecture:
    """The architecture of `encoder.*`.

    Args:
        weights: from `recognise`, with what is known beside the tensors.
        source: names them in messages.
        image_size: (H, W) in pixels; None takes that of the weights, the grid that a sin-cos table tells, or
            a square for learned positions.
        num_heads: None takes that of the weights, or of the published ViTs.

    Raises:
        UserError: if tensors that it needs are missing, the positions are of another grid, or the tensors do
            not tell the family.
    """
    tensors, notes = weights.tensors, list[str]()
    _require(tensors, source)
    if "name" in weights.network:
        family, name = "ViT", str(weights.network["name"])
    else:
        family, name = _family(tensors, weights.activation, source, notes)
        _check_activation(weights.activation, name, source)
    width, in_chans, p, q = tensors[PROJECTION].shape
    size = image_size or weights.image_size
    grid, position_grid = _grid(tensors, source, (p, q), size, image_size)
    registers = tensors["encoder.reg_token"].shape[1] if "encoder.reg_token" in tensors else 0
    if family == "ViT" and position_grid is not None:
        family = "MAE"
    dims = {
        "embed_dim": width,
        "depth": 1 + max(int(m[1]) for name in tensors if (m := re.match(r"encoder\.blocks\.(\d+)\.", name))),
        "num_heads": num_heads or weights.num_heads or num_heads_of(width, source, family),
        "mlp_ratio": _ratio(_hidden(tensors), width),
        "class_token": "encoder.cls_token" in tensors,
        "reg_tokens": registers,
    }
    if "name" in weights.network:
        dims = {key: value for key, value in weights.network.items() if key in dims}
    return Architecture(family, name, dims, (p, q), in_chans, grid, position_grid, tuple(notes))


def _require(tensors: Mapping[str, Tensor], source: str) -> None:
    """See that what the shapes are read off is there.

    Raises:
        UserError: naming what is not.
    """
    gate, fc1 = "encoder.blocks.0.mlp.fc1_g.weight", "encoder.blocks.0.mlp.fc1.weight"
    missing = [name for name in (PROJECTION, gate if gate in tensors else fc1) if name not in tensors]
    if missing:
        raise UserError(f"{source} is of another architecture: {listed(missing)} is missing")


def _family(
    tensors: Mapping[str, Tensor], activation: str | None, source: str, notes: list[str]
) -> tuple[str, str]:
    """The family, and the name for `model.name`."""

    def has(name: str) -> bool:
        return f"encoder.{name}" in tensors

    in_block = "blocks.0."
    if has(f"{in_block}gamma_1") and not has("pos_embed"):
        gated = "_plus" if has(f"{in_block}mlp.fc1_g.weight") else ""
        biased = "_qkvb" if has(f"{in_block}attn.q_bias") else ""
        return "DINOv3", f"vit_small{gated}_patch16_dinov3{biased}"
    if not has("pos_embed") or not has(f"{in_block}attn.qkv.weight") or has(f"{in_block}attn.q_bias"):
        raise UserError(
            f"{source} has rotary positions, whose kind no tensor tells: give model.name, timm's name of it"
        )
    if has(f"{in_block}ls1.gamma"):
        halved = _hidden(tensors) != tensors[f"encoder.{in_block}mlp.fc2.weight"].shape[1]
        size, registers = "giant" if halved else "small", "reg4_" if has("reg_token") else ""
        return "DINOv2", f"vit_{size}_patch14_{registers}dinov2"
    if has("norm_pre.weight"):
        if activation is None:
            notes.append(
                "nothing tells the activation of this CLIP: OpenAI's, QuickGELU, is assumed; for OpenCLIP's "
                "GELU, give model.name=vit_base_patch16_clip_224"
            )
        quick = "" if activation not in (None, "quick_gelu") else "quickgelu_"
        return "CLIP", f"vit_base_patch16_clip_{quick}224"
    if activation == "gelu_pytorch_tanh":
        return "SigLIP", "vit_so400m_patch16_siglip_256"
    return "Pixio" if num_prefix_tokens(tensors, "encoder.") == PIXIO_TOKENS else "ViT", EXPLICIT_NAME


def _check_activation(activation: str | None, name: str, source: str) -> None:
    """See that the activation of a config is that of the network; no tensor would show another one.

    Raises:
        UserError: if it is not.
    """
    if "quickgelu" in name or "siglip" in name or "giant" in name:
        return
    expected = "silu" if "plus" in name else "gelu"
    if activation not in (None, expected):
        raise UserError(
            f"{source} has {activation} in its MLPs, as its config says, and timm's {name} has {expected}: "
            f"give model.name, timm's name of a network that has it"
        )


def _hidden(tensors: Mapping[str, Tensor]) -> int:
    """Width of the MLPs in front of their last layer, as timm counts it: with the gate where both are one."""
    gate = "encoder.blocks.0.mlp.fc1_g.weight"
    return int(tensors[gate if gate in tensors else "encoder.blocks.0.mlp.fc1.weight"].shape[0])


def _ratio(hidden: int, width: int) -> float:
    """The ratio of which timm's int(D * ratio) is the width, whatever the division rounds to."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _grid(
    tensors: Mapping[str, Tensor],
    source: str,
    patch: tuple[int, int],
    size: tuple[int, int] | None,
    given: tuple[int, int] | None,
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Grid of the positions, and the one in whose units they are a sin-cos table."""
    known = None if size is None else (size[0] // patch[0], size[1] // patch[1])
    if POSITIONS not in tensors:
        return None, None
    pos_embed = tensors[POSITIONS]
    # DINOv2 with registers keeps rows for patches alone.
    alone = {"encoder.reg_token", "encoder.blocks.0.ls1.gamma"} <= tensors.keys()
    prefix = 0 if alone else num_prefix_tokens(tensors, "encoder.")
    table = sincos_table(pos_embed, prefix, known)
    num_patches = pos_embed.shape[1] - prefix
    side = math.isqrt(max(num_patches, 0))
    grid = known or (table.grid if table else (side, side))
    if grid[0] * grid[1] != num_patches or num_patches < 1:
        what = f"are not those of {show_size(size)} px" if size and given else "are not a square grid"
        raise UserError(
            f"{source} has {num_patches} patch positions, which {what}; "
            f"image_size=(height, width) must be given"
        )
    # MAE's own table takes the place of one that nobody has filled in.
    return grid, table.position_grid if table else None if pos_embed.any() else grid


def num_heads_of(width: int, source: str, family: str = "") -> int:
    """Attention heads of an encoder of width D: those of the published ViT, otherwise heads 64 wide.

    Raises:
        UserError: if 64 does not divide the width.
    """
    usual = usual_heads(width, family)
    if usual is not None:
        return usual
    if width % 64:
        raise UserError(
            f"{source} has width {width}, which tells no number of heads; num_heads must be given"
        )
    return width // 64


def licence_of(weights: Weights) -> str | None:
    """What is to be said of the licence of weights by others, as a sentence; None where no tensor tells.

    Args:
        weights: from `recognise` or `in_timm_names`.
    """
    prefix = "encoder." if PROJECTION in weights.tensors else ""
    names = {name.removeprefix(prefix) for name in weights.tensors}
    num_prefix = num_prefix_tokens(weights.tensors, prefix)
    positions = weights.tensors.get(f"{prefix}pos_embed")
    family = None
    if "blocks.0.gamma_1" in names and positions is None:
        family = "DINOv3"
    elif num_prefix == PIXIO_TOKENS and "cls_token" in names:
        family = "Pixio"
    elif "blocks.0.attn.qkv.weight" in names and positions is not None and positions.ndim == 3:
        family = "MAE" if weights.has_decoder or sincos_table(positions, num_prefix) else None
    if family is None:
        return None
    return (
        f"The starting weights have the layout of {family}'s. Those that Meta published are under "
        f"{LICENCES[family]}."
    )
