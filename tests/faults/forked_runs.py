"""Runs in processes of their own, cheaply, and killed at a moment that the test names; see `moments.py`.

The server of `ranks.py` forks one process per run. Each is a real process: it starts from what is on disk,
and its end is the kernel's doing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moments
from disks import no_checkpoint_of
from moments import MOMENTS, Moment, disarm
from ranks import Rank, Server

if TYPE_CHECKING:
    from etpp_ssl.train.run import Run

SECONDS = 120
"""After which a run that hangs is ended."""
PROGRAM = f"""
import json, sys
sys.path.append({str(Path(__file__).parent)!r})
from forked_runs import obey
obey(json.loads({{order!r}}), rank)
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    output: str
    lines: int
    """Of the package, executed by the main thread where they were counted."""


class ForkedRuns:
    """Starts runs by the server, and waits for their ends."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def run(
        self,
        recipe: Path,
        *overrides: str,
        moment: Moment | None = None,
        clock: bool = False,
    ) -> Ended:
        """Run a recipe, of whatever task, to its end or until the moment.

        Args:
            recipe: its file; the lines that are counted go beside it.
            overrides: as on the command line.
            moment: when to kill it.
            clock: let time pass with each training step, more at a larger bandwidth, instead of by itself.
        """
        named = None if moment is None else [type(moment).__name__, asdict(moment)]
        return self._ordered(1, recipe=str(recipe), overrides=overrides, moment=named, clock=clock)[0]

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
        return self._ordered(num_processes, recipe=str(recipe), overrides=overrides, refused=refused)

    def _ordered(self, num_processes: int, **order: Any) -> list[Ended]:
        counted = _lines(order)
        counted.unlink(missing_ok=True)
        ranks = self._server.start(None, num_processes, before=PROGRAM.format(order=json.dumps(order)))
        return [_ended(rank, counted) for rank in ranks]


def _lines(order: dict[str, Any]) -> Path:
    return Path(order["recipe"]).with_suffix(".lines")


def _ended(rank: Rank, counted: Path) -> Ended:
    code = rank.wait()
    return Ended(code, rank.text, int(counted.read_text()) if counted.exists() else 0)


def obey(order: dict[str, Any], rank: int) -> None:
    """Run in this process, which ends with the run's exit code.

    Args:
        order: what `ForkedRuns` has been asked for.
        rank: the process's number.
    """
    signal.alarm(SECONDS)
    try:
        _run(order)
        if rank == 0:
            _lines(order).write_text(str(moments.lines))
    except Exception as error:
        traceback.print_exc()
        sys.exit(int(getattr(error, "exit_code", 70)))


def _run(order: dict[str, Any]) -> None:
    from etpp_ssl.recipe import load_any
    from etpp_ssl.train.launch import launch
    from etpp_ssl.train.opening import open_run

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
