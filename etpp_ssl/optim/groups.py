"""Parameter groups of optimizers: weight decay and, in classifiers, layer-wise learning-rate decay.

Layer decay is MAE's: a parameter of layer i of num_layers has the learning rate scale
decay^(num_layers - i), with the layers of `etpp_ssl.model.layers`: what embeds the image is layer 0, every
block is one, and what follows the last block (final norm, head) is layer num_layers, of scale 1. So a ViT has
num_layers = depth + 1, and its final `norm` scale 1 whatever the pooling. Frozen parameters are in no group,
and change no other's scale.

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

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from torch import nn

from etpp_ssl.model.layers import layer_ids

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
