"""What must hold after each end of a soaked run, and at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from etpp_ssl.run_folder import RunFolder

TIMINGS = {"seconds", "elapsed", "images_per_second", "data_wait_share", "probe_seconds"}
"""The only values in which a run that was killed may differ from one that was not."""
GRACEFUL_EXITS = {75, 130}


def folder_faults(run: RunFolder) -> list[str]:
    """What is not whole in a run's folder."""
    faults = []
    for checkpoint in run.checkpoints():
        fault = checkpoint.fault()
        if fault is not None:
            faults.append(f"checkpoint {checkpoint.path.name}: {fault}")
    if run.metrics_file.exists():
        faults += metrics_faults(run.metrics_file.read_text(encoding="utf-8", errors="replace"))
    return faults


def metrics_faults(text: str) -> list[str]:
    """What is wrong with rows of metrics: one that does not parse, or steps that do not rise.

    A last line without its end is what a kill inside a write leaves; resuming cuts it off.
    """
    faults, last = [], -1
    *lines, _ = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError):
            faults.append(f"metrics.jsonl line {number} is no row: {line[:60]!r}")
            continue
        if "loss" in row:
            if step <= last:
                faults.append(f"metrics.jsonl line {number} has step {step} after step {last}")
            last = step
    return faults


def output_faults(printed: Mapping[str, str], silent: set[str]) -> list[str]:
    """What a user should not have seen, or should have seen, of the end of a run.

    Args:
        printed: by launcher and rank. torchrun's own traceback, which it prints whatever ends a rank, counts
            for nothing.
        silent: processes that had no time to say anything.
    """
    ranks = {name: text for name, text in printed.items() if name != "launcher" and name not in silent}
    faults = [f"{name} printed a traceback" for name, text in ranks.items() if "Traceback (most" in text]
    if ranks and not any(line.startswith("etpp: ") for text in ranks.values() for line in text.splitlines()):
        faults.append("no process said in a sentence why the run has ended")
    return faults


def status_faults(
    status: Mapping[str, Any] | None, newest: int, *, graceful: bool, main_killed: bool
) -> list[str]:
    """What `status.json` says that is not true of a run that was training and has ended early.

    Args:
        status: its content, or None without one, which is not counted as a fault.
        newest: step of the newest checkpoint.
        graceful: whether the run had been asked to stop.
        main_killed: whether the process that writes the file was killed.
    """
    if status is None:
        return []
    state, faults = status.get("state"), []
    expected = {"running"} if main_killed else {"stopped"} if graceful else {"failed", "stopped"}
    if state not in expected:
        faults.append(f"status.json says {state!r} instead of {' or '.join(sorted(expected))}")
    if state == "stopped" and status.get("step") != newest:
        faults.append(f"status.json says stopped at step {status.get('step')}, the checkpoint is of {newest}")
    if state == "stopped" and status.get("exit_code") not in GRACEFUL_EXITS:
        faults.append(f"status.json says exit code {status.get('exit_code')} of a stopped run")
    return faults


def read_status(run: RunFolder) -> dict[str, Any] | None:
    """`status.json`, or None where there is none.

    Raises:
        ValueError: if it is no object in JSON.
    """
    file = run.path / "status.json"
    if not file.exists():
        return None
    status = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(status, dict):
        raise ValueError("status.json holds no object")
    return status


def differences(reference: RunFolder, soaked: RunFolder) -> list[str]:
    """Where two finished runs are not equal to the bit, timings apart."""
    first, second = (next(iter(run.checkpoints()), None) for run in (reference, soaked))
    if first is None or second is None:
        return ["one of the runs has no checkpoint"]
    if first.step != second.step:
        return [f"newest checkpoints are of steps {first.step} and {second.step}"]
    found = []
    for name, read in (("model", "model"), ("optimizer", "optimizer"), ("average", "average")):
        found += tensor_differences(name, getattr(first, read)() or {}, getattr(second, read)() or {})
    states = [untimed(checkpoint.state()["state"]) for checkpoint in (first, second)]
    if states[0] != states[1]:
        found.append(f"states are {states[0]} and {states[1]}")
    return found + row_differences(reference.metrics(), soaked.metrics())


def tensor_differences(what: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal to the bit."""
    names = sorted(first.keys() ^ second.keys())
    found = [f"{what} tensor {name} is in one run only" for name in names]
    for name in sorted(first.keys() & second.keys()):
        if not same_bits(first[name], second[name]):
            found.append(f"{what} tensor {name} differs")
    return found


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equality of type, shape and bits: a NaN equals itself, and 0 is not -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*flat)


def row_differences(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[str]:
    """Rows of metrics that differ in more than timings, and rows that one run has and the other has not."""
    found = []
    keys = [[(row["step"], "loss" in row) for row in rows] for rows in (first, second)]
    if keys[0] != keys[1]:
        odd = sorted({*keys[0]} ^ {*keys[1]}) or "the same in another order or number"
        found.append(f"metrics have {len(first)} and {len(second)} rows; in one run only: {odd}")
    by_key = dict(zip(keys[1], second, strict=True))
    for key, row in zip(keys[0], first, strict=True):
        other = by_key.get(key, row)
        if untimed(row) != untimed(other):
            differing = [name for name in row if untimed(row).get(name) != untimed(other).get(name)]
            found.append(f"metrics of step {key[0]} differ in {', '.join(differing) or 'their keys'}")
    return found


def untimed(values: Mapping[str, Any]) -> dict[str, str]:
    """Values but for timings, as JSON, which tells 0.0 from -0.0."""
    return {key: json.dumps(value) for key, value in values.items() if key not in TIMINGS}
