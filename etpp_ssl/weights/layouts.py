"""Names of weights: the layouts of MAE, timm, DeiT and Hugging Face, turned into ours or timm's.

A layout is recognised by its tensors' names, never by the file's name. Hugging Face's names are those of
ViTMAE and ViT on the hub (`facebook/vit-mae-base`), which every version of transformers reads.

Legend: N patches, P prefix tokens, D encoder width, E decoder width, C channels, p, q patch size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from etpp_ssl.config import UserError, listed
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.weights.reading import read_state_dict
from etpp_ssl.weights.tensors import UNSET_POSITIONS

PROJECTION = "patch_embed.proj.weight"
_HEADS = ("head", "pooler", "classifier")
DECODER_NAMES = {
    "decoder_embed": "decoder.embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "decoder.head",
    "mask_token": "decoder.mask_token",
}
"""First words of the decoder's tensors, MAE's to ours."""
_MAE_DECODER = ("mask_token", "decoder_")
_RECOMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")
"""Buffers that follow from the architecture; old files have them."""

_EMBEDDING = "embeddings.patch_embeddings.projection.weight"
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
    "patch_embed.proj.weight": _EMBEDDING,
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
"""Hugging Face's names of a ViT's tensors outside of its blocks, by timm's; the layers in them are above."""
THIRDS = ("query", "key", "value")
_ONLY_HUGGING_FACE = {"embeddings.register_tokens": "register_tokens", "embeddings.mask_token": "mask_token"}
"""Of DINOv2, and of ViTs for masked image modelling."""

