"""accelerate, set up for a recipe."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from etpp_ssl.config import UserError
from etpp_ssl.engine.fsdp import fsdp_plugin, refuse_deepspeed
from etpp_ssl.recipe import RunRecipe


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
    )
    if plugin is not None and not accelerator.is_fsdp2:
        accelerator.print("warning: FSDP2 needs GPUs; here every process holds the whole model (DDP)")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if asked not in ("no", precision) and accelerator.is_main_process:
        accelerator.print(
            f"warning: accelerate was launched with {asked}, the recipe's precision {recipe.precision} holds"
        )
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return accelerator
