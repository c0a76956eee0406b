"""What two processes do in test_fsdp.py: runs under FSDP2 and DDP, one after the other in one launch.

    accelerate launch --config_file fsdp2_8gpu.yaml --num_processes 2 sharded_runs.py TASKS.json

accelerate takes FSDP2 for GPUs only. Told otherwise here, it runs unchanged on CPUs, over gloo: its own
launch, preparation, gradient clipping and accumulation, with the settings of the file.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import etpp_ssl.dist.accelerator as setup
import etpp_ssl.train.launch as launch
from etpp_ssl.dist.sharding import own_parts, whole_tensors
from etpp_ssl.recipe import FinetuneRecipe, load_any
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.run import Run


class OnCPU(Accelerator):  # type: ignore[misc]
    """accelerate, without its condition that FSDP needs a GPU."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if settings["fsdp_plugin"] is not None:
            self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = settings["fsdp_plugin"]


def stay(accelerator: Accelerator) -> None:
    """In the place of `leave`: the next run in these processes needs the process group."""
    accelerator.wait_for_everyone()


def cut(source: Path, target: Path) -> None:
    """Copy a run, as it was when it had written its first checkpoint."""
    shutil.copytree(source, target)
    for checkpoint in RunFolder(target).checkpoints()[:-1]:
        shutil.rmtree(checkpoint.path)


def by_hand(model: nn.Module) -> nn.Module:
    """The plain twin of what accelerate makes of its configuration."""
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layout(model: nn.Module) -> dict[str, Any]:
    """The units by name, and how every tensor lies on this process."""
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    spread = {
        name: (tensor.placements, tensor.to_local().shape)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, DTensor)
    }
    return {"units": units, **spread}


def check_sharded(run: Run, plain: nn.Module) -> None:
    """accelerate's units are those made by hand, and a process's parts can be put back."""
    assert run.bare_model is run.model
    assert layout(run.bare_model) == layout(by_hand(copy.deepcopy(plain)))
    with torch.no_grad():
        before = whole_tensors(run.bare_model.state_dict(), keep=True)
        kept = {name: part.clone() for name, part in own_parts(run.bare_model).items()}
        for part in own_parts(run.bare_model).values():
            part += 1
        for name, part in own_parts(run.bare_model).items():
            part.copy_(kept[name])
        after = whole_tensors(run.bare_model.state_dict(), keep=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert whole_tensors(run.bare_model.state_dict(), keep=False) == {}


def main(tasks: list[dict[str, Any]]) -> None:
    setup.Accelerator = OnCPU
    launch.leave = stay
    launched_for = os.environ["ACCELERATE_USE_FSDP"]
    for task in tasks:
        os.environ["ACCELERATE_USE_FSDP"] = launched_for if task["sharded"] else "false"
        # True in the file; false is the other way to divide memory.
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(task["reshard"]).lower()
        if task["begins_as"] is not None and os.environ["RANK"] == "0":
            cut(Path(task["begins_as"]), Path(task["output"]))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        recipe = load_any(Path(task["recipe"])).model_copy(update={"output": task["output"]})
        if isinstance(recipe, FinetuneRecipe):
            run: Run = finetune(recipe)
            plain: nn.Module = recipe.build_model(run.task.num_classes or 0)
        else:
            run = pretrain(recipe)
            plain = recipe.build_model()
        if task["sharded"]:
            assert run.accelerator.state.fsdp_plugin.reshard_after_forward is task["reshard"]
            check_sharded(run, plain)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
