"""Parameter groups of optimizers: weight decay and, in classifiers, layer-wise learning-rate decay.

Layer decay is MAE's: a parameter of layer i of num_layers has the learning rate scale
decay^(num_layers - i). What embeds the image is layer 0, every block is a layer of its own in order of
depth, and what follows the last block (final norm, head) is layer num_layers, of scale 1. So a ViT has
num_layers = depth + 1, and its final `norm` scale 1 whatever the pooling.

A module between two stages (downsampling, merging, the patch embedding of a later stage, and what is
added there) belongs to the layer of the block that follows it.

Others differ, so a published `layer_decay` has to be read with its code:

- timm (`param_groups_layer_decay`) puts a final `norm` (a ViT's under token pooling, Swin's) into the
  last block's layer, so that it has scale decay instead of 1; all else is as here. For models that name
  no layers, CAFormer among them, it makes a layer of every twelve parameter tensors in a row.
- ConvNeXt and EfficientTrain++'s CSWin put several blocks in a row into one layer, 12 of three blocks in
  ConvNeXt-S/B and 20 of two in CSWin-B, so that their decay acts more slowly with depth: 0.8 there is
  about 0.93 per block in the long third stage of ConvNeXt-S. Merging belongs to what follows, as here.
- BEiT, from which MAE has its rule, also leaves shared relative position biases at scale 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

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

_EXEMPT = re.compile(
    r"bias|scale|gamma|logit_scale|relative_position_bias_table"
    r"|(absolute_)?pos_embed\d*|cls_token|reg_token|dist_token"
)
"""Last parts of the names of parameters that are not decayed whatever their shape."""


def parameter_groups(
    net: nn.Module, *, weight_decay: float, layer_decay: float | None
) -> list[dict[str, Any]]:
    """Optimizer groups over the trainable parameters, one per layer and weight decay, in order of depth.

    Each has the keys `params` (in the model's order), `lr_scale`, `weight_decay` and `layer`.

    Not decayed are one-dimensional parameters; biases, scales, relative position biases, position
    embeddings and tokens of any shape; and what the model's own `no_weight_decay()` names, patterns
    included, as timm reads it. (The authors' PVT decays its position embeddings.)

    Args:
        net: a timm model.
        weight_decay: of the parameters that are decayed; 0 for the others.
        layer_decay: in (0, 1]; None makes no layers: `lr_scale` is 1 and `layer` None for any model.

    Raises:
        UserError: if `layer_decay` is given and the model's layers are not known, or a parameter is in
            none of them.
    """
    layers, num_layers = layer_ids(net) if layer_decay is not None else ({}, 0)
    own_exempt: Iterable[str] = getattr(net, "no_weight_decay", tuple)()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers.get(name)
        leaf = name.rsplit(".", 1)[-1]
        exempt = (
            parameter.ndim <= 1
            or _EXEMPT.fullmatch(leaf) is not None
            or any(fnmatch(name, pattern) for pattern in own_exempt)
        )
        group = groups.setdefault(
            (layer or 0, exempt),
            {
                "params": [],
                "lr_scale": 1.0 if layer_decay is None else layer_decay ** (num_layers - layers[name]),
                "weight_decay": 0.0 if exempt else weight_decay,
                "layer": layer,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_ids(net: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of every parameter by name, frozen ones included, and the number of the top layer.

    Raises:
        UserError: if no class of the model is in `FAMILIES`, or parameters fit none of its rules (naming
            up to five).
    """
    family = next((cls.__name__ for cls in type(net).__mro__ if cls.__name__ in FAMILIES), None)
    if family is None:
        raise UserError(
            f"optim.layer_decay needs a model whose layers are known: {type(net).__name__} is none of "
            f"{', '.join(FAMILIES)}; layer_decay=null trains any model"
        )
    places = {name: _place(name, FAMILIES[family]) for name, _ in net.named_parameters()}
    strange = [name for name, place in places.items() if place is None]
    if strange:
        raise UserError(
            f"optim.layer_decay knows no layer of {type(net).__name__} for {listed(strange)}; "
            f"layer_decay=null trains any model"
        )
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


TOKENS = ("cls_token", "reg_token", "mask_token")


def weight_decay_groups(model: nn.Module, *, weight_decay: float, decay_tokens: bool) -> list[dict[str, Any]]:
    """Two optimizer groups over the trainable parameters: decayed and exempt.

    Exempt are one-dimensional parameters (biases, norms), position embeddings and, unless
    `decay_tokens`, the learned tokens. The order of parameters is the model's own.
    """
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rsplit(".", 1)[-1]
        is_token = leaf in TOKENS
        if parameter.ndim == 1 or leaf == "pos_embed" or (is_token and not decay_tokens):
            exempt.append(parameter)
        else:
            decayed.append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": exempt, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
