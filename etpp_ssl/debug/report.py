"""Report of a reproduced step: what was found, for a person to read, and for a script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from etpp_ssl.config import listed

MOST_ROWS = 5
"""Lines of one kind that are shown; the file has all."""
WITHOUT_PART = ("optim.", "optim=", "curriculum", "budget_", "batch_size", "micro_batch_size", "checkpoint")
"""Beginnings of overrides that cannot change forward and backward of a dump's micro-batches."""
MOST_SEARCHED = 8
"""Bad micro-batches whose samples are run one by one: where more are bad, no sample is to blame."""


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


@dataclass(frozen=True)
class BadMicroBatch:
    """A micro-batch whose loss or own gradients are not finite."""

    rank: int
    number: int
    """Among those of its process, from 0."""
    num_samples: int
    loss: float
    """Its mean loss."""
    bad_gradients: int
    """Parameters whose gradient it makes not finite."""


@dataclass(frozen=True)
class BadSample:
    """A sample that is not finite by itself."""

    rank: int
    micro_batch: int
    number: int
    """In the run."""
    index: int
    """In the data set."""
    name: str
    what: Literal["input", "loss", "gradient"]
    """What shows it, the first of these."""


@dataclass(frozen=True)
class Reproduction:
    """What the reproduction of a dump's step found."""

    path: str
    step: int
    """Counted from 0."""
    overrides: tuple[str, ...]
    precision: str
    device: str
    reproduced: bool
    losses: dict[str, float]
    """The step's loss and, with a combined target, its parts."""
    process_losses: tuple[float, ...]
    """Each process's part of the loss."""
    gradient_norm: float
    """Over all parameters; NaN where float16's loss scaling leaves it to the scaler."""
    bad_weights: tuple[str, ...]
    """Parameters that are not finite before the step."""
    micro_batches: tuple[BadMicroBatch, ...]
    samples: tuple[BadSample, ...]
    samples_apart: bool
    """Whether samples can be judged one by one: not with batch norms, nor with weights that are lost."""
    origin: Origin | None
    """Where the first bad micro-batch stops being finite."""
    bad_gradients: tuple[str, ...]
    """Parameters, in the order of the backward pass."""
    largest_gradients: dict[str, float]
    """Norms of the largest finite ones."""
    finite_in_fp32: bool | None
    """None where the step was float32 already, or is finite."""
    changes: tuple[str, ...]
    """How this environment differs from the run's."""


