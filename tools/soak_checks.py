"""What must hold after each end of a soaked run, and at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from soak_plan import STOPS
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.run_folder import RunFolder

TIMINGS = {"seconds", "elapsed", "images_per_second", "data_wait_share", "probe_seconds"}
"""The only values in which a run that was killed may differ from one that was not."""
GRACEFUL_EXITS = {75, 130}


@dataclass(frozen=True)
class End:
    """How a launch of a run ended."""

    launch: str
    kind: str | None
    """Of the blow that ended it; None if it ended by itself."""
    hit: str | None
    """The process that the blow hit; None without one."""
    outcome: str
    """What `Job.watch` said last."""
    exit_code: int | None
    """torchrun's."""
    seconds: float
    """From the blow to the last process's end."""
    step: int
    """Of the newest row of losses when it was struck; -1 if this launch had not written one."""
    checkpoint: int
    """Step of the newest checkpoint; -1 without one."""
    interval: int | None
    """Steps between two checkpoints, where they are written by steps."""
    left: list[str]
    """Processes and shared memory that are still there."""
    status: dict[str, Any] | str | None
    """The content of `status.json`: text if it is no JSON object, None if there is no such file."""

    @property
    def finished(self) -> bool:
        """Whether the run is done."""
        return self.exit_code == 0

    @property
    def told(self) -> str:
        """The status in a few words."""
        if isinstance(self.status, dict):
            return f"status {self.status.get('state')} at {self.status.get('step')}"
        return "no status" if self.status is None else "unreadable status"

    @property
    def lost(self) -> int | None:
        """Steps that must be done again, by the rows of losses; None if there were no rows yet."""
        return max(0, self.step - max(self.checkpoint, 0)) if self.step >= 0 else None


def end_faults(end: End, run: RunFolder, printed: Mapping[str, str]) -> list[str]:
    """What should not be so after an end.

    Args:
        end: the end.
        run: the folder that it left.
        printed: what launcher and ranks printed.
    """
    faults = [f"is left: {what}" for what in end.left] + folder_faults(run)
    if end.kind is None and end.outcome == "ended" and not end.finished:
        faults.append(f"ended by itself with exit code {end.exit_code}")
    if end.kind in STOPS and end.lost:
        faults.append(f"{end.lost} steps are lost, though the run was asked to stop")
    if end.interval and (end.lost or 0) > end.interval:
        faults.append(f"{end.lost} steps are lost, with a checkpoint every {end.interval}")
    if end.outcome == "hangs":
        return faults
    if end.finished:
        return faults + status_faults(end)
    if end.kind != "kill all":
        killed = end.hit if end.kind == "kill rank" else None
        faults += output_faults(printed, killed, started=end.step >= 0)
    if end.kind is not None and end.step >= 0:
        faults += status_faults(end)
    return faults


def folder_faults(run: RunFolder) -> list[str]:
    """What is not whole in a run's folder."""
    faults = []
    if run.exists():
        try:
            run.any_recipe()
        except UserError as error:
            faults.append(f"recipe.yaml cannot be read: {error}")
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


def output_faults(printed: Mapping[str, str], killed: str | None, *, started: bool) -> list[str]:
    """What a user should not have seen, or should have seen, of the end of a run.

    Args:
        printed: by launcher and rank. torchrun's own traceback, which it prints whatever ends a rank, is no
            fault.
        killed: a rank that had no time to say anything.
        started: whether it was training; before, a signal may end it without a word.
    """
    ranks = {name: text for name, text in printed.items() if name not in ("launcher", killed)}
    faults = [f"{name} printed a traceback" for name, text in ranks.items() if "Traceback (most" in text]
    said = [line for text in ranks.values() for line in text.splitlines() if line.startswith("etpp: ")]
    if started and ranks and not said:
        faults.append("no process said in a sentence why the run has ended")
    return faults


def status_faults(end: End) -> list[str]:
    """What `status.json` says that is not true of a run that is done, or was training when it was struck.

    Its absence is not counted: a run of an older version writes none.
    """
    if end.status is None:
        return []
    if isinstance(end.status, str):
        return [f"status.json is no object: {end.status[:60]!r}"]
    state, faults = end.status.get("state"), []
    # The main process writes it; killed, it leaves what was true before.
    if end.finished:
        expected = {"finished"}
    elif end.kind == "kill all" or (end.kind, end.hit) == ("kill rank", "rank 0"):
        expected = {"running"}
    else:
        expected = {"stopped"} if end.kind in STOPS else {"failed", "stopped"}
    if state not in expected:
        faults.append(f"status.json says {state!r} instead of {' or '.join(sorted(expected))}")
    if state == "stopped" and end.status.get("step") != end.checkpoint:
        step = end.status.get("step")
        faults.append(f"status.json says stopped at step {step}, the checkpoint is of {end.checkpoint}")
    if state == "stopped" and end.status.get("exit_code") not in GRACEFUL_EXITS:
        faults.append(f"status.json says exit code {end.status.get('exit_code')} of a stopped run")
    return faults


def read_status(run: RunFolder) -> dict[str, Any] | str | None:
    """`status.json` as `End.status` has it."""
    file = run.path / "status.json"
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        status = json.loads(text)
    except ValueError:
        return text
    return status if isinstance(status, dict) else text


def shared_memory(pids: set[int]) -> list[str]:
    """Segments of torch's that processes have left."""
    found = Path("/dev/shm").glob("torch_*")
    return [file.name for file in found if any(file.name.startswith(f"torch_{pid}_") for pid in pids)]


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def differences(reference: RunFolder, soaked: RunFolder) -> list[str]:
    """Where two finished runs are not equal to the bit, timings apart."""
    first, second = (next(iter(run.checkpoints()), None) for run in (reference, soaked))
    if first is None or second is None:
        return ["one of the runs has no checkpoint"]
    if first.step != second.step:
        return [f"newest checkpoints are of steps {first.step} and {second.step}"]
    found = []
    for name in ("model", "optimizer", "average"):
        found += tensor_differences(name, getattr(first, name)() or {}, getattr(second, name)() or {})
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
