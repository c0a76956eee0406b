"""Whether this machine can hold a run at all, before it is asked to.

What the replay buffers of a run take in host memory, and whether that is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import torch
from torch import nn

from etpp_ssl.config import UserError, show_size
from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.data.replay import buffer_bytes
from etpp_ssl.data.views import intermediate_size
from etpp_ssl.recipe import FinetuneRecipe, Recipe, RunRecipe

BYTES_PER_VALUE = 4
"""A model is built in float32, on the host."""


def check_host_memory(recipe: Recipe | FinetuneRecipe, build: Callable[[], nn.Module]) -> None:
    """See that the model and one batch of each process of this machine fit its memory.

    What is needed on the device is estimated by `etpp plan`; this finds what could not even begin.

    Args:
        recipe: the run.
        build: makes the model; called on the meta device, where it takes no memory.

    Raises:
        UserError: if one does not fit.
    """
    with torch.device("meta"):
        model = build()
    values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    free = psutil.virtual_memory().available
    # Set by torchrun and accelerate; every process builds its own model.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = values * BYTES_PER_VALUE * processes
    if need > free:
        raise UserError(
            f"model.name {recipe.model.name}: {values:,} values take {need / 1e9:,.1f} GB in {processes} "
            f"processes, but this machine has {free / 1e9:,.1f} GB free"
        )
    height, width = recipe.size
    share = -(-recipe.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    batch = min(recipe.micro_batch_size or share, share)
    need = batch * recipe.in_chans * height * width * processes
    if need > free:
        raise UserError(
            f"batch_size {recipe.batch_size}, micro_batch_size {recipe.micro_batch_size}: {batch:,} images "
            f"of {show_size(recipe.size)} pixels take {need / 1e9:,.1f} GB in {processes} processes, but "
            f"this machine has {free / 1e9:,.1f} GB free"
        )


def replay_bytes(recipe: RunRecipe, stage: Stage) -> int:
    """Bytes of a stage's buffers over all processes, which share them out evenly; 0 without replay."""
    return buffer_bytes(stage.buffer_steps * len(stage.samples), (recipe.in_chans, *view_size(recipe, stage)))


def view_size(recipe: RunRecipe, stage: Stage) -> tuple[int, int]:
    """(H, W) of what the data workers make."""
    if recipe.curriculum.crop == "lanczos":
        return stage.bandwidth
    return intermediate_size(stage.bandwidth, recipe.size) if recipe.data.decode == "reduced" else recipe.size


def replay_notes(recipe: RunRecipe, curriculum: Curriculum) -> list[str]:
    """A sentence for each stage that has a replay, for whoever plans or starts the run."""
    notes = []
    for stage in curriculum.stages:
        name = f"stage {stage.index + 1}"
        if stage.buffer_steps:
            loaded = stage.num_steps * len(stage.samples)
            notes.append(
                f"{name} trains on each of {loaded:,} loaded images {stage.times} times on average; its "
                f"replay buffer takes {_shown(replay_bytes(recipe, stage))} over all processes "
                f"({_contents(recipe, stage)})"
            )
        elif stage.replay is not None:
            notes.append(f"{name} has replay.times 1: nothing is replayed, and no buffer is kept")
    return notes


def check_replay(recipe: RunRecipe, curriculum: Curriculum, num_processes: int, step: int) -> None:
    """See that every buffer divides among the processes and fits this machine.

    Args:
        recipe: the run.
        curriculum: its stages.
        num_processes: of the run, on all machines.
        step: optimizer steps done; stages that end before it need nothing any more.

    Raises:
        UserError: if one does not.
    """
    # Set by torchrun and accelerate; the stages' buffers follow each other, so the largest one counts.
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / num_processes
    free = psutil.virtual_memory().available
    to_come = [stage for stage in curriculum.stages if stage.first_step + stage.num_steps > step]
    for stage in to_come:
        if stage.buffer_steps and len(stage.samples) % num_processes:
            raise UserError(
                f"curriculum: stage {stage.index + 1} has replay.times {stage.times}, so each step loads "
                f"{len(stage.samples)} of {stage.batch_size} images, which do not divide evenly among the "
                f"{num_processes} processes"
            )
        need = replay_bytes(recipe, stage) * on_this_machine
        if need > free:
            assert stage.replay is not None
            raise UserError(
                f"curriculum: stage {stage.index + 1} has replay.buffer {stage.replay.buffer}, which takes "
                f"{_shown(need)} of this machine's memory ({_contents(recipe, stage)}), but "
                f"{_shown(free)} are available: enough for {int(stage.buffer_steps * free / need)}"
                + (
                    ""
                    if view_size(recipe, stage) == stage.bandwidth
                    else ", more with curriculum.crop=lanczos"
                )
            )


def _contents(recipe: RunRecipe, stage: Stage) -> str:
    return (
        f"{stage.buffer_steps:,} mini-batches of {len(stage.samples):,} images of "
        f"{show_size(view_size(recipe, stage))} px"
    )


def _shown(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
