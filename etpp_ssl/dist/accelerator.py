"""accelerate, torch and signals, set up for a run, and left behind as they were found."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from etpp_ssl.config import UserError
from etpp_ssl.dist.sharding import fsdp_plugin, refuse_plugins
from etpp_ssl.recipe_base import RunRecipe

_STATES: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
_meetings = itertools.count()
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def process_as_found() -> Iterator[None]:
    """What a run sets for the whole process is taken back afterwards, however the run ends.

    So runs in one notebook do not know of each other, nor does the notebook's own use of accelerate of them.
    """
    shared = [state._shared_state for state in _STATES]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_WORKSPACE)
    threads = torch.get_num_threads()
    try:
        # A loader's workers take a seed from torch's generator.
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for state, before in zip(_STATES, shared, strict=True):
            state._shared_state = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def open_accelerator(recipe: RunRecipe) -> Accelerator:
    """accelerate, set up as the recipe says, whatever another run of this process has made of it.

    Raises:
        UserError: for a precision that the device lacks, a tracker that is not installed, or an accelerate
            configuration that asks for something else than DDP or FSDP2.
    """
    tracker = recipe.tracker.name
    if tracker != "none" and tracker not in [str(t) for t in get_available_trackers()]:
        raise UserError(f"tracker {tracker!r} is not installed: pip install {tracker}")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "no" if recipe.precision == "fp32" else recipe.precision
    refuse_plugins()
    plugin = fsdp_plugin(recipe.precision)
    # accelerate allows one precision in a process, because all of its objects share these.
    for state in _STATES:
        state._shared_state = {}
    timeout = timedelta(minutes=recipe.peer_timeout_minutes)
    _meet_again(timeout)
    try:
        accelerator = Accelerator(
            # Said explicitly, torchrun's CPU processes find each other (gloo) instead of running alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no" if precision == "fp16" and not torch.cuda.is_available() else precision,
            log_with=None if tracker == "none" else tracker,
            project_dir=recipe.output,
            fsdp_plugin=plugin,
            # Else accelerate divides losses by what the environment says; ours are shares of the batch.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        # Of a configuration of accelerate, or of environment variables, that it cannot follow itself.
        raise UserError(
            f"accelerate cannot start as it is configured: {' '.join(str(error).split())}"
        ) from error
    if plugin is not None and not accelerator.is_fsdp2:
        _warn(accelerator, "FSDP2 needs GPUs; here every process holds the whole model (DDP)")
    warning = alone_by_mistake(accelerator.num_processes)
    if warning is not None:
        _warn(accelerator, warning)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if asked not in ("no", precision):
        _warn(
            accelerator,
            f"accelerate was launched with {asked}, the recipe's precision {recipe.precision} holds",
        )
    if recipe.deterministic:
        os.environ.setdefault(_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return accelerator


def _meet_again(timeout: timedelta) -> None:
    """Let the processes of an earlier run find each other for the next one.

    torch alone would find the addresses of the earlier group in torchrun's store, and wait for those.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or torch.distributed.is_initialized():
        return
    number = next(_meetings)
    if number > 0:
        store, rank, num_processes = next(rendezvous("env://", timeout=timeout))
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore(f"etpp_ssl/{number}", store),
            rank=rank,
            world_size=num_processes,
            timeout=timeout,
        )


def alone_by_mistake(num_processes: int) -> str | None:
    """What to tell a user whose `accelerate launch --cpu --num_processes N` has started one process, or None.

    accelerate's launcher for CPUs sets the address at which N processes would meet, and starts one.
    """
    launched = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    if num_processes > 1 or not launched or "WORLD_SIZE" in os.environ:
        return None
    return (
        "accelerate launch has started one process, for on a CPU it starts no more; for N of them: "
        f"torchrun --standalone --nproc_per_node N -m etpp_ssl {shlex.join(sys.argv[1:])}"
    )


def _warn(accelerator: Accelerator, text: str) -> None:
    # What a command prints to stdout is its result.
    accelerator.print(f"warning: {text}", file=sys.stderr)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_SECONDS = 3.0
"""A launcher passes on what a scheduler has sent to all processes: a signal comes twice for one request."""


class StopRequest:
    """Remembers the first signal while it is entered; one that comes seconds later acts at once.

    The handler only takes a note: it starts no collective, since SIGTERM also arrives when another
    process has died.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            self._restore()
            os.kill(os.getpid(), signum)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
