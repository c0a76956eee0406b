"""One launch of a run under torchrun: its processes, what is done to them, and how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from etpp_ssl.randomness import keyed_random
from etpp_ssl.run_folder import RunFolder

MARK = "ETPP_SOAK"
"""Environment variable by which a launch's processes are found, orphans included."""

KINDS = ("kill all", "kill rank", "kill worker", "term launcher", "int group", "pause worker")
"""What a blow does:

- kill all: SIGKILL to torchrun, ranks and data workers, as when a machine is taken away;
- kill rank: SIGKILL to one training process, as the kernel does when memory is short;
- kill worker: SIGKILL to one data worker;
- term launcher: SIGTERM to torchrun, as a scheduler does;
- int group: SIGINT to torchrun's process group, as a terminal's Ctrl-C does;
- pause worker: SIGSTOP to a data worker, and SIGCONT some seconds later: the run must go on.
"""
NEEDS_WORKER = {"kill worker", "pause worker"}
STOPS = {"term launcher", "int group"}
"""After these a run has had the time to write a checkpoint."""


@dataclass(frozen=True)
class Blow:
    """Something that happens to a run, all of it drawn beforehand."""

    number: int
    kind: str
    after: float
    """Seconds since the launch, or since the last blow that the run survived."""
    where: float
    """In [0, 1): which of the processes it hits."""
    pause: float
    """Seconds until SIGCONT."""


