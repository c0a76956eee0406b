"""Names of Hugging Face's ViTMAE and ViT checkpoints, both ways.

They are those on the hub (`facebook/vit-mae-base`), which every version of transformers reads.

Legend: N patches, P prefix tokens, E decoder width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from etpp_ssl.config import UserError

EMBEDDING = "embeddings.patch_embeddings.projection.weight"
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
    "patch_embed.proj.weight": EMBEDDING,
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_THIRDS = ("query", "key", "value")


def to_huggingface(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in MAE's names (see `interop.official_names`) in those of Hugging Face.

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
