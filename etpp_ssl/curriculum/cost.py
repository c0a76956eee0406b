"""What a step costs: by the area rule of the paper, and by counted floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """One forward and backward pass of one image."""

    flops: int
    """Floating-point operations; one multiply-add is two."""
    forward_flops: int
    """Those of the forward pass."""
    saved_values: int
    """Numbers that the forward pass keeps for the backward pass."""


def area_share(bandwidth: tuple[int, int], image_size: tuple[int, int]) -> float:
    """Compute of one image relative to full resolution, by the paper's area rule, in (0, 1]."""
    return bandwidth[0] * bandwidth[1] / (image_size[0] * image_size[1])


def count_cost(loss: Callable[[], Tensor], model: nn.Module) -> Cost:
    """Count the operations of `loss()` and its backward pass, per call.

    Meant for a model on the `meta` device, where nothing is computed or allocated. Matrix products,
    convolutions and attention are counted, as `torch.utils.flop_counter` does. Attention saves its
    probabilities here; fused kernels do not, so there `saved_values` is an upper bound.

    Args:
        loss: one forward pass, to a scalar.
        model: its parameters are in memory anyway and do not count as saved.
    """
    # Several operations save the same tensor, or a view of it: what counts is the memory behind.
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal saved
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            saved += storage.nbytes() // tensor.element_size()
        return tensor

    counter = _Flops()
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
        forward_flops = counter.total
        result.backward()
    return Cost(flops=counter.total, forward_flops=forward_flops, saved_values=saved)


class _Flops(TorchDispatchMode):
    """Counts what `FlopCounterMode` counts, by its formulas, in less time: not by module."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result
