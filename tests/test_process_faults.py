"""One process of several fails, is killed, hangs or is told to stop: what the others do, and what users see.

The processes are as srun starts them, by `ranks.py`: nobody ends the others for them. Two tests go through
torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import LONG, Rank, Server, free_port

from etpp_ssl.config import UserError
from etpp_ssl.dist.accelerator import SAME_REQUEST_SECONDS, StopRequest, alone_by_mistake
from etpp_ssl.dist.peers import PeerLost, lost_peer
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder

PATIENCE = 30.0
"""Seconds in which the others must have ended."""
PLACES = {
    "opening": "etpp_ssl.train.opening.starting_point",
    "first step": "etpp_ssl.train.loop.log_row",
    "middle": "etpp_ssl.train.loop.log_row",
    "evaluation": "etpp_ssl.evaluation.knn.knn_sweep",
    "checkpoint": "etpp_ssl.train.checkpoint.save_tensors",
}
FAULTS = {
    "mistake": "raise UserError('mine is the fault')",
    "error": "raise KeyError('mine is the fault')",
    "exit": "os._exit(9)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "stop": "os.kill(os.getpid(), signal.SIGSTOP)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
}
CODES = {"mistake": 2, "error": 1, "exit": 9, "kill": -signal.SIGKILL}
SABOTAGE = """
import importlib, os, signal
from etpp_ssl.config import UserError