_MMPRETRAIN_PROJECTION = "patch_embed.projection.weight"
_MMPRETRAIN_NAMES = (
    (r"^patch_embed\.projection\b", "patch_embed.proj"),
    (r"^layers\b", "blocks"),
    (r"^ln1\b", "norm"),
    (r"^ln2\b", "fc_norm"),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
_DROPPED = "what pre-training adds to the encoder is dropped"
_SECOND = re.compile(r"momentum|encoder_k|target|student|ema\b")
"""In the name of the encoder that a method of two encoders does not evaluate."""


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
    VisionTransformers, DeiT's and DINOv2's, which have the same names, Hugging Face's ViTMAE, ViT and DINOv2,
    mmpretrain's, and ours; each also below a prefix such as "backbone." or "module.base_encoder.". Classifier
    heads and poolers are dropped. So is MAE's `decoder_pos_embed`, which our decoder computes; the grid in
    whose units it counts is kept.

    Args:
        state_dict: tensors by name.
        source: names them in messages.

    Raises:
        UserError: for another layout, several encoders, and a distilled DeiT, whose second token has no place
            here.
    """
    notes: list[str] = []
    state_dict, _ = _others_names(state_dict, source, notes)
    prefix = prefix_of(state_dict, {PROJECTION}, source, notes) or ""
    around = re.sub(r"\bencoder\.$", "", prefix)
    if f"{around}decoder.mask_token" in state_dict and around != prefix:
        return Weights(below(state_dict, around), "a masked autoencoder of etpp_ssl", tuple(notes))
    state_dict = _timms_tokens(_below(state_dict, prefix, notes), notes)
    names = set(state_dict)
    if PROJECTION not in names or "blocks.0.attn.qkv.weight" not in names:
        raise UserError(
            f"{source} is of another architecture: a plain Vision Transformer has {PROJECTION} "
            f"and blocks.0.attn.qkv.weight, this has {listed(sorted(names))}"
        )
    if "dist_token" in names:
        raise UserError(
            f"{source} is a distilled DeiT: its dist_token has no place in a masked autoencoder; "
            f"take the DeiT without distillation"
        )
    tensors: dict[str, Tensor] = {}
    heads = sorted(name for name in names if name.partition(".")[0] in _HEADS)
    if heads:
        notes.append(f"what follows the encoder is dropped ({_in_short(heads)})")
    table = None
    if "decoder_pos_embed" in names:
        registers = state_dict["reg_token"].shape[1] if "reg_token" in names else 0
        table = sincos_table(state_dict["decoder_pos_embed"], int("cls_token" in names) + registers)
        if not state_dict["decoder_pos_embed"].any():
            notes.append(f"its decoder's positions {UNSET_POSITIONS}")
        elif table is None:
            notes.append("its decoder's positions are not a sin-cos table; they are replaced by one")
    for name, value in state_dict.items():
        if name in heads or name == "decoder_pos_embed":
            continue
        first, dot, rest = name.partition(".")
        tensors[f"{DECODER_NAMES.get(first, f'encoder.{first}')}{dot}{rest}"] = value
    layout = "an MAE with decoder" if "decoder_embed.weight" in names else "an encoder without decoder"
    return Weights(
        tensors, layout, tuple(notes), decoder_position_grid=table.position_grid if table else None
    )


def read_weights(path: str | Path) -> Weights:
    """`recognise` of a file; see `read_state_dict` for what is read and what is refused."""
    notes: list[str] = []
    weights = recognise(read_state_dict(path, notes), repr(str(path)))
    return replace(weights, notes=(*notes, *weights.notes))


def in_timm_names(
    state_dict: Mapping[str, Tensor],
    source: str = "the state dict",
    wanted: Collection[str] = (PROJECTION,),
) -> Weights:
    """Weights under timm's names, of any architecture, without what only pre-training needs.

    Known are our pre-training (`encoder.*`) and fine-tuning checkpoints, MAE's with and without decoder, and
    the other layouts of `recognise`. Every other state dict is taken for timm's own layout, also below a
    prefix. The head stays.

    Args:
        state_dict: tensors by name.
        source: names them in messages.
        wanted: the names in the model, by which a prefix is found.

    Raises:
        UserError: for a Hugging Face checkpoint with tensors missing, and for several models of which nothing
            tells which one to take.
    """
    notes: list[str] = []
    tensors, layout = _others_names(state_dict, source, notes)
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in _RECOMPUTED}
    is_ours = f"encoder.{PROJECTION}" in tensors and "decoder.mask_token" in tensors
    tensors = _below(tensors, prefix_of(tensors, wanted, source, notes) or "", notes)
    has_decoder = "decoder_embed.weight" in tensors
    dropped = {k for k in tensors if k.startswith("pooler.") or (has_decoder and k.startswith(_MAE_DECODER))}
    if dropped:
        notes.append(f"{_DROPPED} ({_in_short(dropped)})")
    kept = {name: value for name, value in tensors.items() if name not in dropped}
    if is_ours:
        layout = "a masked autoencoder of etpp_ssl"
    elif not layout:
        layout = "an MAE with decoder" if has_decoder else "a state dict in timm's names"
    return Weights(_timms_tokens(kept, notes), layout, tuple(notes))


def _below(tensors: Mapping[str, Tensor], prefix: str, notes: list[str]) -> dict[str, Tensor]:
    """What stands below a prefix; a note names the rest."""
    dropped = sorted(name for name in tensors if not name.startswith(prefix))
    if dropped:
        notes.append(f"{_DROPPED} ({_in_short(dropped)})")
    return below(tensors, prefix)


def _in_short(names: Collection[str]) -> str:
    """Names of tensors; of more than two those of the parts that they belong to."""
    parts = {name if len(names) <= 2 or "." not in name else f"{name.partition('.')[0]}.*" for name in names}
    return listed(sorted(parts))


def _others_names(
    state_dict: Mapping[str, Tensor], source: str, notes: list[str]
) -> tuple[dict[str, Tensor], str]:
    """The state dict under MAE's names if it has those of transformers or mmpretrain; whose, or ""."""
    prefix = prefix_of(state_dict, {_EMBEDDING}, source, notes)
    if prefix is not None:
        theirs = _below(state_dict, prefix.removesuffix("vit."), notes)
        ours = from_huggingface(theirs, source)
        return {re.sub(r"^classifier\.", "head.", k): v for k, v in ours.items()}, "a Hugging Face ViT"
    prefix = prefix_of(state_dict, {_MMPRETRAIN_PROJECTION}, source, notes)
    if prefix is None or f"{prefix}layers.0.attn.qkv.weight" not in state_dict:
        return dict(state_dict), ""
    around = prefix.removesuffix("backbone.")
    renamed = below(state_dict, prefix)
    if around != prefix:
        renamed |= {
            re.sub(r"^ln1\b", "decoder_norm", k): v for k, v in below(state_dict, f"{around}neck.").items()
        }
        head = below(state_dict, f"{around}head.")
        renamed |= {re.sub(r"^(layers\.head|fc)\b", "head", k): v for k, v in head.items()}
    for pattern, name in _MMPRETRAIN_NAMES:
        renamed = {re.sub(pattern, name, k): v for k, v in renamed.items()}
    return renamed, "a ViT of mmpretrain"


def _timms_tokens(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """DINOv2's tokens as timm has them: registers, and positions without a row for any prefix token."""
    tensors = dict(tensors)
    if "decoder_embed.weight" not in tensors and tensors.pop("mask_token", None) is not None:
        notes.append("the mask token of its pre-training is dropped")
    if "register_tokens" in tensors and {"cls_token", "pos_embed"} <= tensors.keys():
        positions = tensors["pos_embed"]
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
    return tensors


def from_huggingface(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The inverse of `etpp_ssl.export.official.to_huggingface`; a pooler or classifier keeps its name.

    Raises:
        UserError: if a block has a query, key or value without the other two.
    """
    names = {theirs: ours for ours, theirs in NAMES.items()} | _ONLY_HUGGING_FACE
    layers = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in state_dict.items():
        short = name.removeprefix("vit.")
        # transformers 5.23 saves the decoder's blocks as decoder_encoder.layer.
        block = re.fullmatch(
            r"(encoder\.layer|decoder\.decoder_(?:layers|encoder\.layer))\.(\d+)\.(.+)\.(weight|bias|lambda1)",
            short,
        )
        if block is None:
            renamed[names.get(short, short.removeprefix("decoder."))] = value
            continue
        kind, number, layer, part = block.groups()
        prefix = f"decoder_blocks.{number}" if kind.startswith("decoder") else f"blocks.{number}"
        attention, _, third = layer.rpartition(".")
        if part == "lambda1":
            renamed[f"{prefix}.{layer.replace('layer_scale', 'ls')}.gamma"] = value
        elif attention == "attention.attention" and third in THIRDS:
            thirds.setdefault(f"{prefix}.attn.qkv.{part}", {})[third] = value
        else:
            renamed[f"{prefix}.{layers.get(layer, layer)}.{part}"] = value
    for name, parts in thirds.items():
        missing = [third for third in THIRDS if third not in parts]
        if missing:
            raise UserError(f"{source} has no {' and no '.join(missing)} of {name}")
        renamed[name] = torch.cat([parts[third] for third in THIRDS])
    return renamed


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def prefix_of(names: Collection[str], wanted: Collection[str], source: str, notes: list[str]) -> str | None:
    """What stands in front of a model's names, such as "backbone." or "module.encoder_q."; often nothing.

    Args:
        names: of the tensors that there are.
        wanted: of the model.
        source: names the weights in the message.
        notes: gets a line if there are several such models and one was taken.

    Returns:
        A prefix, empty or with its dot; None if less than half of the model is there.

    Raises:
        UserError: for several such models of which none is known to be the one to take.
    """
    counts: Counter[str] = Counter()
    for name in names:
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if name[start:] in wanted:
                counts[name[:start]] += 1
    most = max(counts.values(), default=0)
    if most == 0 or 2 * most < len(wanted):
        return None
    found = sorted(prefix for prefix, count in counts.items() if count == most)
    if "" in found:
        return ""
    first = [prefix for prefix in found if not _SECOND.search(prefix)] if len(found) > 1 else found
    if len(first) != 1:
        prefixes = listed([repr(prefix) for prefix in found])
        raise UserError(
            f"{source} holds {len(found)} such models, under {prefixes}, and nothing tells which to take; "
            f"save one of them alone"
        )
    if len(found) > 1:
        others = " or ".join(repr(prefix) for prefix in found if prefix not in first)
        notes.append(f"what is named {first[0]}* is taken, not {others}")
    return first[0]