def print_report(found: Reproduction, console: Console) -> None:
    """A table of what was found, then the diagnosis."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(found):
        table.add_row(key, value)
    console.print(table, markup=False)
    console.print(diagnosis(found), markup=False, soft_wrap=True)


def write_report(found: Reproduction, file: Path) -> None:
    """All that was found and the diagnosis as JSON; numbers that it lacks are `"nan"`, `"inf"`, `"-inf"`."""
    values = {**asdict(found), "diagnosis": diagnosis(found)}
    file.write_text(json.dumps(_json(values), indent=1) + "\n", encoding="utf-8")


def diagnosis(found: Reproduction) -> str:
    """What happened, in one sentence."""
    if not found.reproduced:
        return _not_reproduced(found)
    return f"reproduced: {_cause(found)}"


def _not_reproduced(found: Reproduction) -> str:
    finite = f"not reproduced: loss and gradients of step {found.step + 1} are finite"
    if found.overrides:
        return f"{finite} with {listed(found.overrides)}"
    if found.changes:
        return (
            f"{finite} here, where kernels may round, and overflow, in another way: {listed(found.changes)}"
        )
    return (
        f"{finite} here, so neither weights nor images explain it: look for a fault of the device or its "
        f"memory, a race in a kernel, or code that changed the step from outside"
    )


def _cause(found: Reproduction) -> str:
    if found.bad_weights:
        return f"weights are already not finite ({listed(found.bad_weights)}): the fault is before this step"
    of_input = [sample for sample in found.samples if sample.what == "input"]
    if of_input:
        return (
            f"the input of {_shown(of_input)} is not finite once it is normalised: data.mean and data.std "
            f"do not suit it"
        )
    return f"{_arithmetic(found)}{_in_fp32(found)}"


def _arithmetic(found: Reproduction) -> str:
    """Which computation gives values that are not finite, out of weights and images that are."""
    origin, of = found.origin, _of_samples(found)
    if origin is None:
        if not all(map(math.isfinite, found.process_losses)):
            return "the loss of every micro-batch is finite, but not their sum"
        largest = [f"{name}, {norm:.3g}" for name, norm in found.largest_gradients.items()][:1]
        return (
            f"loss and gradients of every micro-batch are finite, but not the norm of their sum (the largest "
            f"finite gradient: {listed(largest) or 'none'})"
        )
    if origin.module is not None:
        return f"{_module(origin)} gives values that are not finite for inputs of up to {_sizes(origin)}{of}"
    if not math.isfinite(origin.largest_target):
        return f"the model's output is finite, but the target it is compared with is not{of}"
    if any(not math.isfinite(bad.loss) for bad in found.micro_batches):
        return (
            f"the model's output, up to {origin.largest_output:.3g}, and the target, up to "
            f"{origin.largest_target:.3g}, are finite, but not the loss{of}"
        )
    first, *others = found.bad_gradients
    after = f" and of {len(others)} parameters after it in the backward pass" if others else ""
    return f"the loss is finite, but not the gradient of {first}{after}{of}"


def _in_fp32(found: Reproduction) -> str:
    if found.finite_in_fp32 is None:
        return ""
    if found.finite_in_fp32:
        return f"; overflow in {found.precision}: finite in fp32"
    return "; nor is the step finite in fp32"


def _module(origin: Origin) -> str:
    return f"{origin.module or 'the model'} ({origin.kind})"


def _sizes(origin: Origin) -> str:
    weights = f" and weights of up to {origin.largest_weight:.3g}" if origin.largest_weight else ""
    return f"{origin.largest_input:.3g}{weights}"


def _of_samples(found: Reproduction) -> str:
    if not found.samples:
        return ""
    return ", with every sample" if _every(found) else f", with {_shown(found.samples)}"


def _every(found: Reproduction) -> bool:
    """Whether no sample of the bad micro-batches is better than the others."""
    searched = found.micro_batches[:MOST_SEARCHED]
    return len(found.samples) == sum(bad.num_samples for bad in searched) > 1


def _shown(samples: list[BadSample] | tuple[BadSample, ...]) -> str:
    first = f"sample {samples[0].number} ({samples[0].name})"
    return first + (f" and {len(samples) - 1} more" if len(samples) > 1 else "")


def _rows(found: Reproduction) -> Iterator[tuple[str, str]]:
    where = f"{found.precision} on {found.device}"
    yield "step", f"{found.step + 1} ({where})"
    for name, loss in found.losses.items():
        yield name, f"{loss:.6g}"
    if len(found.process_losses) > 1:
        yield "by process", ", ".join(f"{loss:.6g}" for loss in found.process_losses)
    yield "gradient norm", f"{found.gradient_norm:.6g}"
    yield from _some(
        "bad micro-batch",
        [
            f"process {bad.rank}, number {bad.number}: {bad.num_samples} samples, loss {bad.loss:.6g}, "
            f"{bad.bad_gradients} bad gradients"
            for bad in found.micro_batches
        ],
    )
    if _every(found):
        yield "bad sample", f"every one of the bad micro-batches: {found.samples[0].what}"
    else:
        yield from _some(
            "bad sample",
            [
                f"{sample.number} (process {sample.rank}, image {sample.index}, {sample.name}): {sample.what}"
                for sample in found.samples
            ],
        )
    if len(found.micro_batches) > MOST_SEARCHED:
        yield "bad sample", f"searched in the first {MOST_SEARCHED} bad micro-batches only"
    if found.micro_batches and not found.samples_apart and not found.bad_weights:
        yield "bad sample", "unknown: batch norms mix the samples"
    if found.origin is not None and found.origin.module is not None:
        yield "first bad output", f"{_module(found.origin)}, inputs up to {_sizes(found.origin)}"
    yield from _some("bad weight", list(found.bad_weights))
    yield from _some("bad gradient", list(found.bad_gradients))
    yield from (("finite gradient", f"{name}: {norm:.3g}") for name, norm in found.largest_gradients.items())
    if found.finite_in_fp32 is not None:
        yield "in fp32", "finite" if found.finite_in_fp32 else "not finite"
    for override in found.overrides:
        if override.startswith(WITHOUT_PART):
            yield "note", f"{override} plays no part in forward and backward of one step"


def _some(key: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    yield from ((key, line) for line in lines[:MOST_ROWS])
    if len(lines) > MOST_ROWS:
        yield key, f"and {len(lines) - MOST_ROWS} more"


def _json(value: Any) -> Any:
    """The value with what JSON cannot say as text."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
