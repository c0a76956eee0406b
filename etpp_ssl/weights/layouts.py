"""Names of weights: the layouts of MAE, timm, DeiT and Hugging Face, turned into ours or timm's.

A layout is recognised by its tensors' names, never by the file's name. Hugging Face's names are those of
ViTMAE and ViT on the hub (`facebook/vit-mae-base`), which every version of transformers reads.

Legend: N patches, P prefix tokens, D encoder width, E decoder width, C channels, p, q patch size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from etpp_ssl.config import UserError, listed
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.pos_embed import sincos_pos_embed, sincos_table
from etpp_ssl.weights.reading import FINE_TUNED, read_state_dict, without_prefix

_HEADS = ("head", "pooler", "classifier")
_DECODER_NAMES = {
    "decoder_embed": "decoder.embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.head",
    "mask_token": "decoder.mask_token",
}
_MAE_DECODER = ("mask_token", "decoder_")
_RECOMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Buffers that follow from the architecture; old files have them."""

_EMBEDDING = "embeddings.patch_embeddings.projection.weight"
"""A tensor that shows the layout; ViTMAE's has `vit.` in front."""

_LAYER_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": _EMBEDDING,
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_THIRDS = ("query", "key", "value")
_HUGGING_FACE_HEAD = "classifier."


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what is known beside them."""

    tensors: dict[str, Tensor]
    """From `recognise`: `encoder.*` as in timm's VisionTransformer and `decoder.*` as in `MAEDecoder`; from
    `in_timm_names`: timm's own names."""
    layout: str = ""
    """What they are, in words."""
    notes: tuple[str, ...] = ()
    """What was dropped or computed anew, one sentence each."""
    image_size: tuple[int, int] | None = None
    """(H, W) in pixels that the positions belong to; like the next three, None where nothing says it."""
    num_heads: int | None = None
    """Of the encoder."""
    position_grid: tuple[int, int] | None = None
    """Patches per axis in whose units the positions are a sin-cos table."""
    decoder_position_grid: tuple[int, int] | None = None
    """The same for the decoder's fixed positions."""

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder."""
        return any(name.startswith("decoder.") for name in self.tensors)

    def grid_of(self, projection: Tensor) -> tuple[int, int] | None:
        """Patches per axis of the known image size, for a projection (D, C, p, q)."""
        if self.image_size is None:
            return None
        return self.image_size[0] // projection.shape[2], self.image_size[1] // projection.shape[3]


def recognise(state_dict: Mapping[str, Tensor], source: str = "the state dict") -> Weights:
    """Weights of a known layout under our names.

    Known are MAE's (encoder alone, with decoder, fine-tuned or linear classifier), timm's plain
    VisionTransformers, DeiT's, which have the same names, Hugging Face's ViTMAE and ViT, and ours. Classifier
    heads and poolers are dropped. So is MAE's `decoder_pos_embed`, which our decoder computes; the grid in
    whose units it counts is kept.

    Args:
        state_dict: tensors by name.
        source: names them in messages.

    Raises:
        UserError: for another layout, and for a distilled DeiT, whose second token has no place here.
    """
    state_dict = without_prefix(state_dict, FINE_TUNED)
    if {_EMBEDDING, f"vit.{_EMBEDDING}"} & state_dict.keys():
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
        notes.append(f"what follows the encoder is dropped ({listed(heads)})")
    table = None
    if "decoder_pos_embed" in names:
        registers = state_dict["reg_token"].shape[1] if "reg_token" in names else 0
        table = sincos_table(state_dict["decoder_pos_embed"], int("cls_token" in names) + registers)
        if table is None:
            notes.append("its decoder's positions are not a sin-cos table; they are replaced by one")
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
    """`recognise` of a file; see `read_state_dict` for what is read and what is refused."""
    return recognise(read_state_dict(path), repr(str(path)))


def in_timm_names(state_dict: Mapping[str, Tensor], source: str = "the state dict") -> Weights:
    """Weights under timm's names, of any architecture, without what only pre-training needs.

    Known are our pre-training (`encoder.*`) and fine-tuning checkpoints, MAE's with and without decoder, and
    Hugging Face's ViTMAE and ViT. Every other state dict is taken for timm's own layout. The head stays.

    Args:
        state_dict: tensors by name.
        source: names them in messages.

    Raises:
        UserError: for a Hugging Face checkpoint with tensors missing.
    """
    names = set(state_dict)
    if "encoder.patch_embed.proj.weight" in names:
        encoder = {k.removeprefix("encoder."): v for k, v in state_dict.items() if k.startswith("encoder.")}
        return _without(
            encoder, names - {f"encoder.{k}" for k in encoder}, "a masked autoencoder of etpp_ssl"
        )
    if {_EMBEDDING, f"vit.{_EMBEDDING}"} & names:
        tensors, layout = from_huggingface(state_dict, source), "a Hugging Face ViT"
        head = {k: v for k, v in tensors.items() if k.startswith(_HUGGING_FACE_HEAD)}
        tensors = {k: v for k, v in tensors.items() if k not in head}
        tensors |= {f"head.{k.removeprefix(_HUGGING_FACE_HEAD)}": v for k, v in head.items()}
        dropped = {k for k in tensors if k.startswith((*_MAE_DECODER, "pooler."))}
    else:
        tensors, layout = without_prefix(state_dict, FINE_TUNED), "a state dict in timm's names"
        tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in _RECOMPUTED}
        has_decoder = "decoder_embed.weight" in tensors
        layout = "an MAE with decoder" if has_decoder else layout
        dropped = {k for k in tensors if has_decoder and k.startswith(_MAE_DECODER)}
    return _without(tensors, dropped, layout)


def _without(tensors: dict[str, Tensor], dropped: set[str], layout: str) -> Weights:
    note = f"what pre-training adds to the encoder is dropped ({listed(sorted(dropped))})"
    kept = {name: value for name, value in tensors.items() if name not in dropped}
    return Weights(kept, layout, (note,) if dropped else ())


def official_names(model: MaskedAutoencoder, *, decoder: bool = True) -> dict[str, Tensor]:
    """A model's state dict in MAE's layout, with its decoder's fixed positions.

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


