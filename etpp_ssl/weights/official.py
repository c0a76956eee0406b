"""Checkpoints of others, MAE's first, as models of ours: the architecture is read off the tensors.

Legend: E decoder width, C channels, V values per patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError, listed, show_size
from etpp_ssl.model.decoders import MAEDecoderConfig
from etpp_ssl.model.encoders import build_encoder
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.weights.architecture import Architecture, architecture_of
from etpp_ssl.weights.layouts import Weights, read_weights, recognise
from etpp_ssl.weights.reading import load_weights, require_finite, state_dict_in
from etpp_ssl.weights.tensors import UNSET_POSITIONS

MAE_DECODER_HEADS = 16
ASSUMED_GRID = 14
"""Patches per axis of an encoder with rotary positions: 224 px of 16."""


def load_official_mae(
    source: str | Path | Mapping[str, Any],
    *,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    mask_ratio: float = 0.75,
    activation: str | None = None,
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
        activation: transformers' name of the one in the MLPs, if a config tells it.
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
    weights = replace(weights, activation=activation or weights.activation)
    lines = [f"{where} is {weights.layout}", *weights.notes]
    tensors = weights.tensors
    found = architecture_of(weights, where, image_size, num_heads)
    lines += found.notes
    size = image_size or weights.image_size
    if found.grid is not None:
        size = found.image_size
        if image_size is None and found.position_grid is None:
            lines.append(f"its learned positions are taken for a square's: {show_size(size)} px")
    elif size is None:
        size = (found.patch_size[0] * ASSUMED_GRID, found.patch_size[1] * ASSUMED_GRID)
        lines.append(f"nothing tells its image size: {show_size(size)} px are assumed")
    if not weights.has_decoder:
        lines.append("there is no decoder in it: MAE's own is initialised anew")
    decoder, num_values = _decoder_of(weights, found, where, decoder_num_heads)
    keys = {**found.keys, "mask_ratio": mask_ratio, "decoder": decoder}
    if found.position_grid is None and weights.decoder_position_grid is not None:
        keys["position_grid"] = weights.decoder_position_grid
    config = ModelConfig.model_validate(keys)
    architecture, args = config.encoder_args(size, found.in_chans)
    if "encoder.fc_norm.weight" in tensors:
        args = {**args, "global_pool": "avg", "fc_norm": True}
    encoder = build_encoder(
        architecture, args, pos_embed=config.pos_embed, position_grid=config.position_grid
    )
    model = config.around(encoder, num_values)
    expected = model.state_dict()
    if "encoder.pos_embed" in tensors and not tensors["encoder.pos_embed"].any():
        lines.append(f"its positions {UNSET_POSITIONS}")
        tensors = {**tensors, "encoder.pos_embed": expected["encoder.pos_embed"]}
    if not weights.has_decoder:
        tensors = {**{k: v for k, v in expected.items() if k.startswith("decoder.")}, **tensors}
    model.load_state_dict(load_weights(expected, tensors, where))
    for line in lines:
        say(line)
    return model


def _decoder_of(
    weights: Weights, found: Architecture, source: str, num_heads: int | None
) -> tuple[MAEDecoderConfig, int]:
    """The decoder's sizes and V: those of the weights, or MAE's for pixels where they have no decoder."""
    tensors, heads = weights.tensors, num_heads or MAE_DECODER_HEADS
    if not weights.has_decoder:
        return MAEDecoderConfig(), math.prod(found.patch_size) * found.in_chans
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
