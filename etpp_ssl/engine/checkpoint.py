"""Checkpoints, written whole or not at all, in safetensors and JSON."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.engine.sharding import parted_like, whole_tensors
from etpp_ssl.recipe import CheckpointConfig
from etpp_ssl.run_folder import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    Checkpoint,
    RunFolder,
    load_weights,
)

GROUP_STEP = "group_step"
"""Slot of a step that is counted per parameter group."""


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

    def written(self) -> None:
        """Start counting minutes again."""
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

    A reader sees the old checkpoint or the new one, never a part.

    Args:
        folder: the run's folder.
        step: optimizer steps done.
        files: from `checkpoint_files`.
        state: what else to remember, for JSON.
        keep: checkpoints that stay.

    Raises:
        UserError: if the disk is full or cannot be written to; the older checkpoints are intact.
    """
    final = folder.checkpoint_folder / f"step-{step:08d}"
    aside = folder.checkpoint_folder / f".writing-step-{step:08d}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(_contiguous(tensors), aside / name)
        sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
        text = json.dumps({**state, "files": sizes}, indent=1)
        (aside / STATE_FILE).write_text(text, encoding="utf-8")
        for file in aside.iterdir():
            _flush(file)
        _flush(aside)
        # Only a damaged checkpoint of the same step can be in the way: the run has fallen back.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush(folder.checkpoint_folder)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        # safetensors reports a full disk as an error type of its own.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise UserError(
                f"checkpoint of step {step} could not be written to {str(folder.checkpoint_folder)!r}: "
                f"{error}; older checkpoints are intact"
            ) from error
        raise
    for old in folder.checkpoints()[keep:]:
        shutil.rmtree(old.path, ignore_errors=True)
    return final


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint's tensors into a model and its optimizer; returns its state.

    A collective where the model is sharded.

    Raises:
        UserError: if it belongs to another model.
    """
    own = model.state_dict()
    tensors = load_weights(own, checkpoint.model(), f"checkpoint {checkpoint.path}")
    model.load_state_dict({name: parted_like(tensors[name], own[name]) for name in own})
    load_optimizer_tensors(model, optimizer, checkpoint.optimizer())
    return checkpoint.state()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `parameter name.slot`, so that no order and no pickle is involved.

    A step that an optimizer counts per group (timm's Lamb) stands with each of the group's parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[id(parameter)]}.{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }
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
    slots: dict[str, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    for key in sorted(tensors):
        name, _, slot = key.rpartition(".")
        value = tensors[key]
        slots.setdefault(name, {})[slot] = parted_like(value, parameters.get(name, value))
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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