def to_huggingface(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in MAE's names (see `official_names`) in those of Hugging Face.

    With a decoder they are those of `ViTMAEForPreTraining`, without one those of `ViTModel`.
    """
    vit = "vit." if "decoder_embed.weight" in official else ""
    renamed: dict[str, Tensor] = {}
    for name, value in official.items():
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            new = f"{vit}{_NAMES[name]}" if name in _NAMES else f"decoder.{name}"
            renamed[new] = value
            continue
        decoder, number, layer, part = block.groups()
        prefix = f"decoder.decoder_layers.{number}" if decoder else f"{vit}encoder.layer.{number}"
        if layer == "attn.qkv":
            # timm keeps the three in one tensor.
            for third, values in zip(_THIRDS, value.chunk(3), strict=True):
                renamed[f"{prefix}.attention.attention.{third}.{part}"] = values
        else:
            renamed[f"{prefix}.{_LAYER_NAMES[layer]}.{part}"] = value
    return renamed


def from_huggingface(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The inverse of `to_huggingface`; a pooler or classifier keeps its name.

    Raises:
        UserError: if a block has a query, key or value without the other two.
    """
    names = {theirs: ours for ours, theirs in _NAMES.items()}
    layers = {theirs: ours for ours, theirs in _LAYER_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in state_dict.items():
        short = name.removeprefix("vit.")
        # transformers 5.23 saves the decoder's blocks as decoder_encoder.layer.
        block = re.fullmatch(
            r"(encoder\.layer|decoder\.decoder_(?:layers|encoder\.layer))\.(\d+)\.(.+)\.(weight|bias)", short
        )
        if block is None:
            renamed[names.get(short, short.removeprefix("decoder."))] = value
            continue
        kind, number, layer, part = block.groups()
        prefix = f"decoder_blocks.{number}" if kind.startswith("decoder") else f"blocks.{number}"
        attention, _, third = layer.rpartition(".")
        if attention == "attention.attention" and third in _THIRDS:
            thirds.setdefault(f"{prefix}.attn.qkv.{part}", {})[third] = value
        else:
            renamed[f"{prefix}.{layers.get(layer, layer)}.{part}"] = value
    for name, parts in thirds.items():
        missing = [third for third in _THIRDS if third not in parts]
        if missing:
            raise UserError(f"{source} has no {' and no '.join(missing)} of {name}")
        renamed[name] = torch.cat([parts[third] for third in _THIRDS])
    return renamed
