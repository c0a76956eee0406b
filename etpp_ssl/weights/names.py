"""Names of tensors in the layouts of others, as rules that turn them into timm's.

transformers' names are those of files, on the hub and as every version of it saves them, and those that a
model in memory has since its version 5 (but for DINOv2's SwiGLU, which it splits there).

Legend: N patches, P prefix tokens, D encoder width, E decoder width, C channels, p, q patch size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from etpp_ssl.config import UserError

PROJECTION = "patch_embed.proj.weight"
EMBEDDING = "embeddings.patch_embeddings.projection.weight"
"""A tensor that shows the layout; ViTMAE's has `vit.` in front."""

LAYER_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    PROJECTION: EMBEDDING,
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
"""transformers' names of a ViT's tensors outside of its blocks, by timm's; the layers in them are above."""
THIRDS = ("query", "key", "value")

Tensors = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]
"""Patterns and what takes their place, applied one after the other."""

_PROJECTIONS: Rules = (
    (r"\.(?:attention|self_attn)\.q_proj\.", ".attn.query."),
    (r"\.(?:attention|self_attn)\.k_proj\.", ".attn.key."),
    (r"\.(?:attention|self_attn)\.v_proj\.", ".attn.value."),
    (r"\.(?:attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
)
_VIT: Rules = (
    (r"^vit\.", ""),
    # transformers 5.23 saves the decoder's blocks as decoder_encoder.layer.
    (r"^decoder\.decoder_(?:layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"^embeddings\.(register_tokens|mask_token)$", r"\1"),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    *_PROJECTIONS,
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    *((rf"^{re.escape(theirs)}$", ours) for ours, theirs in NAMES.items()),
    *((rf"\.{re.escape(theirs)}\.", f".{ours}.") for ours, theirs in LAYER_NAMES.items()),
    (r"^classifier\.", "head."),
)
_DINOV3: Rules = (
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(?:model\.)?layer\.", "blocks."),
    *_PROJECTIONS,
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
)
_GATED: Rules = (
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
_UNGATED: Rules = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
_TOWER: Rules = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    *_PROJECTIONS,
)
_OPEN_CLIP: Rules = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.proj"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_MMPRETRAIN: Rules = (
    (r"^patch_embed\.projection\b", "patch_embed.proj"),
    (r"^layers\b", "blocks"),
    (r"^ln1\b", "norm"),
    (r"^ln2\b", "fc_norm"),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
_META_DINOV3: Rules = (
    (r"^storage_tokens$", "reg_token"),
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_META_DINOV2: Rules = ((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))
_ONLY_TRAINED_WITH = re.compile(
    r"mask_token|masked_embed|local_cls_norm\..+|rope_embed\.periods|.+\.bias_mask"
)
"""Of DINOv2, iBOT and DINOv3; the periods follow from the architecture, and a masked bias is zero."""


@dataclass(frozen=True)
class Layout:
    """Whose names tensors have, and how they become timm's."""

    title: str
    """Whose, as in "in the names of ..."."""
    marker: str
    """A tensor that shows it."""
    rename: Callable[[Mapping[str, Tensor], str], Tensors]
    """From the state dict below the prefix of the marker, and the name of its source."""
    beside: str = ""
    """End of that prefix that does not stand in front of everything that belongs to it."""


def renamed(tensors: Mapping[str, Tensor], rules: Rules) -> Tensors:
    """The tensors under the names that the rules make."""
    found = dict(tensors)
    for pattern, name in rules:
        found = {re.sub(pattern, name, key): value for key, value in found.items()}
    return found


def from_huggingface(state_dict: Mapping[str, Tensor], source: str) -> Tensors:
    """The inverse of `etpp_ssl.export.official.to_huggingface`; a pooler keeps its name.

    Also DINOv2's and Pixio's names, which are alike.

    Raises:
        UserError: if a block has a query, key or value without the other two.
    """
    return _joined(renamed(state_dict, _VIT), source)


def _from_dinov3(state_dict: Mapping[str, Tensor], source: str) -> Tensors:
    """transformers' `DINOv3ViTModel`, whose keys have no bias."""
    gated = any(".mlp.gate_proj." in name for name in state_dict)
    found = renamed(state_dict, (*_DINOV3, *(_GATED if gated else _UNGATED)))
    biases = {"query": "q_bias", "value": "v_bias"}
    found = {re.sub(r"(query|value)\.bias$", lambda match: biases[match[1]], k): v for k, v in found.items()}
    return _joined(found, source)


def _from_tower(state_dict: Mapping[str, Tensor], source: str) -> Tensors:
    """transformers' `CLIPVisionModel`, `SiglipVisionModel` and `Siglip2VisionModel`."""
    found = _joined(renamed(state_dict, _TOWER), source)
    return _with_axes(found)


def _from_open_clip(state_dict: Mapping[str, Tensor], source: str) -> Tensors:
    """The vision tower of OpenCLIP's files, which are named as OpenAI's."""
    return _with_axes(renamed(state_dict, _OPEN_CLIP))


def _with_axes(tensors: Tensors) -> Tensors:
    """A tower's tokens and positions with the axes that timm's have, and its projection as a convolution."""
    if "cls_token" in tensors:
        tensors["cls_token"] = tensors["cls_token"].view(1, 1, -1)
    if tensors.get("pos_embed", torch.empty(0)).ndim == 2:
        tensors["pos_embed"] = tensors["pos_embed"][None]
    projection = tensors[PROJECTION]
    if projection.ndim == 2:
        # SigLIP 2 in native resolution takes patches of p x p pixels, the channels of a pixel together.
        side = round((projection.shape[1] / 3) ** 0.5)
        tensors[PROJECTION] = projection.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
    return tensors


def _from_mmpretrain(state_dict: Mapping[str, Tensor], source: str) -> Tensors:
    """mmpretrain's `VisionTransformer`, below `backbone.` with the head and MAE's norm beside it."""
    whole = any(name.startswith("backbone.") for name in state_dict)
    prefix = "backbone." if whole else ""
    found = {name.removeprefix(prefix): v for name, v in state_dict.items() if name.startswith(prefix)}
    if whole:
        norm = {key: v for key, v in state_dict.items() if key.startswith("neck.")}
        head = {key: v for key, v in state_dict.items() if key.startswith("head.")}
        found |= renamed(norm, ((r"^neck\.", ""), (r"^ln1\b", "decoder_norm")))
        found |= renamed(head, ((r"^head\.(layers\.head|fc)\b", "head"),))
    return renamed(found, _MMPRETRAIN)


def _joined(tensors: Tensors, source: str) -> Tensors:
    """Queries, keys and values of a block as the one tensor that timm keeps them in.

    Raises:
        UserError: if a block has one without the other two.
    """
    found: Tensors = {}
    thirds: dict[str, Tensors] = {}
    for name, value in tensors.items():
        third = re.fullmatch(r"(.+\.attn)\.(query|key|value)\.(weight|bias)", name)
        if third is None:
            found[name] = value
        else:
            thirds.setdefault(f"{third[1]}.qkv.{third[3]}", {})[third[2]] = value
    for name, parts in thirds.items():
        missing = [third for third in THIRDS if third not in parts]
        if missing:
            raise UserError(f"{source} has no {' and no '.join(missing)} of {name}")
        found[name] = torch.cat([parts[third] for third in THIRDS])
    return found


TOWERS = "transformers' CLIP and SigLIP"
LAYOUTS = (
    Layout("transformers' ViT", EMBEDDING, from_huggingface, beside="vit."),
    Layout("transformers' DINOv3", "embeddings.patch_embeddings.weight", _from_dinov3),
    Layout(TOWERS, "embeddings.patch_embedding.weight", _from_tower),
    Layout("OpenCLIP", "transformer.resblocks.0.ln_1.weight", _from_open_clip),
    Layout("mmpretrain", "layers.0.attn.qkv.weight", _from_mmpretrain, beside="backbone."),
)
"""One line here makes another's names known. timm's own, which MAE, DeiT, DINO and Meta's files share, are
what is left."""


def timms_names(tensors: Mapping[str, Tensor], notes: list[str]) -> Tensors:
    """Names of Meta's DINOv2, DINOv3 and Pixio that are not timm's, as timm's.

    Registers are a token of timm's, and positions have no row for them where the layout has none. Of several
    class tokens timm keeps the first as the class token and the others as registers; the order stays.

    Args:
        tensors: under the names that timm and Meta share.
        notes: gets a line for what only pre-training needs and is dropped.
    """
    found = dict(tensors)
    if "decoder_embed.weight" not in found:
        dropped = sorted(name for name in found if _ONLY_TRAINED_WITH.fullmatch(name))
        if any(name in ("mask_token", "masked_embed") for name in dropped):
            notes.append("the mask token of its pre-training is dropped")
        found = {name: value for name, value in found.items() if name not in dropped}
    if "storage_tokens" in found:
        found = _split_biases(renamed(found, _META_DINOV3))
    elif any(".mlp.w12." in name for name in found):
        found = renamed(found, _META_DINOV2)
    if "register_tokens" in found and {"cls_token", "pos_embed"} <= found.keys():
        positions = found["pos_embed"]
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + positions[:, :1]
        found["pos_embed"] = positions[:, 1:]
    if "reg_token" in found and not found["reg_token"].numel():
        del found["reg_token"]
    if "cls_token" in found and found["cls_token"].ndim == 3 and found["cls_token"].shape[1] > 1:
        found["cls_token"], found["reg_token"] = found["cls_token"].tensor_split([1], dim=1)
    return found


def _split_biases(tensors: Tensors) -> Tensors:
    """The biases of queries and values apart, as timm's Eva has them; that of keys is masked to zero."""
    found: Tensors = {}
    for name, value in tensors.items():
        if name.endswith(".attn.qkv.bias"):
            q, _, v = value.chunk(3)
            attention = name.removesuffix(".qkv.bias")
            found |= {f"{attention}.q_bias": q, f"{attention}.v_bias": v}
        else:
            found[name] = value
    return found


def layouts_in(names: Iterable[str]) -> dict[Layout | None, str]:
    """The layouts that tensors show, each with the prefix of its marker; None is timm's own."""
    found: dict[Layout | None, str] = {}
    markers: list[tuple[Layout | None, str]] = [(layout, layout.marker) for layout in LAYOUTS]
    for name in names:
        for layout, marker in (*markers, (None, PROJECTION)):
            if name == marker or name.endswith(f".{marker}"):
                found.setdefault(layout, name.removesuffix(marker))
    return found
