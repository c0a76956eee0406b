"""Weights of others in our names: MAE's, timm's, DeiT's, Hugging Face's; and ours in MAE's names.

A layout is recognised by its tensors' names, an architecture by their shapes; the file's name says
nothing. What no shape tells is the number of attention heads: see `etpp_ssl.weights.tensors`.

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

import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError, listed, show_size
from etpp_ssl.model.decoders import MAEDecoderConfig
from etpp_ssl.model.encoders import build_encoder
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.pos_embed import sincos_pos_embed, sincos_table
from etpp_ssl.weights.huggingface import EMBEDDING, from_huggingface
from etpp_ssl.weights.reading import (
    FINE_TUNED,
    load_weights,
    read_state_dict,
    require_finite,
    state_dict_in,
    without_prefix,
)
from etpp_ssl.weights.tensors import Shape, shape_of

MAE_DECODER_HEADS = 16

_HEADS = ("head", "pooler", "classifier")
_PLAIN_ENCODER = re.compile(
    r"encoder\.(cls_token|reg_token|pos_embed|(patch_embed\.proj|norm|fc_norm"
    r"|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2))\.(weight|bias))"
)

_DECODER_NAMES = {
    "decoder_embed": "decoder.embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.head",
    "mask_token": "decoder.mask_token",
}


@dataclass(frozen=True)
class Weights:
    """Tensors under known names, and what became of the others."""

    tensors: dict[str, Tensor]
    """`encoder.*` as in timm's VisionTransformer, `decoder.*` as in `MAEDecoder`; for a classifier, from
    `classifier_layouts`, timm's own names."""
    layout: str
    """What was recognised, in words."""
    notes: tuple[str, ...] = ()
    """What was dropped or computed anew, one sentence each."""
    image_size: tuple[int, int] | None = None
    """(H, W) in pixels that the positions belong to, where something beside the tensors says so."""
    num_heads: int | None = None
    """Of the encoder, likewise."""
    position_grid: tuple[int, int] | None = None
    """Patches per axis in whose units the positions are a sin-cos table, likewise."""
    decoder_position_grid: tuple[int, int] | None = None
    """The same of the decoder's fixed positions, where that is known."""

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder."""
        return any(name.startswith("decoder.") for name in self.tensors)

    def grid_of(self, projection: Tensor) -> tuple[int, int] | None:
        """Patches per axis of the image size that is known, for a projection (D, C, p, q)."""
        if self.image_size is None:
            return None
        return self.image_size[0] // projection.shape[2], self.image_size[1] // projection.shape[3]


def recognise(state_dict: Mapping[str, Tensor], source: str = "the state dict") -> Weights:
    """Weights of a known layout under our names.

    Known are MAE's (encoder alone, with decoder, fine-tuned or linear classifier), timm's plain
    VisionTransformers, DeiT's, which are named alike, Hugging Face's ViTMAE and ViT, and ours. Classifier
    heads and poolers are dropped, and so is MAE's `decoder_pos_embed`, which ours computes; its units are
    noted.

    Args:
        state_dict: tensors by name.
        source: names them in messages.

    Raises:
        UserError: for another layout, or a distilled DeiT: nothing here holds its second token.
    """
    state_dict = without_prefix(state_dict, FINE_TUNED)
    if {EMBEDDING, f"vit.{EMBEDDING}"} & state_dict.keys():
        state_dict = from_huggingface(state_dict, source)
    names = set(state_dict)
    if {"encoder.patch_embed.proj.weight", "encoder.norm.weight"} <= names:
        return Weights(dict(state_dict), "a masked autoencoder of etpp_ssl")
    if "patch_embed.proj.weight" not in names or "blocks.0.attn.qkv.weight" not in names:
        raise UserError(
            f"{source} is of another architecture: a plain Vision Transformer has patch_embed.proj.weight "
            f"and blocks.0.attn.qkv.weight, this has {listed(sorted(names))}"
        )
    if "dist_token" in names:
        raise UserError(
            f"{source} is a distilled DeiT: its dist_token has no place in a masked autoencoder; "
            f"take the DeiT without distillation"
        )
    tensors: dict[str, Tensor] = {}
    notes = []
    heads = sorted(name for name in names if name.partition(".")[0] in _HEADS)
    if heads:
        notes.append(f"what stands behind the encoder is dropped ({listed(heads)})")
    table = None
    if "decoder_pos_embed" in names:
        registers = state_dict["reg_token"].shape[1] if "reg_token" in names else 0
        table = sincos_table(state_dict["decoder_pos_embed"], int("cls_token" in names) + registers)
        if table is None:
            notes.append("its decoder's positions are no sin-cos table, and give way to one")
    for name, value in state_dict.items():
        if name in heads or name == "decoder_pos_embed":
            continue
        first, dot, rest = name.partition(".")
        tensors[f"{_DECODER_NAMES.get(first, f'encoder.{first}')}{dot}{rest}"] = value
    layout = "an MAE with decoder" if "decoder_embed.weight" in names else "an encoder without decoder"
    return Weights(
        tensors, layout, tuple(notes), decoder_position_grid=table.position_grid if table else None
    )


def read_weights(path: str | Path) -> Weights:
    """`recognise`, of a file; see `read_state_dict` for what is read of it and what is refused."""
    return recognise(read_state_dict(path), repr(str(path)))


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

    Without a decoder in the file, MAE's default one (512 wide, 8 blocks) is freshly initialised from
    torch's global generator. A classifier with average pooling has its norm behind the pooling
    (`fc_norm`): its encoder is built likewise, so that `model.encoder(images)` gives the features its
    head saw. Positions that are MAE's sin-cos table stay fixed, others stay learned.

    Args:
        source: a `.pth` or safetensors file, or its content.
        image_size: (H, W) in pixels, where the positions are no square grid.
        num_heads: of the encoder, where `architecture.num_heads_of` has the wrong one.
        decoder_num_heads: of the decoder, where it is not MAE's 16.
        mask_ratio: of the returned model.
        say: told of what was recognised, dropped or initialised anew.

    Returns:
        The model, in training mode as torch builds it, parameters in float32.

    Raises:
        UserError: for a file that is refused, or tensors that are not those of such a model.
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
    model = _build(config, shape, num_values, fc_norm="encoder.fc_norm.weight" in tensors)
    expected = model.state_dict()
    if not weights.has_decoder:
        tensors = {**{k: v for k, v in expected.items() if k.startswith("decoder.")}, **tensors}
    model.load_state_dict(load_weights(expected, tensors, where))
    for line in lines:
        say(line)
    return model


def official_names(model: MaskedAutoencoder, *, decoder: bool = True) -> dict[str, Tensor]:
    """The state dict in MAE's layout, its fixed decoder positions among it.

    Args:
        model: with an `MAEDecoder`, unless `decoder` is False.
        decoder: include the decoder.

    Returns:
        The encoder's tensors under timm's names, and the decoder's under MAE's with
        `decoder_pos_embed` (1, 1 + N, E), the cls token's row zero.
    """
    tensors = dict(model.encoder.state_dict())
    if not decoder:
        return tensors
    official = {ours: theirs for theirs, ours in _DECODER_NAMES.items()}
    for name, value in model.decoder.state_dict().items():
        first, dot, rest = name.partition(".")
        tensors[f"{official[f'decoder.{first}']}{dot}{rest}"] = value
    tensors["decoder_pos_embed"] = decoder_positions(model)
    return tensors


def decoder_positions(model: MaskedAutoencoder) -> Tensor:
    """The decoder's fixed positions as a tensor, (1, P + N, E), zero for prefix tokens."""
    grid: tuple[int, int] = tuple(model.encoder.patch_embed.grid_size)
    width = model.decoder.mask_token.shape[-1]
    table = sincos_pos_embed(grid, model.position_grid, width)
    return torch.cat([torch.zeros(model.encoder.num_prefix_tokens, width), table])[None]


