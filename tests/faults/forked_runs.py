"""Runs in processes of their own, cheaply, and killed at a moment that the test names; see `moments.py`.

A server imports torch and the package once, and forks one process per run. Each is a real process: it starts
from what is on disk, and its end is the kernel's doing. Run as a script, this file is the server.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moments
from disks import no_checkpoint_of
from moments import MOMENTS, Moment, disarm

if TYPE_CHECKING:
    from etpp_ssl.train.run import Run

SECONDS = 120
"""After which a run that hangs is ended."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    output: str
    lines: int
    """Of the package, executed by the main thread where they were counted."""


class ForkedRuns:
    """The server, as its client sees it."""

    def __init__(self) -> None:
        import etpp_ssl

        root = str(Path(etpp_ssl.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def run(
        self,
        recipe: Path,
        *overrides: str,
        moment: Moment | None = None,
        clock: bool = False,
    ) -> Ended:
        """Run a recipe, of whatever task, to its end or until the moment.

        Args:
            recipe: its file; the process's output goes beside it.
            overrides: as on the command line.
            moment: when to kill it.
            clock: let time pass with each training step, more at a larger bandwidth, instead of by itself.
        """
        named = None if moment is None else [type(moment).__name__, asdict(moment)]
        return self._ordered(recipe=str(recipe), overrides=overrides, moment=named, clock=clock)[0]

    def run_together(
        self, recipe: Path, *overrides: str, num_processes: int, refused: Sequence[int] = ()
    ) -> list[Ended]:
        """Run a recipe by several processes.

        Args:
            recipe: its file.
            overrides: as on the command line.
            num_processes: how many.
            refused: steps whose checkpoints find the disk full.
        """
        return self._ordered(
            recipe=str(recipe), overrides=overrides, num_processes=num_processes, refused=refused
        )

    def _ordered(self, **order: Any) -> list[Ended]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return [Ended(**ended) for ended in json.loads(self._server.stdout.readline())]

    def close(self) -> None:
        """End the server."""
        self._server.communicate()


def serve() -> None:
    """Fork a process per order on stdin, and say on stdout how it ended."""
    import etpp_ssl.train.launch  # noqa: F401

    # What the imports have made is never collected, so that the processes go on sharing its memory.
    gc.collect()
    gc.freeze()
    for text in sys.stdin:
        order = json.loads(text)
        count = order.get("num_processes", 1)
        folder = Path(order["recipe"]).parent
        places = [folder / f"process-{rank}" for rank in range(count)]
        (folder / "meeting").unlink(missing_ok=True)
        pids = []
        for rank, place in enumerate(places):
            place.with_suffix(".lines").unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                os._exit(_child(order, rank, place))
            pids.append(pid)
        ended = [_ended(pid, place) for pid, place in zip(pids, places, strict=True)]
        print(json.dumps([asdict(one) for one in ended]), flush=True)


def _ended(pid: int, place: Path) -> Ended:
    _, status = os.waitpid(pid, 0)
    lines = place.with_suffix(".lines")
    return Ended(
        code=os.waitstatus_to_exitcode(status),
        output=place.with_suffix(".log").read_text(),
        lines=int(lines.read_text()) if lines.exists() else 0,
    )


def _child(order: dict[str, Any], rank: int, place: Path) -> int:
    with place.with_suffix(".log").open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(SECONDS)
    # A group of its own, which no signal to the tests reaches.
    os.setsid()
    try:
        if order.get("num_processes", 1) > 1:
            _meet(place.with_name("meeting"), rank, order["num_processes"])
        _run(order)
        place.with_suffix(".lines").write_text(str(moments.lines))
        return 0
    except BaseException as error:
        traceback.print_exc()
        return int(getattr(error, "exit_code", 70))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _meet(file: Path, rank: int, count: int) -> None:
    """What torchrun sets, and the processes' first contact through a file instead of a port."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count)


def _run(order: dict[str, Any]) -> None:
    from etpp_ssl.recipe import load_any
    from etpp_ssl.train.launch import launch, open_run

    recipe = load_any(order["recipe"], order["overrides"])
    # Data workers are forked from here, and are not what is killed.
    os.register_at_fork(after_in_child=disarm)
    if order.get("moment") is not None:
        kind, values = order["moment"]
        MOMENTS[kind](**values).arm()
    run = open_run(recipe)
    if order.get("clock"):
        _turn_the_clock(run)
    with no_checkpoint_of(*order.get("refused", ())):
        launch(run)
    disarm()


def _turn_the_clock(run: Run) -> None:
    """Measured speeds, and the plans made of them, are the same for every process then."""
    now = 0.0

    def tick(model: Any, arguments: tuple[Any, ...]) -> None:
        nonlocal now
        if model.training:
            now += arguments[0].shape[-2] / 8

    run.clock = lambda: now
    run.bare_model.register_forward_pre_hook(tick)


if __name__ == "__main__":
    serve()
    os._exit(0)
