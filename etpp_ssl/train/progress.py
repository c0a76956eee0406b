"""The live display: a rich progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from etpp_ssl.config import show_size
from etpp_ssl.curriculum.base import Curriculum

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows where a run stands; silent on all processes but the main one.

    The estimated time left assumes that a unit of compute keeps costing what it cost since the last
    row. At small bandwidths a device is used less well, so the estimate shrinks as stages pass.
    """

    def __init__(self, curriculum: Curriculum, *, visible: bool) -> None:
        self.curriculum = curriculum
        """The run's stages, to be replaced when they are planned anew."""
        self.visible = visible
        self.console = Console(stderr=True, quiet=not visible, soft_wrap=True, highlight=False)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._spoke = 0.0
        self._stage = -1
        self._mark: tuple[float, float] | None = None

    def start(self, step: int) -> None:
        """Show the bar, where there is a terminal; again after a rewind, from an earlier step."""
        self.stop()
        self._mark = (time.perf_counter(), self._spent(step))
        if self.visible and self.console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                console=self.console,
            )
            # Compute, not steps: a late step costs several early ones.
            self._task = self._bar.add_task("starting", total=1.0)
            self._bar.update(self._task, completed=self._spent(step))
            self._bar.start()

    def step(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._spent(step))

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        text = self._line(row)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            return
        now, done = time.monotonic(), row["step"] == self.curriculum.num_steps
        if done or row["stage"] != self._stage or now - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke, self._stage = now, row["stage"]
            self.console.print(f"{self._spent(row['step']):6.1%} {text}", markup=False)

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, markup=False)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _spent(self, step: int) -> float:
        return self.curriculum.progress_after(step)

    def _line(self, row: dict[str, Any]) -> str:
        stages = self.curriculum.stages
        return (
            f"stage {row['stage'] + 1}/{len(stages)} B={show_size(tuple(row['bandwidth']))} "
            f"step {row['step']}/{self.curriculum.num_steps} loss {row['loss']:.4f} "
            f"lr {row['lr']:.2e} {row['images_per_second']:.0f} img/s "
            f"wait {row['data_wait_share']:.0%} ETA {self._time_left(row['step'])}"
        )

    def _time_left(self, step: int) -> str:
        now, spent = time.perf_counter(), self._spent(step)
        if self._mark is None or spent <= self._mark[1]:
            return "?"
        pace = (now - self._mark[0]) / (spent - self._mark[1])
        self._mark = (now, spent)
        seconds = round(pace * (1 - spent))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02}:{seconds % 60:02}"
