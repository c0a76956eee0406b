"""The files of recipes/accelerate/: accelerate reads them, they say what was run, and the job is requeued."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from accelerate_recipes import FOLDER, fsdp_environment, launch_arguments
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from etpp_ssl.dist.sharding import fsdp_plugin
from etpp_ssl.run_folder import RunFolder

FILES = sorted(FOLDER.glob("*.yaml"))
SCRIPT = FOLDER / "slurm_two_nodes.sh"


def test_nothing_is_missing() -> None:
    names = ["ddp_8gpu_bf16", "deepspeed_zero2", "fsdp2_8gpu", "single_gpu", "two_nodes"]
    assert [file.stem for file in FILES] == names


@pytest.mark.parametrize("file", [*FILES, SCRIPT], ids=lambda f: f.stem)
def test_the_header_says_how_what_for_and_what_was_run(file: Path) -> None:
    header = " ".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    for part in (file.name, "etpp_ssl pretrain" if file != SCRIPT else "pretrain", "Memory:", "Checked:"):
        assert part in header
    assert "not run on" in header.lower() or "never run" in header


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_accelerate_knows_every_key(file: Path) -> None:
    # It refuses unknown keys itself, but takes anything within a section.
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    known = vars(launch_command_parser().parse_args(["script"]))
    assert not {*config.fsdp_config, *config.deepspeed_config} - known.keys()


@pytest.mark.parametrize(
    ("name", "chosen", "processes", "machines"),
    [
        ("single_gpu", None, 1, 1),
        ("ddp_8gpu_bf16", "multi_gpu", 8, 1),
        ("fsdp2_8gpu", "use_fsdp", 8, 1),
        ("two_nodes", "multi_gpu", 16, 2),
        ("deepspeed_zero2", "use_deepspeed", 8, 1),
    ],
)
def test_a_launch_does_what_the_name_says(
    name: str, chosen: str | None, processes: int, machines: int
) -> None:
    arguments = launch_arguments(FOLDER / f"{name}.yaml")
    ways = ("multi_gpu", "use_fsdp", "use_deepspeed", "tpu", "use_megatron_lm", "use_cpu")
    assert [way for way in ways if getattr(arguments, way)] == ([] if chosen is None else [chosen])
    assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
    assert arguments.mixed_precision == "bf16"


def test_the_fsdp_plugin_is_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fsdp_environment(FOLDER / "fsdp2_8gpu.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = fsdp_plugin("bf16")
    assert plugin is not None
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None
    assert not plugin.activation_checkpointing
    assert not plugin.cpu_ram_efficient_loading
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert fsdp_plugin("fp32").mixed_precision_policy is None  # type: ignore[union-attr]


def test_the_deepspeed_plugin_is_what_the_file_says() -> None:
    config = load_config_from_file(str(FOLDER / "deepspeed_zero2.yaml"))
    assert config.distributed_type == DistributedType.DEEPSPEED
    plugin = DeepSpeedPlugin(zero_stage=config.deepspeed_config["zero_stage"])
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2
    assert plugin.deepspeed_config["zero_optimization"]["offload_optimizer"]["device"] == "none"


STATUS = {"step": 7, "num_steps": 9, "exit_code": 75, "message": 'asked to stop; "state": "finished"'}


@pytest.fixture
def bash(tmp_path: Path) -> dict[str, str]:
    """An environment with SLURM's variables, and stand-ins for its commands that note their arguments."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, body in {
        "scontrol": 'case "$1" in show) printf "first\\nsecond\\n";; esac',
        "srun": 'shift 2; SLURM_NODEID=1 "$@"; printf "%s" "$STATUS" > "$RUN/status.json"; exit 1',
        "accelerate": 'printf "<%s>" "$@" >> "$CALLS"',
    }.items():
        file = bin_folder / name
        file.write_text(f'#!/bin/bash\nprintf "\\n%s %s\\n" {name} "$1 $2" >> "$CALLS"\n{body}\n')
        file.chmod(0o755)
    (tmp_path / "run").mkdir()
    return {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "RUN": str(tmp_path / "run"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def run_bash(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *command], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def calls(environment: dict[str, str], name: str) -> list[str]:
    file = Path(environment["CALLS"])
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in lines if line.startswith(name)]


def test_the_script_is_bash() -> None:
    assert run_bash(dict(os.environ), "-n", str(SCRIPT)).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("state", ["running", "stopped", "finished", "failed"])
def test_only_a_run_that_was_stopped_is_requeued(
    state: str, indent: int | None, bash: dict[str, str]
) -> None:
    text = json.dumps({"state": state, **STATUS}, indent=indent)
    Path(bash["RUN"], "status.json").write_text(text)
    done = run_bash(bash, "-c", f'source "{SCRIPT}"; requeue_if_stopped "$RUN"')
    assert done.stderr == ""
    assert calls(bash, "scontrol") == (["scontrol requeue 4711"] if state == "stopped" else [])


@pytest.mark.parametrize("state", ["running", "stopped", "finished", "failed"])
def test_the_engines_own_status_decides(state: str, bash: dict[str, str]) -> None:
    from etpp_ssl.train import records as status

    folder = RunFolder(bash["RUN"])
    folder.recipe_file.touch()
    run = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True, num_processes=2),
        folder=folder,
        lock=SimpleNamespace(held=True),
        state=SimpleNamespace(step=7),
        curriculum=SimpleNamespace(num_steps=9),
    )
    status.write_status(run, state, exit_code=75, message=STATUS["message"])
    run_bash(bash, "-c", f'source "{SCRIPT}"; requeue_if_stopped "$RUN"')
    assert calls(bash, "scontrol") == (["scontrol requeue 4711"] if state == "stopped" else [])


def test_the_job_launches_on_every_node_and_goes_back_in_the_queue(bash: dict[str, str]) -> None:
    arguments = ["pretrain", "recipe with blanks.yaml", "output=elsewhere", f"output={bash['RUN']}"]
    bash["STATUS"] = json.dumps({"state": "stopped", **STATUS})
    done = run_bash(bash, str(SCRIPT), *arguments)
    assert done.returncode == 1
    (launch,) = calls(bash, "<launch>")
    options = {"config_file": "recipes/accelerate/two_nodes.yaml", "num_machines": 2, "num_processes": 16,
               "machine_rank": 1, "main_process_ip": "first", "main_process_port": 20000 + 4711}  # fmt: skip
    given = "".join(f"<--{name}><{value}>" for name, value in options.items())
    assert launch == f"<launch>{given}<-m><etpp_ssl>" + "".join(f"<{argument}>" for argument in arguments)
    assert calls(bash, "scontrol")[-1] == "scontrol requeue 4711"


def test_what_an_earlier_part_of_the_run_left_does_not_requeue_it(bash: dict[str, str]) -> None:
    Path(bash["RUN"], "status.json").write_text(json.dumps({"state": "stopped", **STATUS}))
    bash["STATUS"] = ""
    run_bash(bash, str(SCRIPT), "pretrain", f"output={bash['RUN']}")
    assert calls(bash, "srun")
    assert "scontrol requeue 4711" not in calls(bash, "scontrol")


def test_the_run_folder_must_be_named(bash: dict[str, str]) -> None:
    done = run_bash(bash, str(SCRIPT), "pretrain", "recipe.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("output= must be given")
    assert calls(bash, "") == []
