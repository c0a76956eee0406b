"""State dicts of others as weights of ours or timm's: which layout one has, and where in it the model is.

A layout is recognised by its tensors' names, never by the file's name; `etpp_ssl.weights.names` has these.

Legend: P prefix tokens, D encoder width, C channels, p, q patch size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from etpp_ssl.config import UserError, listed
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.weights.names import PROJECTION, TOWERS, layouts_in, timms_names
from etpp_ssl.weights.reading import read_state_dict
from etpp_ssl.weights.tensors import UNSET_POSITIONS

_HEADS = ("head", "pooler", "classifier", "attn_pool", "fc")
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

_DROPPED = "what pre-training adds to the encoder is dropped"
_SECOND = re.compile(r"momentum|encoder_k|target|student|ema\b")
"""In the name of the encoder that a method of two encoders does not evaluate."""


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what is known beside them."""

    tensors: dict[str, Tensor]
    """From `recognise`: `encoder.*` as in timm's VisionTransformer or Eva and `decoder.*` as in `MAEDecoder`;
    from `in_timm_names`: timm's own names."""
    layout: str = ""
    """What they are, in words."""
    notes: tuple[str, ...] = ()
    """What was dropped or computed anew, one sentence each."""
    image_size: tuple[int, int] | None = None
    """(H, W) in pixels that the positions belong to; like what follows, None where nothing says it."""
    num_heads: int | None = None
    """Of the encoder."""
    network: Mapping[str, Any] = field(default_factory=dict)
    """What a run or timm's config says of it: `name` and dimensions, keys of a recipe's `model`; empty where
    nothing does."""
    activation: str | None = None
    """transformers' name of the one in the encoder's MLPs."""
    licence: str | None = None
    """What a run recorded of the licence of the weights that it started from."""
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

    Known are MAE's and Pixio's (encoder alone, with decoder, fine-tuned or linear classifier), timm's
    VisionTransformers and Evas, DeiT's, DINO's, iBOT's, DINOv2's and DINOv3's, which have nearly the same
    names, those of `etpp_ssl.weights.names.LAYOUTS`, and ours; each also below a prefix such as "backbone."
    or "module.base_encoder.". Classifier heads and poolers are dropped. So is MAE's `decoder_pos_embed`,
    which our decoder computes; the grid in whose units it counts is kept.

    Args:
        state_dict: tensors by name.
        source: names them in messages.

    Raises:
        UserError: for another layout, two in one file, several encoders, a head alone, and a distilled DeiT,
            whose second token has no place here.
    """
    notes: list[str] = []
    state_dict, whose = _in_timms_names(state_dict, source, notes)
    prefix = prefix_of(state_dict, {PROJECTION}, source, notes) or ""
    around = re.sub(r"\bencoder\.$", "", prefix)
    if f"{around}decoder.mask_token" in state_dict and around != prefix:
        return Weights(below(state_dict, around), "a masked autoencoder of etpp_ssl", tuple(notes))
    state_dict = timms_names(_below(state_dict, prefix, notes), notes)
    names = set(state_dict)
    if names and all(set(name.split(".")) & set(_HEADS) for name in names):
        raise UserError(f"{source} holds a head ({listed(sorted(names))}) and no encoder to start from")
    if PROJECTION not in names or not any(name.startswith("blocks.0.attn.") for name in names):
        raise UserError(
            f"{source} is of another architecture: a plain Vision Transformer has {PROJECTION} "
            f"and blocks.0.attn.*, this has {listed(sorted(names))}"
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
        table = sincos_table(state_dict["decoder_pos_embed"], num_prefix_tokens(state_dict))
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
    layout += f" in the names of {whose}" if whose else ""
    return Weights(
        tensors,
        layout,
        tuple(notes),
        # SigLIP's, which no file of it says.
        activation="gelu_pytorch_tanh" if whose == TOWERS and "cls_token" not in names else None,
        decoder_position_grid=table.position_grid if table else None,
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
    tensors, whose = _in_timms_names(state_dict, source, notes)
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in _RECOMPUTED}
    is_ours = f"encoder.{PROJECTION}" in tensors and "decoder.mask_token" in tensors
    tensors = _below(tensors, prefix_of(tensors, wanted, source, notes) or "", notes)
    has_decoder = "decoder_embed.weight" in tensors
    dropped = {k for k in tensors if k.startswith("pooler.") or (has_decoder and k.startswith(_MAE_DECODER))}
    if dropped:
        notes.append(f"{_DROPPED} ({_in_short(dropped)})")
    kept = {name: value for name, value in tensors.items() if name not in dropped}
    layout = f"an encoder in the names of {whose}" if whose else "a state dict in timm's names"
    if is_ours or has_decoder:
        layout = "a masked autoencoder of etpp_ssl" if is_ours else "an MAE with decoder"
    return Weights(timms_names(kept, notes), layout, tuple(notes))


def num_prefix_tokens(tensors: Mapping[str, Tensor], prefix: str = "") -> int:
    """P: how many class and register tokens there are, in timm's names behind a prefix."""
    tokens = (tensors.get(f"{prefix}{name}") for name in ("cls_token", "reg_token"))
    return sum(token.shape[1] for token in tokens if token is not None)


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


def _in_timms_names(
    state_dict: Mapping[str, Tensor], source: str, notes: list[str]
) -> tuple[dict[str, Tensor], str]:
    """The state dict under the names that timm and MAE share, if it has others; whose, or "".

    Raises:
        UserError: for tensors of two layouts.
    """
    found = layouts_in(state_dict)
    if len(found) > 1:
        titles = [
            f"{layout.title if layout else 'timm'} ({prefix}{layout.marker if layout else PROJECTION})"
            for layout, prefix in found.items()
        ]
        raise UserError(
            f"{source} holds encoders in the names of several layouts, those of {' and '.join(titles)}; save "
            f"one of them alone"
        )
    layout = next(iter(found), None)
    prefix = None if layout is None else prefix_of(state_dict, {layout.marker}, source, notes)
    if layout is None or prefix is None:
        return dict(state_dict), ""
    theirs = _below(state_dict, prefix.removesuffix(layout.beside), notes)
    return layout.rename(theirs, source), layout.title


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
