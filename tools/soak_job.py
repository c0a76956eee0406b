"""One launch of a run under torchrun: its processes, and what is done to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
from soak_plan import Blow

from etpp_ssl.run_folder import RunFolder

MARK = "ETPP_SOAK"
"""Environment variable by which the processes of a launch are found, orphans included."""

Named = list[tuple[str, psutil.Process]]
Outcome = Literal["ended", "due", "hangs"]


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
        self.first_step = newest_step(self.run)
        self._token = f"{os.getpid()}-{name}-{time.time_ns()}"
        self._logs = logs / name.replace(" ", "-")
        self._logs.mkdir(parents=True)
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        # Into one file, ranks and launcher would write across one another's lines.
        launcher += ["--redirects=3", f"--log-dir={self._logs}", "-m", "etpp_ssl"]
        self._started, self._launched = time.monotonic(), time.time()
        with (self._logs / "launcher.txt").open("w") as output:
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
        return time.monotonic() - self._started

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

    def watch(self, seconds: float | None, stall: float, each_second: Callable[[Job], None]) -> Outcome:
        """Wait until it has ended.

        Args:
            seconds: if given, wait no longer.
            stall: seconds without a new row after which it hangs.
            each_second: called with the job.
        """
        begin, called, last = time.monotonic(), 0.0, self.place()
        moved = begin
        while self.exit_code is None:
            now = time.monotonic()
            if (place := self.place()) != last:
                last, moved = place, now
            if now - moved > stall:
                return "hangs"
            if seconds is not None and now - begin >= seconds:
                return "due"
            if now - called >= 1:
                called = now
                each_second(self)
            time.sleep(0.2)
        return "ended"

    def named(self) -> Named:
        """Launcher, ranks and data workers with their names."""
        try:
            launcher = psutil.Process(self._popen.pid)
            found = [("launcher", launcher)]
            for child in launcher.children():
                found += _rank_and_workers(child)
        except psutil.Error:
            return []
        return sorted(found, key=lambda pair: pair[0])

    def survivors(self) -> list[psutil.Process]:
        """All processes of this launch that are alive, whoever their parent is now."""
        return list(marked(self._token))

    def strike(self, blow: Blow) -> str | None:
        """Deal a blow; returns the name of whom it hit, or None if nobody is there to be hit."""
        named = self.named()
        if blow.kind in ("kill worker", "pause worker"):
            pool = [pair for pair in named if "worker" in pair[0]]
        elif blow.kind == "kill rank":
            pool = [pair for pair in named if pair[0].startswith("rank") and "worker" not in pair[0]]
        else:
            pool = [pair for pair in named if pair[0] == "launcher"]
        if not pool:
            return None
        name, process = pool[int(blow.where * len(pool))]
        try:
            self._hit(blow, process)
        except (psutil.Error, ProcessLookupError):
            return None
        return name

    def _hit(self, blow: Blow, process: psutil.Process) -> None:
        match blow.kind:
            case "kill all":
                self.kill()
            case "kill rank" | "kill worker" | "kill launcher":
                process.kill()
            case "term launcher":
                process.terminate()
            case "int group":
                os.killpg(process.pid, signal.SIGINT)
            case "pause worker":
                process.suspend()
                time.sleep(blow.pause)
                process.resume()

    def kill(self) -> None:
        """End all of it at once."""
        # Twice, for what was being started while the first list was made.
        for _ in range(2):
            kill_each(self.survivors())

    def wait(self, seconds: float) -> tuple[float, list[str]]:
        """Wait until nothing is left of it, at most so long; returns the time and what is left."""
        begin = time.monotonic()
        while True:
            passed = time.monotonic() - begin
            left = self.survivors()
            if not left and self.exit_code is not None:
                return passed, []
            if passed > seconds:
                return passed, [describe(process) for process in left]
            time.sleep(0.05)

    def printed(self) -> dict[str, str]:
        """What the launcher and each rank printed."""
        texts = {"launcher": (self._logs / "launcher.txt").read_text(errors="replace")}
        for file in sorted(self._logs.glob("*/attempt_*/*/std*.log")):
            rank = f"rank {file.parent.name}"
            texts[rank] = texts.get(rank, "") + file.read_text(errors="replace")
        return texts


def _rank_and_workers(child: psutil.Process) -> Named:
    """A child of the launcher and its data workers with their names; nothing for a child that is no rank."""
    command, number = child.cmdline(), child.environ().get("RANK")
    if "etpp_ssl" not in command or number is None:
        return []
    # A forked worker has its parent's command line; a spawned one has multiprocessing's.
    workers = [
        worker
        for worker in sorted(child.children(), key=lambda worker: worker.pid)
        if worker.cmdline() == command or any("spawn_main" in word for word in worker.cmdline())
    ]
    named = [(f"rank {number} worker {index}", worker) for index, worker in enumerate(workers)]
    return [(f"rank {number}", child), *named]


def marked(token: str | None = None) -> Iterator[psutil.Process]:
    """Living processes of one launch, or of all that this program has launched."""
    own = f"{os.getpid()}-"
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            continue
        if alive and (mark == token or (token is None and mark.startswith(own))):
            yield process


def kill_each(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to those that are still there."""
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


def describe(process: psutil.Process) -> str:
    """A process in a few words."""
    try:
        return (
            f"{process.pid} ({process.status()}, parent {process.ppid()}) {' '.join(process.cmdline())[:80]}"
        )
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
