"""accelerate, set up for a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from etpp_ssl.config import UserError
from etpp_ssl.dist.sharding import fsdp_plugin, refuse_deepspeed
from etpp_ssl.recipe_base import RunRecipe


def open_accelerator(recipe: RunRecipe) -> Accelerator:
    """accelerate, set up as the recipe says.

    Raises:
        UserError: for a precision that the device lacks, a tracker that is not installed, DeepSpeed or a
            setting of FSDP that does not serve.
    """
    tracker = recipe.tracker.name
    if tracker != "none" and tracker not in [str(t) for t in get_available_trackers()]:
        raise UserError(f"tracker {tracker!r} is not installed: pip install {tracker}")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "no" if recipe.precision == "fp32" else recipe.precision
    refuse_deepspeed()
    plugin = fsdp_plugin(recipe.precision)
    accelerator = Accelerator(
        # Said explicitly, torchrun's CPU processes find each other (gloo) instead of running alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp16" and not torch.cuda.is_available() else precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=recipe.output,
        fsdp_plugin=plugin,
        # Else accelerate divides losses by what the environment says; ours are shares of the batch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.peer_timeout_minutes))],
    )
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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return accelerator


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
