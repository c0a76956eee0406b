"""What a step costs: by the area rule of the paper, and by counted floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


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

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
        forward_flops = counter.get_total_flops()
        result.backward()
    return Cost(flops=counter.get_total_flops(), forward_flops=forward_flops, saved_values=saved)
