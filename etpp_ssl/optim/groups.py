"""Parameter groups of optimizers: weight decay, layer-wise learning-rate decay, what Muon leaves to AdamW.

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
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from typing import Any

from torch import nn

from etpp_ssl.model.layers import layer_ids

_EXEMPT = re.compile(r"bias|scale|gamma|logit_scale|relative_position_bias_table|(absolute_)?pos_embed\d*")
"""Last parts of the names of parameters that are not decayed whatever their shape."""
TOKENS = ("cls_token", "reg_token", "dist_token", "mask_token")


def parameter_groups(
    net: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    decay_tokens: bool = False,
    matrices: Collection[str] | None = None,
    fallback_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups over the trainable parameters, one per layer and treatment, in order of depth.

    Each has the keys `params` (in the model's order), `lr_scale`, `weight_decay` and `layer`, and with
    `matrices` timm's `use_fallback`.

    Not decayed are one-dimensional parameters; biases, scales, relative position biases and position
    embeddings of any shape; tokens, unless `decay_tokens`; and what the model's own `no_weight_decay()`
    names, patterns included, as timm reads it. (The authors' PVT decays its position embeddings.)

    Args:
        net: a masked autoencoder, a timm model, or a part of one.
        weight_decay: of the parameters that are decayed; 0 for the others.
        layer_decay: in (0, 1], for a timm model; None makes no layers: `lr_scale` is 1 and `layer` None.
        decay_tokens: decay the learned tokens, too.
        matrices: names of what Muon orthogonalises, as from `hidden_matrices`; all else is its fallback's.
            None for other optimizers.
        fallback_lr_scale: factor on the learning rate of that fallback.

    Raises:
        UserError: if `layer_decay` is given and the model's layers are not known, or a parameter is in
            none of them.
    """
    layers, num_layers = layer_ids(net) if layer_decay is not None else ({}, 0)
    own_exempt: Iterable[str] = getattr(net, "no_weight_decay", tuple)()
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers.get(name)
        leaf = name.rsplit(".", 1)[-1]
        exempt = (
            parameter.ndim <= 1
            or _EXEMPT.fullmatch(leaf) is not None
            or (leaf in TOKENS and not decay_tokens)
            or any(fnmatch(name, pattern) for pattern in own_exempt)
        )
        fallback = matrices is not None and name not in matrices
        key = (layer or 0, exempt, fallback)
        if key not in groups:
            groups[key] = {
                "params": [],
                "lr_scale": 1.0 if layer_decay is None else layer_decay ** (num_layers - layers[name]),
                "weight_decay": 0.0 if exempt else weight_decay,
                "layer": layer,
            }
            if matrices is not None:
                groups[key]["use_fallback"] = fallback
                groups[key]["lr_scale"] *= fallback_lr_scale if fallback else 1.0
        groups[key]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def hidden_matrices(net: nn.Module) -> set[str]:
    """Names of the trained weight matrices of a network's blocks: what Muon orthogonalises.

    Not among them is what embeds the image, and what follows the last block: patch projection, tokens,
    positions, the entry to a decoder, heads. Neither are norms, biases, tables of relative positions and
    depthwise convolutions, which are not matrices. A convolution's kernel counts
    as (out, in * height * width).

    Args:
        net: a masked autoencoder, or a timm model whose layers are known.

    Raises:
        UserError: if they are not.
    """
    blocks: list[nn.Module] | None = getattr(net, "transformer_blocks", None)
    if blocks is not None:
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        hidden = {name for name, parameter in net.named_parameters() if id(parameter) in inside}
    else:
        layers, top = layer_ids(net, "Muon", "optim.name=adamw trains any model")
        hidden = {name for name, layer in layers.items() if 0 < layer < top}
    return {
        name
        for name, parameter in net.named_parameters()
        if name in hidden
        and parameter.requires_grad
        and parameter.ndim >= 2
        and min(parameter.shape[:2]) > 1
        and _EXEMPT.fullmatch(name.rsplit(".", 1)[-1]) is None
    }