def sabotage(place, call):
    module, name = place.rsplit(".", 1)
    module, calls = importlib.import_module(module), 0
    whole = getattr(module, name)

    def fail(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            {fault}
        return whole(*args, **kwargs)

    setattr(module, name, fail)

if rank == {who}:
    sabotage({place!r}, {call})
"""


def sabotage(who: int, where: str, fault: str) -> str:
    """Python that makes one rank fail in some way at some place."""
    call = 7 if where == "middle" else 1
    return SABOTAGE.format(who=who, place=PLACES[where], call=call, fault=FAULTS[fault])


@pytest.fixture
def command(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> list[str]:
    """A run of 20 steps in `tmp_path / "run"`, with a checkpoint and a probe every 5."""
    file = tmp_path / "recipe.yaml"
    tiny_recipe("budget_epochs=1.7", "log_every_steps=1", "checkpoint.every_steps=5", "probe=knn",
                "probe.every_steps=5").save(file)  # fmt: skip
    return ["pretrain", str(file)]


def status(tmp_path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((tmp_path / "run" / "status.json").read_text())
    return values


def ended(jobs: list[Rank]) -> list[int]:
    """Exit codes, once all have ended, the last within `PATIENCE` of the first."""
    deadline = time.monotonic() + LONG
    while all(job.code is None for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [job.wait(PATIENCE) for job in jobs]


@pytest.mark.parametrize(
    ("where", "fault", "who", "count"),
    [
        ("opening", "mistake", 1, 2),
        ("opening", "exit", 0, 2),
        ("first step", "error", 1, 2),
        ("middle", "mistake", 1, 2),
        ("middle", "kill", 0, 2),
        ("middle", "kill", 2, 4),
        ("evaluation", "error", 0, 2),
        ("evaluation", "kill", 1, 2),
        ("checkpoint", "mistake", 0, 2),
        ("checkpoint", "kill", 0, 2),
    ],
)
def test_one_process_failing_ends_the_others(
    where: str, fault: str, who: int, count: int, command: list[str], ranks: Server, tmp_path: Path
) -> None:
    jobs = ranks.start(command, count, before=sabotage(who, where, fault))
    codes = ended(jobs)
    assert codes[who] == CODES[fault]
    for rank, job in enumerate(jobs):
        if rank == who:
            continue
        assert codes[rank] == 1
        named = "" if rank == 0 else f" [process {rank}]"
        assert job.text.count(f"etpp: error:{named} another process ended (") == 1, job.text
        assert "Traceback" not in job.text
        assert "frame #" not in job.text
        if rank == 0 and fault in ("mistake", "error"):
            assert f"process {who}: " in job.text
            assert "mine is the fault" in job.text
    if fault == "mistake":
        named = "" if who == 0 else f" [process {who}]"
        assert f"etpp: error:{named} mine is the fault" in jobs[who].text
    if where == "opening":
        assert not (tmp_path / "run").exists()
        return
    assert status(tmp_path)["state"] == ("running" if who == 0 and fault == "kill" else "failed")
    if who != 0:
        assert "another process ended" in status(tmp_path)["message"]
    assert not any(checkpoint.fault() for checkpoint in RunFolder(tmp_path / "run").checkpoints())
    if where == "checkpoint":
        ranks.run(command, 2)
        assert status(tmp_path)["state"] == "finished"


@pytest.mark.parametrize("mistake", ["precision=fp23", "precision=fp16", "data.holdout=64"])
def test_what_all_processes_say_is_said_once(
    mistake: str, command: list[str], ranks: Server, tmp_path: Path
) -> None:
    jobs = ranks.start([*command, mistake], 2)
    assert ended(jobs) == [2, 2]
    assert jobs[0].text.startswith("etpp: error: ")
    assert not jobs[1].text
    assert not (tmp_path / "run").exists()


def test_a_process_that_hangs_ends_the_others(command: list[str], ranks: Server, tmp_path: Path) -> None:
    jobs = ranks.start([*command, "peer_timeout_minutes=0.12"], 2, before=sabotage(1, "middle", "stop"))
    assert jobs[0].wait() == 1
    assert "another process did not answer within peer_timeout_minutes" in jobs[0].text
    assert status(tmp_path)["state"] == "failed"
    jobs[1].send(signal.SIGKILL)
    jobs[1].wait()


def test_a_process_that_sees_another_checkpoint_is_found_out(
    command: list[str], ranks: Server, tmp_path: Path
) -> None:
    ranks.run([*command, "budget_epochs=1.7"], 1)
    blind = """
if rank == 1:
    from etpp_ssl.run_folder import RunFolder
    RunFolder.newest = lambda self, warn: None
"""
    jobs = ranks.start(command, 2, before=blind)
    assert ended(jobs) == [2, 2]
    assert "process 1 has opened another run than process 0: step 0 instead of" in jobs[0].text


@pytest.mark.parametrize(("where", "who"), [("middle", 1), ("evaluation", 0), ("checkpoint", 0)])
def test_sigterm_to_one_process_stops_all_after_the_step(
    where: str, who: int, command: list[str], ranks: Server, tmp_path: Path
) -> None:
    jobs = ranks.start(command, 2, before=sabotage(who, where, "SIGTERM"))
    assert ended(jobs) == [75, 75]
    assert status(tmp_path)["state"] == "stopped"
    assert status(tmp_path)["exit_code"] == 75
    assert RunFolder(tmp_path / "run").checkpoints()[0].step == status(tmp_path)["step"]
    assert jobs[0].text.count("the same command resumes") == 1
    assert not jobs[1].text


def test_sigterm_before_the_run_has_started_ends_it_at_once(
    command: list[str], ranks: Server, tmp_path: Path
) -> None:
    jobs = ranks.start(command, 2, before=sabotage(1, "opening", "SIGTERM"))
    assert ended(jobs) == [1, -signal.SIGTERM]
    assert not (tmp_path / "run").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, also where a shell has started these tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_counts_once_when_a_launcher_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
        later = time.monotonic() + SAME_REQUEST_SECONDS + 1
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_torchrun_told_to_stop_leaves_a_run_that_goes_on_to_the_same_bits(
    command: list[str], ranks: Server, tmp_path: Path
) -> None:
    longer = ["budget_epochs=7", "probe=none", "checkpoint.every_steps=1000"]
    words = ["--standalone", "--nproc_per_node=2", "-m", "etpp_ssl", *command, *longer]
    torchrun = f"from torch.distributed.run import main; main({words!r})"
    (job,) = ranks.start(None, 1, before=torchrun, env={"PYTHONPATH": ENVIRONMENT["PYTHONPATH"]})
    run = RunFolder(tmp_path / "run")
    deadline = time.monotonic() + LONG
    while len(run.metrics()) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send(signal.SIGTERM)
    assert job.wait() == 1, job.text
    assert job.text.count("the same command resumes") == 1
    assert status(tmp_path)["state"] == "stopped"
    assert status(tmp_path)["exit_code"] == 75
    assert run.checkpoints()[0].step == status(tmp_path)["step"] < status(tmp_path)["num_steps"]
    ranks.run([*command, *longer], 2)
    assert status(tmp_path)["state"] == "finished"
    ranks.run([*command, *longer, f"output={tmp_path / 'whole'}"], 2)
    whole = RunFolder(tmp_path / "whole")
    for tensors in ("model", "optimizer"):
        here, there = (getattr(folder.checkpoints()[0], tensors)() for folder in (run, whole))
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
    losses = [[(row["step"], row.get("loss")) for row in folder.metrics()] for folder in (run, whole)]
    assert losses[0] == losses[1]


def test_the_agent_of_torchrun_ends_when_one_process_fails(
    command: list[str], ranks: Server, tmp_path: Path
) -> None:
    job = ranks.start_torchrun(command, before=sabotage(1, "middle", "mistake"))
    assert job.wait() == 1
    assert "etpp: error: [process 1] mine is the fault" in job.text
    assert status(tmp_path)["state"] == "failed"
    assert "process 1: mine is the fault" in status(tmp_path)["message"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

WAITING = """
import os, sys
import etpp_ssl.cli
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, wait_for_workers=False)
store.set("waiting", "")
try:
    store.get("never")
