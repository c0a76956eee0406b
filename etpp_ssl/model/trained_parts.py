"""Which parts of a classifier are trained (`model.train`); the others are frozen.

A frozen part has no gradients, no optimizer state and no weight decay, and stays in evaluation mode: its
batch norms use the statistics that they came with, and its drop-path drops nothing. No backward pass goes
through what lies in front of the first trained part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.model.layers import layer_ids

LAST = re.compile(r"last_([1-9]\d{0,5})")
WAYS = "all, head, norms, lora and last_N with a number of blocks, such as last_4"


def heads_of(net: Any) -> tuple[nn.Module, ...]:
    """What timm calls the classifier of a network; a distilled DeiT has two."""
    heads = net.get_classifier()
    return tuple(heads) if isinstance(heads, tuple | list | nn.ModuleList) else (heads,)


def freeze(net: nn.Module, train: str, name: str) -> None:
    """Freeze all of a network but its head and the parts that `train` names, in place.

    Args:
        net: a timm model.
        train: `head`, `lora` (whose adapters are added afterwards), `norms` or `last_N`.
        name: of the network, for messages.

    Raises:
        UserError: if the network has no such part, or not so many blocks.
    """
    trained: Iterable[nn.Parameter] = ()
    last = LAST.fullmatch(train)
    if train == "norms":
        norms = [module for module in net.modules() if _is_norm(module)]
        trained = [p for norm in norms for p in norm.parameters(recurse=False)]
        if not trained:
            raise UserError(f"model.train is norms, but {name} has none with scales: take head or last_N")
    elif last is not None:
        layers, top = layer_ids(net, f"model.train={train}", "all, head, norms or lora may train it")
        count, num_blocks = int(last[1]), top - 1
        if count >= num_blocks:
            raise UserError(
                f"model.train is {train}, but {name} has {num_blocks} blocks: take fewer than these, or all"
            )
        trained = [p for parameter, p in net.named_parameters() if layers[parameter] > num_blocks - count]
    net.requires_grad_(False)
    for part in (*trained, *(p for head in heads_of(net) for p in head.parameters())):
        part.requires_grad_(True)


def frozen_to_eval(module: nn.Module, *, inherited: bool = False) -> None:
    """Set the mode of a network that is trained in parts: training for these, evaluation for the others.

    Args:
        module: the network, or one of its modules.
        inherited: the mode of a module without parameters, such as drop-path: that of the one around it.
    """
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else inherited
    for child in module.children():
        frozen_to_eval(child, inherited=module.training)


def _is_norm(module: nn.Module) -> bool:
    # timm's own are not always torch's: LayerNorm2d, GroupNorm1, RmsNorm, BatchNormAct2d.
    return any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
