"""Reproduces a step that was not finite: does it happen here, where first, and because of what.

One process repeats forward and backward of all processes' micro-batches by the loop's own code. The
optimizer does not step, so keys of `optim` play no part.

Legend: B batch, M predicted patches, V values per patch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from etpp_ssl.config import UserError
from etpp_ssl.debug.dumped_step import DumpedBatch, DumpedStep, read_dump
from etpp_ssl.debug.report import MOST_SEARCHED, BadMicroBatch, BadSample, Origin, Reproduction
from etpp_ssl.dist.accelerator import open_accelerator, process_as_found
from etpp_ssl.model.attention import BlockRunner
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe_base import TrackerConfig
from etpp_ssl.run_state import environment, environment_changes
from etpp_ssl.tasks.base import Inputs, Task, forward_backward
from etpp_ssl.train.opening import bare_task
from etpp_ssl.weights.reading import load_weights

MOST_NORMS = 5
"""Largest gradients that are reported."""


@dataclass
class _Pass:
    """Forward and backward of all micro-batches."""

    process_losses: list[dict[str, float]]
    bad: list[tuple[DumpedBatch, BadMicroBatch]]
    bad_gradients: list[str]
    norm: float
    finite: bool


@process_as_found()
def reproduce(path: Path, overrides: Sequence[str] = ()) -> Reproduction:
    """Reproduce the step of a dump, in this process alone.

    Args:
        path: the dump's folder.
        overrides: of its recipe: what might help. The micro-batches and their bandwidth are the dump's.

    Raises:
        UserError: if it is not a dump, or does not fit the overridden recipe or this device.
    """
    step = read_dump(path, overrides)
    accelerator = open_accelerator(step.recipe.model_copy(update={"tracker": TrackerConfig()}))
    if accelerator.num_processes > 1:
        raise UserError("replay-nan repeats all processes' parts in one: start it without a launcher")
    task = bare_task(step.recipe, accelerator.device, step.record.num_classes, lambda build: build())
    tensors = load_weights(task.model.state_dict(), step.weights, f"dump {path}")
    task.model.load_state_dict(tensors)
    model = accelerator.prepare(task.model).train()
    scaler = accelerator.scaler
    if scaler is not None and step.record.scaler is not None:
        scaler.load_state_dict(step.record.scaler)
    found = _run(step, task, model, accelerator.backward, scaled=scaler is not None)
    largest = _largest_gradients(task.model) if scaler is None else {}
    with plain_blocks(task.model):
        # Statistics of batch norms are those after the forward pass: this very step may have spoilt them.
        bad_weights = [name for name, p in task.model.named_parameters() if not bool(p.isfinite().all())]
        mixed = any(isinstance(module, _BatchNorm) for module in task.model.modules())
        samples_apart = not bad_weights and not mixed
        samples: list[BadSample] = []
        for dumped, _ in found.bad[:MOST_SEARCHED]:
            samples += _bad_samples(task, model, dumped, apart=samples_apart)
        origin = None
        if found.bad:
            first, _ = found.bad[0]
            origin = trace(task, model, _inputs(task, first, accelerator.device))
    finite_in_fp32 = None
    if not found.finite and accelerator.mixed_precision != "no":
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        finite_in_fp32 = _run(step, task, plain, torch.Tensor.backward, scaled=False).finite
    now = environment(step.record.num_processes, accelerator.device, task.kernels)
    return Reproduction(
        path=str(path),
        step=step.record.step,
        overrides=tuple(overrides),
        precision=step.recipe.precision,
        device=accelerator.device.type,
        reproduced=not found.finite,
        losses={
            name: sum(losses[name] for losses in found.process_losses) for name in found.process_losses[0]
        },
        process_losses=tuple(losses["loss"] for losses in found.process_losses),
        gradient_norm=found.norm,
        bad_weights=tuple(bad_weights),
        micro_batches=tuple(bad for _, bad in found.bad),
        samples=tuple(samples),
        samples_apart=samples_apart,
        origin=origin,
        bad_gradients=tuple(found.bad_gradients),
        largest_gradients=largest,
        finite_in_fp32=finite_in_fp32,
        changes=tuple(environment_changes(step.record.environment, now)),
    )


def _inputs(task: Task, dumped: DumpedBatch, device: torch.device) -> Inputs:
    return task.inputs(dumped.batch.to(device), dumped.batch.request)


def _run(
    step: DumpedStep,
    task: Task,
    model: nn.Module,
    backward: Callable[[Tensor], None],
    *,
    scaled: bool,
) -> _Pass:
    """What the loop computes up to the verdict, with all processes' gradients brought together."""
    device = next(model.parameters()).device
    num_processes = step.record.num_processes
    found = _Pass([], [], [], float("nan"), finite=True)
    together: dict[nn.Parameter, Tensor] = {}
    for micro_batches in step.processes:
        model.zero_grad()
        losses_of_process: dict[str, Tensor] = {}
        for dumped in micro_batches:
            batch = dumped.batch.to(device)
            weight = batch.request.weight
            with bad_gradients(task.model) as bad_names:
                losses = forward_backward(task, model, batch, batch.request, backward, num_processes)
            for name, loss in losses.items():
                losses_of_process[name] = losses_of_process.get(name, 0.0) + loss.detach() * weight
            names = [] if scaled else bad_names()
            found.bad_gradients += [name for name in names if name not in found.bad_gradients]
            loss_value = float(losses["loss"].detach())
            if names or not math.isfinite(loss_value):
                bad = BadMicroBatch(dumped.rank, dumped.number, len(dumped.names), loss_value, len(names))
                found.bad.append((dumped, bad))
        found.process_losses.append({name: float(loss) for name, loss in losses_of_process.items()})
        found.finite &= bool(losses_of_process["loss"].isfinite())
        for parameter in model.parameters():
            # As DDP averages over the processes: divide, then add.
            if num_processes > 1 and parameter.grad is not None:
                own = parameter.grad / num_processes
                together[parameter] = together[parameter] + own if parameter in together else own
    for parameter, gradient in together.items():
        parameter.grad = gradient
    if not scaled:
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.norm = float(norm)
        found.finite &= bool(norm.isfinite())
    return found


