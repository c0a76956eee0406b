"""Which checkpoints of a run stay, and what becomes of the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from etpp_ssl.config import shown_bytes
from etpp_ssl.run_folder import OLD, Checkpoint, RunFolder

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
        step: where the run goes on; later checkpoints go.

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
    """What there is to go on from, and whether the disk is too full for another one of its size."""
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