def _decoder_of(
    weights: Weights, shape: Shape, source: str, num_heads: int | None
) -> tuple[MAEDecoderConfig, int]:
    """The decoder's sizes and V: those of the weights, or MAE's for their pixels where they have none."""
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


def _build(config: ModelConfig, shape: Shape, num_values: int, *, fc_norm: bool) -> MaskedAutoencoder:
    if not fc_norm:
        return config.build(image_size=shape.image_size, in_chans=shape.in_chans, num_values=num_values)
    architecture, args = config.encoder_args(shape.image_size, shape.in_chans)
    args = {**args, "global_pool": "avg", "fc_norm": True}
    encoder = build_encoder(
        architecture, args, pos_embed=config.pos_embed, position_grid=config.position_grid
    )
    assert isinstance(encoder.norm, nn.Identity)
    decoder = config.decoder.build(
        encoder_dim=encoder.embed_dim,
        encoder_depth=len(encoder.blocks),
        num_prefix=encoder.num_prefix_tokens,
        base_grid=config.position_grid or shape.grid,
        num_values=num_values,
    )
    fixed = config.pos_embed == "sincos"
    return MaskedAutoencoder(
        encoder,
        decoder,
        mask_ratio=config.final_mask_ratio,
        fixed_positions=fixed,
        position_grid=config.position_grid,
    )