def _bad_samples(task: Task, model: nn.Module, dumped: DumpedBatch, *, apart: bool) -> list[BadSample]:
    """The samples of a bad micro-batch that are not finite by themselves."""
    device = next(model.parameters()).device
    inputs = _inputs(task, dumped, device)
    ones = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(len(dumped.names))]

    def loss(one: Inputs) -> Tensor:
        return task.losses(task.forward(model, one), one)["loss"]

    def has_bad_gradient(one: Inputs) -> bool:
        with bad_gradients(task.model) as bad_names:
            loss(one).backward()
        return bool(bad_names())

    finite_inputs = inputs["images"].flatten(1).isfinite().all(dim=1).tolist()
    found: list[tuple[int, Literal["input", "loss", "gradient"]]]
    found = [(i, "input") for i, finite in enumerate(finite_inputs) if not finite]
    if not found and apart:
        with torch.no_grad():
            losses = torch.stack([loss(one) for one in ones])
        found = [(i, "loss") for i, finite in enumerate(losses.isfinite().tolist()) if not finite]
    if not found and apart:
        found = [(i, "gradient") for i, one in enumerate(ones) if has_bad_gradient(one)]
    request = dumped.batch.request
    return [
        BadSample(
            dumped.rank, dumped.number, request.sample_ids[i], request.indices[i], dumped.names[i], what
        )
        for i, what in found
    ]


def _largest_gradients(model: nn.Module) -> dict[str, float]:
    norms = {name: _norm(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    finite = [(norm, name) for name, norm in norms.items() if math.isfinite(norm)]
    return {name: norm for norm, name in sorted(finite, reverse=True)[:MOST_NORMS]}


def _norm(gradient: Tensor) -> float:
    """A norm that is finite where the gradient is: its squares may not be."""
    largest = gradient.abs().max()
    return float(largest) * float((gradient / largest).norm()) if largest > 0 else float(largest)


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
