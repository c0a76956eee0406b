"""Report of a reproduced step, for a person to read, and for a script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from etpp_ssl.config import listed
from etpp_ssl.debug.reproduce import MOST_SEARCHED, BadSample, Reproduction
from etpp_ssl.debug.tracing import Origin

MOST_ROWS = 5
"""Lines of one kind that are shown; the file has all."""
WITHOUT_PART = ("optim.", "optim=", "curriculum", "budget_", "batch_size", "micro_batch_size", "checkpoint")
"""Beginnings of overrides that cannot change forward and backward of a dump's micro-batches."""


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
