"""Weights of others in timm's names, whatever the architecture: ours, MAE's, Hugging Face's, timm's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from etpp_ssl.config import listed
from etpp_ssl.weights.huggingface import EMBEDDING, from_huggingface
from etpp_ssl.weights.layouts import Weights
from etpp_ssl.weights.reading import FINE_TUNED, without_prefix

_RECOMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Buffers that follow from the architecture; old files have them."""
_MAE_DECODER = ("mask_token", "decoder_")
_HUGGING_FACE_HEAD = "classifier."


def in_timm_names(state_dict: Mapping[str, Tensor], source: str = "the state dict") -> Weights:
    """Weights of a network of timm's under its names, without what belongs to pre-training.

    Known are our pre-training (`encoder.*`) and fine-tuning checkpoints, MAE's with and without decoder,
    Hugging Face's ViTMAE and ViT, and timm's own layout of any architecture, which every other state dict
    is taken for. The head stays.

    Args:
        state_dict: tensors by name.
        source: names them in messages.

    Returns:
        `tensors` under timm's names, unlike `interop.recognise`; `notes` tell what was dropped.

    Raises:
        UserError: for a Hugging Face checkpoint with tensors missing.
    """
    names = set(state_dict)
    if "encoder.patch_embed.proj.weight" in names:
        encoder = {k.removeprefix("encoder."): v for k, v in state_dict.items() if k.startswith("encoder.")}
        return _without(
            encoder, names - {f"encoder.{k}" for k in encoder}, "a masked autoencoder of etpp_ssl"
        )
    if {EMBEDDING, f"vit.{EMBEDDING}"} & names:
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
    note = f"what pre-training has beside the encoder is dropped ({listed(sorted(dropped))})"
    kept = {name: value for name, value in tensors.items() if name not in dropped}
    return Weights(kept, layout, (note,) if dropped else ())
