"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, and how they are merged into the weights.

With W and b frozen, a layer gives y = x W^T + b + (alpha / r) (x A^T) B^T. A starts uniform within
1 / sqrt(in), as in the authors' code, and B at zero, so that the network starts as it was, to the bit. No
gradient of W is computed or kept. A fused layer of queries, keys and values has one pair for all three.

Why not `peft`: it wraps each layer, which renames `weight` to `base_layer.weight`, draws A from torch's
global generator, imports transformers, and does not notice layers that a network never calls.

Legend: r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import UserError, listed
from etpp_ssl.randomness import keyed_torch

LoraLayers = Literal["attention", "all"]
PARTS = ("lora_a", "lora_b", "lora_alpha")
"""Tensors of an adapter in a state dict, beside the layer's own `weight` and `bias`."""
_QUERIES = ("qkv", "q", "q_proj", "query", "to_qkv", "to_q")
"""What timm's networks, and ours, call the layer that makes queries: those beside it are the attention's."""


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; `add_adapters` turns timm's layers into it.

    The layers change their class in place, so that `weight` and `bias` keep their names.
    """

    lora_a: nn.Parameter
    """A, (r, in)."""
    lora_b: nn.Parameter
    """B, (out, r)."""
    lora_alpha: Tensor
    """alpha, (): in the state dict, so that a checkpoint tells what its network is."""
    scale: float
    """alpha / r."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        change = F.linear(self.scale * F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + change


def layers_to_adapt(net: nn.Module, which: LoraLayers, heads: Sequence[nn.Module]) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name, in the network's order.

    Args:
        net: a timm model.
        which: `attention` is the layers beside one that makes queries; `all` is every linear layer.
        heads: modules that are left out.
    """
    trained = {part for head in heads for part in head.modules()}
    found: dict[str, nn.Linear] = {}
    for path, module in net.named_modules():
        children = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
        if which == "all" or any(name in children for name in _QUERIES):
            prefix = f"{path}." if path else ""
            found |= {f"{prefix}{name}": child for name, child in children.items() if child not in trained}
    return found


def add_adapters(layers: Mapping[str, nn.Linear], *, rank: int, alpha: float, seed: int) -> None:
    """Give layers an adapter each, in place, and freeze them otherwise.

    Args:
        layers: by name, from `layers_to_adapt`.
        rank: r.
        alpha: the change's scale is alpha / r.
        seed: the run's; A is a function of it and of the layer's number.

    Raises:
        UserError: if r is larger than a layer.
    """
    for number, (name, layer) in enumerate(layers.items()):
        smaller = min(layer.in_features, layer.out_features)
        if rank > smaller:
            raise UserError(
                f"model.lora_rank is {rank}, but {name} has {layer.in_features} inputs and "
                f"{layer.out_features} outputs: it must be at most {smaller}"
            )
        like = layer.weight.detach()
        a, b = like.new_empty(rank, layer.in_features), like.new_zeros(layer.out_features, rank)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=keyed_torch(seed, "lora", number))
        layer.requires_grad_(False)
        layer.__class__ = LoraLinear
        assert isinstance(layer, LoraLinear)
        layer.lora_a, layer.lora_b = nn.Parameter(a), nn.Parameter(b)
        layer.register_buffer("lora_alpha", like.new_full((), alpha))
        layer.scale = alpha / rank


def check_called(net: nn.Module, names: Mapping[str, nn.Linear], images: Tensor, name: str) -> None:
    """See that a network calls its layers, and does not multiply with their weights itself.

    Args:
        net: the network without adapters, on the meta device.
        names: of the layers.
        images: (B, C, H, W) on the meta device.
        name: of the network, for the message.

    Raises:
        UserError: naming layers that an adapter would not reach.
    """
    called: set[nn.Module] = set()
    layers = {layer: net.get_submodule(layer) for layer in names}
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in layers.values()]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    missed = [layer for layer, module in layers.items() if module not in called]
    if missed:
        raise UserError(
            f"model.train is lora, but {name} reads the weights of {listed(missed)} itself, past an adapter: "
            f"norms, last_N and head can train it"
        )


def without_adapters(net: nn.Module) -> None:
    """Turn adapted layers back into plain ones, in place; what the adapters hold is lost, unless `merged`."""
    for layer in net.modules():
        if isinstance(layer, LoraLinear):
            for part in PARTS:
                delattr(layer, part)
            del layer.scale
            layer.__class__ = nn.Linear  # type: ignore[assignment]


def merged(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A state dict with every adapter added to the weight that it adapts: W + (alpha / r) B A.

    The sum is taken in float64 and rounded once to the weight's type. Others stay as they are.

    Args:
        tensors: by name.
        source: names them in the message.

    Raises:
        UserError: for an adapter that is not whole, or does not fit its weight.
    """
    found = dict(tensors)
    for name in [name for name in tensors if name.rpartition(".")[2] == PARTS[0]]:
        layer = name.removesuffix(PARTS[0])
        a, b, alpha = (found.pop(f"{layer}{part}", None) for part in PARTS)
        weight = found.get(f"{layer}weight")
        if a is None or b is None or alpha is None or weight is None or not _fit(weight, a, b, alpha):
            raise UserError(f"{source} has an adapter {layer.rstrip('.')!r} that does not fit its layer")
        change = float(alpha) / len(a) * (b.double() @ a.double())
        found[f"{layer}weight"] = (weight.double() + change).to(weight.dtype)
    return found


def _fit(weight: Tensor, a: Tensor, b: Tensor, alpha: Tensor) -> bool:
    if not (weight.ndim == a.ndim == b.ndim == 2 and alpha.ndim == 0 and len(a) > 0):
        return False
    return weight.shape == (b.shape[0], a.shape[1]) and b.shape[1] == a.shape[0]


def plain_tensors(net: nn.Module) -> dict[str, Tensor]:
    """A network's state dict without adapters: what weights of others can hold."""
    return {name: value for name, value in net.state_dict().items() if name.rpartition(".")[2] not in PARTS}
