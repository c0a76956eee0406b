"""Where in a network values stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etpp_ssl.model.attention import BlockRunner
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.tasks.base import Inputs, Task


@dataclass(frozen=True)
class Origin:
    """Where the forward pass of a micro-batch stops being finite; finite numbers are magnitudes."""

    module: str | None
    """As in `named_modules`, the first in the order of execution whose output is not finite although its
    inputs are; None where all outputs are finite, or the input of the network is not."""
    kind: str | None
    """Its class."""
    largest_input: float | None
    """Of that module."""
    largest_weight: float | None
    """Of that module, those of its parts included; 0 where it has none."""
    largest_output: float
    """Of the network."""
    largest_target: float
    """Of what its output is compared with."""


def trace(task: Task, model: nn.Module, inputs: Inputs) -> Origin:
    """Run a forward pass with an eye on every module, inside `plain_blocks`.

    Args:
        task: the loop's step, with the bare model.
        model: the bare model, or what wraps it for the precision.
        inputs: of a micro-batch.
    """
    first: list[tuple[str, str, float, float]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*_tensors_in(args), *_tensors_in(kwargs)]
            if not first and not all(map(_finite, _tensors_in(output))) and all(map(_finite, given)):
                first.append(
                    (name, type(module).__name__, _largest_of(given), _largest_of(module.parameters()))
                )

        return hook

    hooks = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in task.model.named_modules()
    ]
    try:
        with torch.no_grad():
            output = task.forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    name, kind, largest_input, largest_weight = first[0] if first else (None, None, None, None)
    return Origin(
        module=name,
        kind=kind,
        largest_input=largest_input,
        largest_weight=largest_weight,
        largest_output=_largest_of([output]),
        largest_target=_largest_of([task.target(inputs)]),
    )


@contextmanager
def bad_gradients(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Watch a backward pass inside.

    Yields:
        A function that, after it, names the parameters whose gradients it made not finite, in its order;
        what was accumulated before does not count.
    """
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            seen.append((name, gradient.isfinite().all()))

        return hook

    # What is frozen gets no gradient.
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks = [parameter.register_hook(watch(name)) for name, parameter in learned]
    try:
        yield lambda: [name for name, finite in seen if not bool(finite)]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def plain_blocks(model: nn.Module) -> Iterator[None]:
    """Blocks that are neither compiled nor recomputed inside: hooks see their parts, at any batch size."""
    if not isinstance(model, MaskedAutoencoder):
        yield
        return
    before = model.run
    model.run_blocks_by(BlockRunner())
    try:
        yield
    finally:
        model.run_blocks_by(before)


def _tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, tuple | list):
        return []
    return [tensor for value in values for tensor in _tensors_in(value)]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


@torch.no_grad()
def _largest_of(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude, 0 of nothing; inf or NaN where one is not finite."""
    found = [tensor.float().abs().max() for tensor in tensors if tensor.numel()]
    return float(torch.stack(found).max()) if found else 0.0