def plan_blow(seed: int, number: int, every: tuple[float, float]) -> Blow:
    """Blow `number` of a soak, a function of the arguments alone; each round has every kind once.

    Args:
        seed: of the soak.
        number: from 0.
        every: shortest and longest time between two.
    """
    kinds = list(KINDS)
    keyed_random(seed, "soak round", number // len(kinds)).shuffle(kinds)
    draw = keyed_random(seed, "soak blow", number)
    return Blow(
        number=number,
        kind=kinds[number % len(kinds)],
        after=draw.uniform(*every),
        where=draw.random(),
        pause=draw.uniform(3, 15),
    )


def plan_workers(seed: int, number: int, every: tuple[float, float]) -> int:
    """`data.num_workers` of the launch whose first blow is `number`: 0 to 3, one at least to be hit."""
    kinds = []
    for later in range(number, number + len(KINDS)):
        kinds.append(plan_blow(seed, later, every).kind)
        if kinds[-1] != "pause worker":
            break
    return keyed_random(seed, "soak workers", number).randint(int(bool(NEEDS_WORKER & {*kinds})), 3)


class Job:
    """A run that was launched.

    Args:
        name: of this launch.
        command: of etpp, as `pretrain RECIPE key=value ...`.
        folder: the run's.
        logs: a folder for what it prints.
        num_processes: N.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, logs: Path, num_processes: int
    ) -> None:
        self.name, self.run = name, RunFolder(folder)
        self.logs = logs / name.replace(" ", "-")
        self.logs.mkdir(parents=True)
        self.first_step = newest_step(self.run)
        self._token = f"{os.getpid()}-{name}-{time.time_ns()}"
        # By themselves, ranks and launcher write into one another's lines.
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        launcher += ["--redirects=3", f"--log-dir={self.logs}", "-m", "etpp_ssl"]
        self.started, self._launched = time.monotonic(), time.time()
        with (self.logs / "launcher.txt").open("w") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *launcher, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ, MARK: self._token},
            )

    @property
    def seconds(self) -> float:
        """Since the launch."""
        return time.monotonic() - self.started

    @property
    def exit_code(self) -> int | None:
        """torchrun's, or None while it runs."""
        return self._popen.poll()

    def place(self) -> tuple[int, int]:
        """Step and stage of the newest row of losses; -1 and -1 while this launch has not written one."""
        row = newest_row(self.run.metrics_file)
        # A resumed run cuts the file back to its checkpoint first: what lies beyond is new.
        if row is None or row["step"] <= self.first_step:
            return -1, -1
        new = self.run.metrics_file.stat().st_mtime >= self._launched
        return (row["step"], row["stage"]) if new else (-1, -1)

    def named(self) -> list[tuple[str, psutil.Process]]:
        """Launcher, ranks and data workers with their names."""
        try:
            launcher = psutil.Process(self._popen.pid)
            found = [("launcher", launcher)]
            for rank in launcher.children():
                found += _rank_and_workers(rank)
        except psutil.Error:
            return []
        return sorted(found, key=lambda pair: pair[0])

    def survivors(self) -> list[psutil.Process]:
        """All processes of this launch that are alive, whoever their parent is now."""
        return list(marked(self._token))

    def strike(self, blow: Blow) -> str | None:
        """Deal a blow that ends the run, or pause a worker; returns whom it hit, or None if nobody is there."""
        named = self.named()
        ranks = [pair for pair in named if pair[0].startswith("rank") and "worker" not in pair[0]]
        workers = [pair for pair in named if "worker" in pair[0]]
        pool = {"kill rank": ranks, "kill worker": workers, "pause worker": workers}.get(
            blow.kind, [(name, process) for name, process in named if name == "launcher"]
        )
        if not pool:
            return None
        name, process = pool[int(blow.where * len(pool))]
        try:
            if blow.kind == "kill all":
                self.kill()
            elif blow.kind == "term launcher":
                process.terminate()
            elif blow.kind == "int group":
                os.killpg(process.pid, signal.SIGINT)
            elif blow.kind == "pause worker":
                process.suspend()
                time.sleep(blow.pause)
                process.resume()
            else:
                process.kill()
        except (psutil.Error, ProcessLookupError):
            return None
        return name

    def kill(self) -> None:
        """End all of it at once."""
        # Twice, for what was being started while the first list was made.
        for _ in range(2):
            for process in self.survivors():
                try:
                    process.kill()
                except psutil.Error:
                    continue

    def wait(self, seconds: float) -> tuple[float, list[str]]:
        """Wait until nothing is left of it, at most so long; returns the time and what is left."""
        start = time.monotonic()
        while True:
            ended = self.exit_code is not None
            left = self.survivors() if ended else []
            passed = time.monotonic() - start
            if ended and not left:
                return passed, []
            if passed > seconds:
                return passed, [describe(process) for process in self.survivors()]
            time.sleep(0.05)

    def printed(self) -> dict[str, str]:
        """What the launcher and each rank printed."""
        texts = {"launcher": (self.logs / "launcher.txt").read_text(errors="replace")}
        for file in sorted(self.logs.glob("*/attempt_*/*/std*.log")):
            rank = f"rank {file.parent.name}"
            texts[rank] = texts.get(rank, "") + file.read_text(errors="replace")
        return texts


def _rank_and_workers(rank: psutil.Process) -> list[tuple[str, psutil.Process]]:
    """A child of the launcher with its name and those of its data workers, or nothing for another child."""
    command, number = rank.cmdline(), rank.environ().get("RANK")
    if "etpp_ssl" not in command or number is None:
        return []
    # A forked worker has its parent's command line; a spawned one has multiprocessing's.
    workers = [
        child
        for child in sorted(rank.children(), key=lambda child: child.pid)
        if child.cmdline() == command or any("spawn_main" in word for word in child.cmdline())
    ]
    named = [(f"rank {number} worker {i}", worker) for i, worker in enumerate(workers)]
    return [(f"rank {number}", rank), *named]


def marked(token: str | None = None) -> Iterator[psutil.Process]:
    """Living processes with a mark: that of one launch, or any of this soak's."""
    own = f"{os.getpid()}-"
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            continue
        if alive and (mark == token or (token is None and mark.startswith(own))):
            yield process


def describe(process: psutil.Process) -> str:
    """A process in a few words."""
    try:
        command = " ".join(process.cmdline())[:80]
        return f"{process.pid} (parent {process.ppid()}, {process.status()}) {command}"
    except psutil.Error:
        return f"{process.pid} (has ended since)"


def newest_step(run: RunFolder) -> int:
    """Of the checkpoints, whole or not; -1 without one."""
    return max((checkpoint.step for checkpoint in run.checkpoints()), default=-1)


def newest_row(file: Path) -> dict[str, Any] | None:
    """The last whole row of losses of a metrics file, read from its end."""
    try:
        with file.open("rb") as rows:
            rows.seek(max(0, file.stat().st_size - 8192))
            lines = rows.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return None