except dist.DistError as error:
    print("lost:", error)
"""
HOST = """
import os
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", {port}, 2, True, wait_for_workers=False)
store.wait(["waiting"])
os._exit(9)
"""


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "WARNING"}, True),
    ],
)
def test_torch_prints_no_stack_when_the_store_is_lost_in_a_wait_unless_asked_to(
    environment: dict[str, str], told: bool, ranks: Server
) -> None:
    port = free_port()
    clean = {name: value for name, value in ENVIRONMENT.items() if name != "TORCH_CPP_LOG_LEVEL"}
    (host,) = ranks.start(None, 1, before=HOST.format(port=port))
    waited = subprocess.run(
        [sys.executable, "-c", WAITING, str(port)],
        env={**clean, **environment}, capture_output=True, text=True, timeout=LONG, check=True,
    )  # fmt: skip
    assert host.wait() == 9
    assert waited.stdout.startswith("lost: ")
    assert ("frame #" in waited.stderr) == told


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] "


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:35227."), "ended"),
        (RuntimeError(GLOO + "Read error [127.0.0.1]:1: Connection reset by peer"), "ended"),
        (RuntimeError(GLOO + "Timed out waiting 3000ms for recv operation to complete"), "did not answer"),
        (dist.DistNetworkError("Broken pipe"), "ended"),
        (dist.DistStoreError("wait timeout after 3000ms, keys: /default_pg/0//1"), "did not answer"),
        (dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"), "ended"),
        (dist.DistBackendError("NCCL error: Duplicate GPU detected"), None),
        (dist.DistNetworkError("The server socket has failed to listen: EADDRINUSE"), None),
        (ConnectionResetError("Connection reset by peer"), None),
        (RuntimeError("Timed out"), None),
        (UserError("data: timed out"), None),
    ],
)
def test_the_error_of_a_lost_process_is_recognised(error: Exception, words: str | None) -> None:
    fault = lost_peer(error)
    assert (fault is None) == (words is None)
    if words is not None:
        assert isinstance(fault, PeerLost)
        assert f"another process {words}" in str(fault)


def test_a_launch_that_started_one_process_by_mistake_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert alone_by_mistake(1) is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert alone_by_mistake(1) is None
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(sys, "argv", ["etpp", "pretrain", "a b.yaml", "seed=1"])
    told = alone_by_mistake(1)
    assert told is not None
    assert told.endswith("torchrun --standalone --nproc_per_node N -m etpp_ssl pretrain 'a b.yaml' seed=1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert alone_by_mistake(1) is None
