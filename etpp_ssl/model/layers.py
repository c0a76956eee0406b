"""Layers of a network in order of depth: what `optim.layer_decay` and `model.train=last_N` count by.

What embeds the image is layer 0, every block is a layer of its own, and what follows the last block (final
norm, head) is the top layer. A module between two stages (downsampling, merging, the patch embedding of a
later stage, and what is added there) belongs to the layer of the block that follows it.
"""

from __future__ import annotations

import math
import re

from torch import nn

from etpp_ssl.config import UserError, listed

Place = tuple[float, ...]
STEM: Place = (-math.inf,)
TOP: Place = (math.inf,)

Rules = tuple[tuple[str, str | Place], ...]
"""Pattern of a whole parameter name -> its place in order of depth. A text is the place of a block,
"stage.block" or "block", filled in from the pattern's groups. The first pattern that fits counts."""

_CONVNEXT: Rules = (
    (r"stem\..+", STEM),
    (r"stages\.(\d+)\.blocks\.(\d+)\..+", r"\1.\2"),
    (r"stages\.(\d+)\.downsample\..+", r"\1.0"),
    (r"(norm_pre|head)\..+", TOP),
)

FAMILIES: dict[str, Rules] = {
    "VisionTransformer": (
        (r"cls_token|reg_token|dist_token|pos_embed|(patch_embed|norm_pre)\..+", STEM),
        (r"blocks\.(\d+)\..+", r"\1"),
        (r"(norm|fc_norm|attn_pool|head|head_dist)\..+", TOP),
    ),
    "Eva": (
        (r"cls_token|reg_token|pos_embed|(patch_embed|norm_pre)\..+", STEM),
        (r"blocks\.(\d+)\..+", r"\1"),
        (r"(norm|fc_norm|attn_pool|head)\..+", TOP),
    ),
    "ConvNeXt": _CONVNEXT,
    "MetaFormer": _CONVNEXT,
    "SwinTransformer": (
        (r"patch_embed\..+", STEM),
        (r"layers\.(\d+)\.blocks\.(\d+)\..+", r"\1.\2"),
        (r"layers\.(\d+)\.downsample\..+", r"\1.0"),
        (r"(norm|head)\..+", TOP),
    ),
    "ResNet": (
        (r"(conv1|bn1|maxpool)\..+", STEM),
        (r"layer(\d+)\.(\d+)\..+", r"\1.\2"),
        (r"fc\..+", TOP),
    ),
    "PyramidVisionTransformer": (
        (r"patch_embed1\..+|pos_embed1", STEM),
        (r"block(\d+)\.(\d+)\..+", r"\1.\2"),
        (r"patch_embed(\d+)\..+", r"\1.0"),
        (r"pos_embed(\d+)", r"\1.0"),
        (r"cls_token", "4.0"),
        (r"(norm|head)\..+", TOP),
    ),
    "CSWinTransformer": (
        (r"stage1_conv_embed\..+", STEM),
        (r"stage(\d+)\.(\d+)\..+", r"\1.\2"),
        (r"merge1\..+", "2.0"),
        (r"merge2\..+", "3.0"),
        (r"merge3\..+", "4.0"),
        (r"(norm|head)\..+", TOP),
    ),
}
"""By class of the model, subclasses included; the names are timm's, or the authors' where timm has none."""


def layer_ids(
    net: nn.Module, asked: str = "optim.layer_decay", instead: str = "layer_decay=null trains any model"
) -> tuple[dict[str, int], int]:
    """The layer of every parameter by name, frozen ones included, and the number of the top layer.

    Args:
        net: a timm model.
        asked, instead: for the message, what needs the layers and what does not.

    Raises:
        UserError: if no class of the model is in `FAMILIES`, or parameters fit none of its rules (naming
            up to five).
    """
    family = next((cls.__name__ for cls in type(net).__mro__ if cls.__name__ in FAMILIES), None)
    if family is None:
        raise UserError(
            f"{asked} needs a model whose layers are known: {type(net).__name__} is none of "
            f"{', '.join(FAMILIES)}; {instead}"
        )
    places = {name: _place(name, FAMILIES[family]) for name, _ in net.named_parameters()}
    strange = [name for name, place in places.items() if place is None]
    if strange:
        raise UserError(f"{asked} knows no layer of {type(net).__name__} for {listed(strange)}; {instead}")
    depths = sorted({STEM, TOP, *(place for place in places.values() if place is not None)})
    ids = {depth: layer for layer, depth in enumerate(depths)}
    return {name: ids[place] for name, place in places.items() if place is not None}, len(depths) - 1


def _place(name: str, rules: Rules) -> Place | None:
    for pattern, place in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return place if isinstance(place, tuple) else _numbers(match.expand(place))
    return None


def _numbers(place: str) -> Place:
    return tuple(int(part) for part in place.split("."))
