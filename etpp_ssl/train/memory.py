"""Memory of this machine: whether a run fits (model, batch, buffers), and what it keeps between steps."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from etpp_ssl.config import UserError, show_size
from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.data.replay import buffer_bytes
from etpp_ssl.data.views import TrainView, intermediate_size
from etpp_ssl.randomness import ShapesOnly

BYTES_PER_VALUE = 4
"""Weights, gradients and a moving average are in float32, on host and device."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`; see mallopt(3)."""
MOST_OF_A_HEAP = 32 << 20
"""The largest `M_MMAP_THRESHOLD` that glibc takes: smaller blocks come from the heap."""


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Let the C library keep the activations and gradients that a step frees, for the next step to use.

    By default glibc returns the end of its heap to the system as soon as that is free, and the system maps
    and clears the same pages again in the next step: a tenth of a small CPU step. In effect on a CPU under
    glibc, unless the environment has settings of its own (`MALLOC_*_`, `GLIBC_TUNABLES`); afterwards what is
    free goes back. Values do not change.

    Args:
        device: of the run.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    settings = (name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_"))
    if mallopt is None or device.type != "cpu" or any(settings):
        yield
        return
    mallopt(M_MMAP_THRESHOLD, MOST_OF_A_HEAP)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        # glibc's own rule: twice the other threshold.
        mallopt(M_TRIM_THRESHOLD, 2 * MOST_OF_A_HEAP)
        ctypes.CDLL(None).malloc_trim(0)


def check_host_memory(
    name: str,
    build: Callable[[], nn.Module],
    *,
    image_shape: tuple[int, int, int],
    batch_size: int,
    micro_batch_size: int | None,
) -> None:
    """See that the model and one batch of each process of this machine fit its memory.

    What is needed on the device is estimated by `etpp plan`; this finds what could not even begin.

    Args:
        name: of the model.
        build: makes the model; called on the meta device, where it takes no memory.
        image_shape: (C, H, W) at full resolution.
        batch_size: images per step, over all processes.
        micro_batch_size: images per forward pass and process at most; None takes the whole part at once.

    Raises:
        UserError: if one does not fit.
    """
    with ShapesOnly():
        model = build()
    values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    free = psutil.virtual_memory().available
    # Set by torchrun and accelerate; every process builds its own model.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = values * BYTES_PER_VALUE * processes
    if need > free:
        raise UserError(
            f"model.name {name}: {values:,} values take {need / 1e9:,.1f} GB in {processes} "
            f"processes, but this machine has {free / 1e9:,.1f} GB free"
        )
    share = -(-batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    batch = min(micro_batch_size or share, share)
    need = batch * math.prod(image_shape) * processes
    if need > free:
        raise UserError(
            f"batch_size {batch_size}, micro_batch_size {micro_batch_size}: {batch:,} images "
            f"of {show_size(image_shape[1:])} pixels take {need / 1e9:,.1f} GB in {processes} processes, but "
            f"this machine has {free / 1e9:,.1f} GB free"
        )


def training_bytes(model: nn.Module, state_bytes: int, *, average: bool) -> int:
    """Bytes that a model in training holds between two steps, gradients included; activations are not.

    Args:
        model: what is frozen in it needs its weights alone.
        state_bytes: of the optimizer.
        average: whether a moving average of all weights is kept.
    """
    values = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return BYTES_PER_VALUE * (values * (1 + average) + trained) + state_bytes


def replay_bytes(view: TrainView, in_chans: int, stage: Stage) -> int:
    """Bytes of a stage's buffers over all processes, which share them out evenly; 0 without replay.

    Args:
        view: what the data workers make.
        in_chans: C.
        stage: of the run.
    """
    shape = (in_chans, *view_size(view, stage.bandwidth))
    return buffer_bytes(stage.buffer_steps * len(stage.samples), shape, 4 if view.deep else 1)


def view_size(view: TrainView, bandwidth: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of what the data workers make at a bandwidth."""
    if view.lanczos:
        return bandwidth
    return intermediate_size(bandwidth, view.image_size) if view.decode == "reduced" else view.image_size


def replay_notes(view: TrainView, in_chans: int, stages: Sequence[Stage]) -> list[str]:
    """A sentence for each stage that has a replay, for whoever plans or starts the run."""
    notes = []
    for stage in stages:
        name = f"stage {stage.index + 1}"
        if stage.buffer_steps:
            loaded = stage.num_steps * len(stage.samples)
            notes.append(
                f"{name} trains on each of {loaded:,} loaded images {stage.times} times on average; its "
                f"replay buffer takes {_shown(replay_bytes(view, in_chans, stage))} over all processes "
                f"({_contents(view, stage)})"
            )
        elif stage.replay is not None:
            notes.append(f"{name} has replay.times 1: nothing is replayed, and no buffer is kept")
    return notes


def check_replay(
    view: TrainView, in_chans: int, curriculum: Curriculum, num_processes: int, step: int
) -> None:
    """See that every buffer divides among the processes and fits this machine.

    Args:
        view: what the data workers make.
        in_chans: C.
        curriculum: the run's stages.
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
        need = replay_bytes(view, in_chans, stage) * on_this_machine
        if need > free:
            assert stage.replay is not None
            raise UserError(
                f"curriculum: stage {stage.index + 1} has replay.buffer {stage.replay.buffer}, which takes "
                f"{_shown(need)} of this machine's memory ({_contents(view, stage)}), but "
                f"{_shown(free)} are available: enough for {int(stage.buffer_steps * free / need)}"
                + (
                    ""
                    if view_size(view, stage.bandwidth) == stage.bandwidth
                    else ", more with curriculum.crop=lanczos"
                )
            )


def _contents(view: TrainView, stage: Stage) -> str:
    return (
        f"{stage.buffer_steps:,} mini-batches of {len(stage.samples):,} images of "
        f"{show_size(view_size(view, stage.bandwidth))} px"
    )


def _shown(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
