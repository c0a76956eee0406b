"""Starts the processes of a run without paying for their imports each time.

A server that has imported everything forks one child for each rank, as often as it is asked. A child is a
process like any other: its own group, its own output, `etpp` from the first line to the last. Only the
interpreter is not taken down; that is for the tests with torchrun. Nobody sends SIGTERM when one has died,
as torchrun's agent does: these are ranks as srun starts them.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from select import select
from typing import NoReturn

LONG = 120.0
"""Seconds after which a test gives up; far more than anything takes."""


class Rank:
    """A process that was started."""

    def __init__(self, server: Server, pid: int, output: Path) -> None:
        self.server = server
        self.pid = pid
        self.output = output

    @property
    def text(self) -> str:
        """What it has written to stdout and stderr so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.server.codes().get(self.pid)

    def wait(self, seconds: float = LONG) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            assert time.monotonic() < deadline, f"process {self.pid} still runs: {self.text}"
            time.sleep(0.02)
        return self.code

    def send(self, signum: int) -> None:
        """A signal, unless it has ended."""
        if self.code is None:
            os.kill(self.pid, signum)

    def wait_for(self, words: str, count: int = 1) -> None:
        """Until it has said the words so many times."""
        deadline = time.monotonic() + LONG
        while self.text.count(words) < count:
            assert self.code is None, f"process ended with {self.code}: {self.text}"
            assert time.monotonic() < deadline, f"process {self.pid} never said {words!r}: {self.text}"
            time.sleep(0.01)


class Server:
    """Forks ranks; see above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._codes: dict[int, int] = {}
        self._job = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # The level as `etpp` sets it in one of several processes: here torch is loaded before.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    def start(
        self,
        arguments: Sequence[str] | None,
        count: int,
        *,
        before: str = "",
        env: Mapping[str, str] | None = None,
    ) -> list[Rank]:
        """Start `etpp` with the arguments in so many processes.

        Args:
            arguments: of the command line; None runs nothing but `before`.
            count: processes; with one of them it is not a distributed run at all.
            before: Python that each runs first; `rank` is its number.
            env: what else to put into their environments.
        """
        port = free_port()
        return [self._start(arguments, rank, count, port, before, dict(env or {})) for rank in range(count)]

    def start_torchrun(self, arguments: Sequence[str] | None, *, before: str = "") -> Rank:
        """Start the agent of `torchrun --standalone --nproc_per_node=2`, which starts two ranks.

        Args:
            arguments: of the command line of each; None runs nothing but `before`.
            before: Python that each runs first; `rank` is its number.
        """
        agent = AGENT.format(arguments=arguments and list(arguments), before=before)
        return self.start(None, 1, before=agent)[0]

    def run(self, arguments: Sequence[str] | None, count: int, *, before: str = "") -> list[str]:
        """Start, and wait for success; returns what each has written."""
        ranks = self.start(arguments, count, before=before)
        for rank in ranks:
            assert rank.wait() == 0, "\n".join(f"{other.code}: {other.text}" for other in ranks)
        return [rank.text for rank in ranks]

    def codes(self) -> dict[int, int]:
        """Exit codes of those that have ended, by process id."""
        assert self._job.stdout is not None
        while select([self._job.stdout], [], [], 0)[0]:
            self._read()
        return self._codes

    def close(self) -> None:
        """End the server, and what it still runs."""
        self._job.communicate(timeout=LONG)

    def _start(
        self,
        arguments: Sequence[str] | None,
        rank: int,
        count: int,
        port: int,
        before: str,
        env: dict[str, str],
    ) -> Rank:
        self._count += 1
        output = self.folder / f"{self._count}-rank-{rank}.txt"
        output.touch()
        if count > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        job = {
            "arguments": arguments and list(arguments),
            "rank": rank,
            "before": before,
            "env": env,
            "output": str(output),
        }
        assert self._job.stdin is not None
        self._job.stdin.write(json.dumps(job) + "\n")
        self._job.stdin.flush()
        while (pid := self._read()) is None:
            pass
        return Rank(self, pid, output)

    def _read(self) -> int | None:
        """The id of a process that was started, or None where one has ended."""
        assert self._job.stdout is not None
        pid, code = json.loads(os.read(self._job.stdout.fileno(), LINE))
        if code is None:
            return int(pid)
        self._codes[pid] = code
        return None


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


AGENT = """
import os
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def worker():
    exec({before!r}, {{"rank": int(os.environ["RANK"])}})
    if {arguments!r} is not None:
        from etpp_ssl.cli import main

        main({arguments!r})

elastic_launch(
    LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", max_restarts=0, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    ),
    worker,
)()
"""
"""What torchrun runs, without the time that it takes to start."""
LINE = 32
"""Bytes of a line that the server writes, so that none is read by halves."""


def _tell(pid: int, code: int | None) -> None:
    os.write(1, json.dumps([pid, code]).ljust(LINE - 1).encode() + b"\n")


def _serve() -> None:
    """Fork a child for each line of stdin; write its id, and later its id and exit code."""
    import etpp_ssl.commands.evaluate
    import etpp_ssl.commands.probe
    import etpp_ssl.model.timm_net
    import etpp_ssl.train.launch  # noqa: F401

    # Objects that no child's garbage collector touches stay shared.
    gc.freeze()
    running: set[int] = set()
    while True:
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            running.discard(ended[0])
            _tell(ended[0], os.waitstatus_to_exitcode(ended[1]))
        if not select([0], [], [], 0.02)[0]:
            continue
        line = _line()
        if not line:
            break
        pid = os.fork()
        if not pid:
            _become(**json.loads(line))
        running.add(pid)
        _tell(pid, None)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _line() -> bytes:
    """Unbuffered, because select does not see what a buffer holds."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _become(
    arguments: list[str] | None, rank: int, before: str, env: dict[str, str], output: str
) -> NoReturn:
    os.setpgid(0, 0)
    nothing, written = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_APPEND)
    for target, source in ((0, nothing), (1, written), (2, written)):
        os.dup2(source, target)
    os.environ.update(env)
    from etpp_ssl.cli import main

    code = 0
    try:
        exec(before, {"rank": rank})
        if arguments is not None:
            main(arguments)
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Taking down an interpreter that has imported torch takes as long as a short run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
