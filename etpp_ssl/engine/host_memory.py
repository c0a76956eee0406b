"""Whether this machine can hold a run at all, before it is asked to."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import torch
from torch import nn

from etpp_ssl.config import UserError, show_size
from etpp_ssl.recipe import FinetuneRecipe, Recipe

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
