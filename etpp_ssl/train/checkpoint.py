"""Which checkpoints of a run stay, and what becomes of the others.

Checkpoints, written whole or not at all, in safetensors and JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etpp_ssl.config import RunFault, shown_bytes
from etpp_ssl.dist.sharding import parted_like, whole_tensors
from etpp_ssl.files import disk_fault, flush, flush_folder, save_tensors, take_place
from etpp_ssl.recipe_base import CheckpointConfig
from etpp_ssl.run_folder import (
    EMA_FILE,
    MODEL_FILE,
    OLD,
    OPTIMIZER_FILE,
    STATE_FILE,
    Checkpoint,
    RunFolder,
)
from etpp_ssl.weights.reading import load_weights

WRITING, REMOVING = ".writing-", ".removing-"
"""Before the name of a checkpoint that is not whole yet, or no longer."""
BLOCK = 4096
"""Bytes that a disk gives at a time."""


def remove_checkpoints(paths: Iterable[Path]) -> None:
    """Remove checkpoint folders, each out of sight first; what a disk keeps is left to the next start."""
    for path in paths:
        gone = path.with_name(f"{REMOVING}{path.name.lstrip('.')}")
        with suppress(OSError):
            os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def clear_leftovers(folder: RunFolder, step: int) -> None:
    """Remove what a killed run has left, and checkpoints of a past that did not happen.

    Args:
        folder: the run's folder.
        step: where the run resumes; later checkpoints are removed.

    Raises:
        OSError: if that fails.
    """
    for path in list(folder.checkpoint_folder.glob(".*step-*")):
        if path.name.startswith((WRITING, REMOVING)):
            shutil.rmtree(path)
    for checkpoint in folder.checkpoints():
        if checkpoint.step > step:
            remove_checkpoints([checkpoint.path])
        elif checkpoint.path.name.startswith(OLD):
            os.replace(checkpoint.path, folder.checkpoint_folder / f"step-{checkpoint.step:08d}")
    remove_checkpoints(list(folder.checkpoint_folder.glob(f"{OLD}*")))


def what_is_left(folder: RunFolder) -> str:
    """What there is to resume from, and whether the disk is too full for another one of its size."""
    whole = next((checkpoint for checkpoint in folder.checkpoints() if checkpoint.fault() is None), None)
    if whole is None:
        return "there is none before it"
    intact = f"the newest one, of step {whole.step}, is intact"
    try:
        size, free = checkpoint_bytes(whole), shutil.disk_usage(whole.path).free
    except OSError:
        return intact
    if free > size:
        return intact
    return f"{intact}; a checkpoint takes {shown_bytes(size)}, {shown_bytes(free)} are free"


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """What a whole checkpoint takes of the disk, its state aside."""
    return sum(-(-size // BLOCK) * BLOCK for size in checkpoint.state()["files"].values())


GROUP_STEP = "group_step"
"""Slot of a step that is counted per parameter group."""
PLAIN = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}
"""Types of other slots than tensors, each with one that holds all of its values."""


class CheckpointClock:
    """Says when a checkpoint is due: every so many steps, or minutes."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to write one once `step` steps are done."""
        config = self.config
        by_steps = config.every_steps is not None and step % config.every_steps == 0
        elapsed = time.monotonic() - self._last
        return by_steps or (config.every_minutes is not None and elapsed >= 60 * config.every_minutes)

    def start(self) -> None:
        """Count minutes anew: a checkpoint was written, or will be tried again when the next is due."""
        self._last = time.monotonic()


