"""The files of recipes/accelerate/, read as `accelerate launch` reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).parents[1] / "recipes" / "accelerate"


def launch_arguments(file: Path, *more: str) -> argparse.Namespace:
    """All arguments of a launch with this configuration."""
    command = ["--config_file", str(file), *more, "-m", "etpp_ssl", "pretrain", "recipe.yaml"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return arguments


def fsdp_environment(file: Path) -> dict[str, str]:
    """What a launch tells its processes about FSDP."""
    environment = prepare_multi_gpu_env(launch_arguments(file, "--main_process_port", "0"))
    return {
        name: value
        for name, value in environment.items()
        if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"
    }
