"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn

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
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