def save_checkpoint(
    folder: RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int,
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint of a model that this process has whole; see `write_checkpoint`."""
    files = checkpoint_files(model, optimizer, average)
    return write_checkpoint(folder, step, files, state, keep=keep)


def checkpoint_files(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor] | None = None,
    *,
    keep: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file; a collective where the model is sharded.

    Args:
        model, optimizer: whose tensors.
        average: a moving average of the model's tensors, where the run keeps one.
        keep: whether this process is the one that writes; for others the files are empty.
    """
    # The state dict comes first: a sharded model takes its parameters back in parts for it.
    files: dict[str, Mapping[str, Tensor]] = {MODEL_FILE: model.state_dict()}
    files[OPTIMIZER_FILE] = optimizer_tensors(model, optimizer)
    if average is not None:
        files[EMA_FILE] = average
    return {name: whole_tensors(tensors, keep=keep) for name, tensors in files.items()}


def write_checkpoint(
    folder: RunFolder,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint aside, flush it, rename it; then remove all but the newest `keep`.

    A reader sees the old checkpoint or the new one, never a part: what is removed is renamed first, too.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        files: from `checkpoint_files`.
        state: what else to remember, for JSON.
        keep: checkpoints that stay.

    Raises:
        RunFault: if the disk is full or cannot be written to; the older checkpoints are intact.
    """
    place = folder.checkpoint_folder
    final, aside, old = (place / f"{prefix}step-{step:08d}" for prefix in ("", WRITING, OLD))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, tensors in files.items():
            save_tensors(_contiguous(tensors), aside / name)
        sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
        text = json.dumps({**state, "files": sizes}, indent=1)
        (aside / STATE_FILE).write_text(text, encoding="utf-8")
        flush_folder(aside)
        # A checkpoint of this step is there where a run has gone back to it, or falls back from it.
        take_place(aside, final, old)
        flush(place)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = disk_fault(error)
        if reason is None:
            raise
        raise RunFault(
            f"checkpoint of step {step} could not be written to {str(place)!r}: {reason}; "
            f"{what_is_left(folder)}"
        ) from error
    remove_checkpoints([old, *(checkpoint.path for checkpoint in folder.checkpoints()[keep:])])
    return final


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint's tensors into a model and its optimizer; returns its state.

    A collective where the model is sharded.

    Raises:
        UserError: if it belongs to another model.
    """
    load_tensors(model, checkpoint.model(), f"checkpoint {checkpoint.path}")
    load_optimizer_tensors(model, optimizer, checkpoint.optimizer())
    return checkpoint.state()


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put whole tensors into a model, sharded or not; `source` names their file in the message.

    Raises:
        UserError: naming up to five tensors that are missing, too many or of another shape.
    """
    own = model.state_dict()
    checked = load_weights(own, tensors, source)
    model.load_state_dict({name: parted_like(checked[name], own[name]) for name in own})


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name.slot`, so that no order and no pickle is involved.

    A slot that is no tensor (timm's Muon keeps a bool) becomes one, and its name ends in its type, such as
    `use_muon:bool`. A step that an optimizer counts per group (timm's Lamb) stands with each of the group's
    parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                assert kind in PLAIN, f"{slot} of {type(optimizer).__name__} is {kind}"
                slot, value = f"{slot}:{kind}", torch.tensor(value, dtype=PLAIN[kind])
            tensors[f"{names[id(parameter)]}.{slot}"] = value
    for group in optimizer.param_groups:
        if "step" in group:
            for parameter in group["params"]:
                # Cloned, because safetensors refuses tensors that share memory.
                tensors[f"{names[id(parameter)]}.{GROUP_STEP}"] = torch.as_tensor(group["step"]).clone()
    return tensors


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; torch moves the tensors to the parameters' devices."""
    slots: dict[str, dict[str, Any]] = {}
    parameters = dict(model.named_parameters())
    for key in sorted(tensors):
        name, _, slot = key.rpartition(".")
        value = tensors[key]
        slot, _, kind = slot.partition(":")
        own = slots.setdefault(name, {})
        own[slot] = value.item() if kind else parted_like(value, parameters.get(name, value))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    group_steps = {name: own.pop(GROUP_STEP) for name, own in slots.items() if GROUP_STEP in own}
    packed = optimizer.state_dict()
    for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        step = group_steps.get(names[id(group["params"][0])])
        if step is not None:
            packed_group["step"] = step if step.is_floating_point() else int(step)
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    packed["state"] = {i: slots[name] for i, name in enumerate(ordered) if slots.get(name)}
    optimizer.load_state_dict(packed)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
