"""What a step costs, by the area rule and by counted operations; and the steps that a plan records."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
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
    peak_values: int
    """Numbers in memory where the forward pass holds most: what it keeps, and what it works with. The latter
    is more where little is trained."""


def area_share(bandwidth: tuple[int, int], image_size: tuple[int, int]) -> float:
    """Compute of one image relative to full resolution, by the paper's area rule, in (0, 1]."""
    return bandwidth[0] * bandwidth[1] / (image_size[0] * image_size[1])


def count_cost(loss: Callable[[], Tensor], model: nn.Module) -> Cost:
    """Count the operations of `loss()` and its backward pass, per call.

    Meant for a model on the `meta` device, where nothing is computed or allocated. Matrix products,
    convolutions and attention are counted, as `torch.utils.flop_counter` does. Attention saves its
    probabilities here; fused kernels do not, so there `saved_values` and `peak_values` are upper bounds.

    Args:
        loss: one forward pass, to a scalar.
        model: its parameters are in memory anyway and do not count as saved.
    """
    held, saved = _Held(model), _Held(model)

    def keep(tensor: Tensor) -> Tensor:
        saved.add(tensor, for_good=True)
        held.add(tensor, for_good=True)
        return tensor

    counter = _Flops(held)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
        forward_flops = counter.total
        counter.held = None
        result.backward()
    del result
    return Cost(
        flops=counter.total,
        forward_flops=forward_flops,
        saved_values=saved.peak,
        # Tables that the first pass makes and keeps are of no image, and the next pass finds them.
        peak_values=held.peak - held.left,
    )


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of matrix products, convolutions and attention in a call, as `count_cost` counts them."""
    counter = _Flops(None)
    with counter:
        call()
    return counter.total


class _Held:
    """Numbers in memory, now and at the peak.

    Several tensors are views of the same memory: what counts is the memory behind.

    Args:
        model: its parameters are in memory anyway and do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sizes = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
        self._now = 0
        self.peak = 0
        self.left = 0
        """Numbers that were not counted for good, and have not been freed."""

    def add(self, tensor: Tensor, *, for_good: bool = False) -> None:
        """Count a tensor, until its memory is freed or `for_good`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() // tensor.element_size()
        self._now += self._sizes[key]
        self.peak = max(self.peak, self._now)
        if not for_good:
            self.left += self._sizes[key]
            weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key)
        self._now -= size
        self.left -= size


class _Flops(TorchDispatchMode):
    """Counts what `FlopCounterMode` counts, by its formulas, in less time: not by module.

    Args:
        held: told of what operations give, until it is None.
    """

    def __init__(self, held: _Held | None) -> None:
        super().__init__()
        self.total = 0
        self.held = held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = _SHAPES.get(func)
        result = (shapes if shapes and args[0].is_meta else func)(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        if self.held is not None:
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    self.held.add(tensor)
        return result


def _layer_norm(x: Tensor, shape: list[int], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    outer = x.ndim - len(shape)
    if list(x.shape[outer:]) != list(shape):
        raise RuntimeError(f"a layer norm of shape {list(shape)} was given {list(x.shape)}")
    statistic = x.new_empty(*x.shape[:outer], *(1 for _ in shape))
    return _contiguous(x), statistic, statistic.clone()


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, *affine_and_mask: Any
) -> tuple[Tensor | None, ...]:
    *affine, mask = affine_and_mask
    return tuple(
        _contiguous(tensor) if wanted else None for tensor, wanted in zip([x, *affine], mask, strict=True)
    )


def _contiguous(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _elementwise(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return torch.empty_like(x)


_ATEN = torch.ops.aten
_SHAPES: dict[Any, Callable[..., Any]] = {
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.native_layer_norm_backward.default: _layer_norm_backward,
    _ATEN.gelu.default: _elementwise,
    _ATEN.gelu_backward.default: _elementwise,
    _ATEN._safe_softmax.default: _contiguous,
    _ATEN._softmax_backward_data.default: _contiguous,
}
"""Results of operations without products, which torch decomposes in Python where it computes nothing: that
took half of the time of counting."""


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one stage, over which progress grows linearly.

    A run is a sequence of segments, one per stage unless a budget in hours cuts a stage into several.
    Compute is counted in images at full resolution. After `k` steps of the segment the progress is
    `(spent + k * cost) / total`, where `cost` is that of one step.
    """

    stage: int
    """Index of its stage."""
    share: float
    """Share of the run's compute that it was given."""
    first_step: int
    num_steps: int
    spent: float
    """Compute before the segment, on a scale where the whole run takes `total`."""
    total: float


def whole_steps(dues: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Steps for each part of a run, at least one each.

    Args:
        dues: what each part is to cost, in any unit.
        costs: what one step of it costs, in the same unit, > 0.

    Returns:
        Numbers of steps whose costs add up to those due within half a step of the last part, unless what
        was left for a part was less than one step of it.
    """
    counts = []
    spent = due = 0.0
    for part, cost in zip(dues, costs, strict=True):
        due += part
        # Rounding against what is due so far keeps the whole run within half a step of its budget.
        counts.append(max(1, round((due - spent) / cost)))
        spent += counts[-1] * cost
    return counts


def segments_from(
    parts: Sequence[tuple[int, float]],
    counts: Sequence[int],
    step_costs: Sequence[float],
    *,
    first_step: int,
    progress: float,
) -> list[Segment]:
    """Segments that lead from a step and its progress to the end of the run, progress 1.

    Args:
        parts: (index of the stage, share of compute) of each segment.
        counts: its steps.
        step_costs: compute of one step of each stage.
        first_step: optimizer steps done before the first segment.
        progress: share of the run's compute spent by then, in [0, 1).
    """
    costs = [count * step_costs[stage] for count, (stage, _) in zip(counts, parts, strict=True)]
    rest = 0.0
    for cost in costs:
        rest += cost
    # Progress must reach 1 when the rest is done, however much compute it was planned with before.
    total = rest / (1 - progress)
    spent, step = progress * total, first_step
    segments = []
    for (stage, share), count, cost in zip(parts, counts, costs, strict=True):
        segments.append(Segment(stage, share, step, count, spent, total))
        spent += cost
        step += count
    return segments
