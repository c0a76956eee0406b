"""Official MAE checkpoints as models of ours: the architecture is read off the shapes of the tensors.

No shape tells the number of attention heads; it is that of the published ViTs, unless it is given.

Legend: N patches, P prefix tokens, D encoder width, E decoder width, C channels, p, q patch size,
V values per patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from etpp_ssl.config import UserError, listed, show_size
from etpp_ssl.model.decoders import MAEDecoderConfig
from etpp_ssl.model.encoders import build_encoder
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.weights.layouts import Weights, read_weights, recognise
from etpp_ssl.weights.reading import load_weights, require_finite, state_dict_in
from etpp_ssl.weights.tensors import HEADS_OF_WIDTH, UNSET_POSITIONS

MAE_DECODER_HEADS = 16
_PLAIN_ENCODER = re.compile(
    r"encoder\.(cls_token|reg_token|pos_embed|(patch_embed\.proj|norm|fc_norm"
    r"|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias))"
)


def load_official_mae(
    source: str | Path | Mapping[str, Any],
    *,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    mask_ratio: float = 0.75,
    say: Callable[[str], None] = print,
) -> MaskedAutoencoder:
    """A masked autoencoder with the weights of an official checkpoint.

    If the file has no decoder, MAE's default one (512 wide, 8 blocks) is freshly initialised from torch's
    global generator. A classifier with average pooling has its norm after the pooling (`fc_norm`); its
    encoder is built the same way, so that `model.encoder(images)` gives the features that its head read.
    Positions that are MAE's sin-cos table stay fixed, others stay learned.

    Args:
        source: a `.pth` or safetensors file, or its content.
        image_size: (H, W) in pixels, if the positions are not a square grid.
        num_heads: of the encoder; None takes that of the published ViTs.
        decoder_num_heads: of the decoder; None takes MAE's 16.
        mask_ratio: of the returned model.
        say: told what was recognised, dropped or initialised anew, a line each.

    Returns:
        The model, in training mode as torch builds it, parameters in float32.

    Raises:
        UserError: for a file that is refused, or tensors of another kind of model.
    """
    if isinstance(source, Mapping):
        where, given = "the state dict", state_dict_in(source, "the state dict")
        require_finite(given, where)
        weights = recognise(given, where)
    else:
        where, weights = repr(str(source)), read_weights(source)
    lines = [f"{where} is {weights.layout}", *weights.notes]
    tensors = weights.tensors
    strange = [k for k in tensors if k.startswith("encoder.") and not _PLAIN_ENCODER.fullmatch(k)]
    if strange:
        raise UserError(f"{where} is of another architecture: no place for {listed(strange)}")
    shape = shape_of(tensors, where, image_size, num_heads)
    if image_size is None and shape.position_grid is None:
        lines.append(f"its learned positions are taken for a square's: {show_size(shape.image_size)} px")
    if not weights.has_decoder:
        lines.append("there is no decoder in it: MAE's own is initialised anew")
    decoder, num_values = _decoder_of(weights, shape, where, decoder_num_heads)
    config = ModelConfig(
        name="vit",
        **shape.dims,
        patch_size=shape.patch_size,
        pos_embed="learned" if shape.position_grid is None else "sincos",
        position_grid=shape.position_grid or weights.decoder_position_grid,
        mask_ratio=mask_ratio,
        decoder=decoder,
    )
    architecture, args = config.encoder_args(shape.image_size, shape.in_chans)
    if "encoder.fc_norm.weight" in tensors:
        args = {**args, "global_pool": "avg", "fc_norm": True}
    encoder = build_encoder(
        architecture, args, pos_embed=config.pos_embed, position_grid=config.position_grid
    )
    model = config.around(encoder, num_values)
    expected = model.state_dict()
    if not tensors["encoder.pos_embed"].any():
        lines.append(f"its positions {UNSET_POSITIONS}")
        tensors = {**tensors, "encoder.pos_embed": expected["encoder.pos_embed"]}
    if not weights.has_decoder:
        tensors = {**{k: v for k, v in expected.items() if k.startswith("decoder.")}, **tensors}
    model.load_state_dict(load_weights(expected, tensors, where))
    for line in lines:
        say(line)
    return model


@dataclass(frozen=True)
class Shape:
    """An encoder's architecture, read off the shapes of its tensors."""

    dims: dict[str, Any]
    """embed_dim, depth, num_heads, mlp_ratio, class_token, reg_tokens."""
    patch_size: tuple[int, int]
    in_chans: int
    grid: tuple[int, int]
    position_grid: tuple[int, int] | None
    """Patches per axis in whose units its positions are a sin-cos table; None for learned positions."""

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
        image_size: (H, W) in pixels; None takes the grid that a sin-cos table tells, and a square for learned
            positions.
        num_heads: None takes that of the published ViTs.

    Raises:
        UserError: if tensors that it needs are missing, or the positions are of another grid.
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
        what = (
            "are not a square grid" if image_size is None else f"are not those of {show_size(image_size)} px"
        )
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
    # MAE's own table takes the place of one that nobody has filled in.
    units = table.position_grid if table else None if pos_embed.any() else grid
    return Shape(dims, (p, q), in_chans, grid, units)


def num_heads_of(width: int, source: str) -> int:
    """Attention heads of an encoder of width D: those of the published ViT, otherwise heads 64 wide.

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


def _decoder_of(
    weights: Weights, shape: Shape, source: str, num_heads: int | None
) -> tuple[MAEDecoderConfig, int]:
    """The decoder's sizes and V: those of the weights, or MAE's for pixels where they have no decoder."""
    tensors, heads = weights.tensors, num_heads or MAE_DECODER_HEADS
    if not weights.has_decoder:
        return MAEDecoderConfig(), math.prod(shape.patch_size) * shape.in_chans
    needed = ("decoder.embed.weight", "decoder.blocks.0.mlp.fc1.weight", "decoder.head.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"{source} has another decoder than MAE's: {listed(missing)} is missing")
    width = tensors[needed[0]].shape[0]
    if width % heads:
        raise UserError(
            f"{source} has a decoder of width {width}, which {heads} heads do not divide; "
            f"decoder_num_heads must be given"
        )
    blocks = {int(m[1]) for name in tensors if (m := re.match(r"decoder\.blocks\.(\d+)\.", name))}
    config = MAEDecoderConfig(embed_dim=width, depth=max(blocks) + 1, num_heads=heads)
    return config, tensors[needed[2]].shape[0]
