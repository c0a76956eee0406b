"""What a run tells while it trains: `metrics.jsonl`, one object a line, and the display in the terminal.

On resume the file is cut back to the checkpoint's step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text
from torch import Tensor

from etpp_ssl.config import RunFault, show_size
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.evaluation.measured_on import shown_number
from etpp_ssl.files import append_line, disk_fault, flush
from etpp_ssl.run_folder import RunFolder, parse_row
from etpp_ssl.run_state import TrainState


class RowsFault(RunFault):
    """The disk does not take the rows of metrics."""


class MetricsFile:
    """Appends rows and passes them on to accelerate's trackers; only the main process writes.

    Rows that the disk does not take wait in memory and are written, in order, once it does: a full disk is
    reported when it begins and when it ends. `flush` is where it ends a run.

    Args:
        folder: the run's.
        accelerator: the run's.
        say: is told of a disk or a tracker that takes no rows.
    """

    def __init__(
        self, folder: RunFolder, accelerator: Accelerator, say: Callable[[str], None] = print
    ) -> None:
        self.path = folder.metrics_file
        self.accelerator = accelerator
        self.say = say
        self._waiting: list[dict[str, Any]] = []
        self._most_waiting = 0
        self._tracker_failed = False

    def cut_back(self, step: int) -> None:
        """Forget rows after `step`: the run resumes there and writes them again.

        Raises:
            OSError: if the file cannot be shortened.
        """
        self._waiting = [row for row in self._waiting if row["step"] <= step]
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            end = position = 0
            for line in file:
                position += len(line)
                row = parse_row(line) if line.endswith(b"\n") else None
                if row is not None and row["step"] <= step:
                    end = position
            # One call, which no kill cuts in two, and which a full disk allows.
            file.truncate(end)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; `row["step"]` counts finished optimizer steps."""
        if self.accelerator.is_main_process:
            self._waiting.append(row)
            self._write_waiting()
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        try:
            self.accelerator.log(numbers, step=row["step"])
        except OSError as error:
            if not self._tracker_failed:
                self.say(
                    f"warning: the tracker takes no rows from step {row['step']} on: {disk_fault(error)}"
                )
            self._tracker_failed = True

    def flush(self) -> None:
        """See to it that all rows are on the disk, on the main process.

        Raises:
            RowsFault: if they are not.
        """
        reason = self._write_waiting()
        if reason is None and self.path.exists():
            try:
                flush(self.path)
            except OSError as error:
                reason = disk_fault(error)
        if reason is not None:
            raise RowsFault(f"rows could not be written to {str(self.path)!r}: {reason}")

    def _write_waiting(self) -> str | None:
        """Why rows still wait, or None."""
        while self._waiting:
            try:
                append_line(self.path, json.dumps(self._waiting[0]))
            except OSError as error:
                reason = disk_fault(error)
                if not self._most_waiting:
                    self.say(
                        f"warning: rows from step {self._waiting[0]['step']} on wait in memory: "
                        f"{str(self.path)!r} cannot be written: {reason}"
                    )
                self._most_waiting = max(self._most_waiting, len(self._waiting))
                return reason
            del self._waiting[0]
        if self._most_waiting:
            self.say(f"rows are written again, those that waited ({self._most_waiting}) among them")
            self._most_waiting = 0
        return None


class Meter:
    """Loss and speed since the last row, without waiting for the device in between."""

    def __init__(self, accelerator: Accelerator, state: TrainState, clock: Callable[[], float]) -> None:
        self.accelerator = accelerator
        self.clock = clock
        self.state = state
        # Over all processes, step after step, in the order that a resumed run keeps.
        self._sums = {
            name: torch.tensor(value, dtype=torch.float32, device=accelerator.device)
            for name, value in {"loss": state.loss_sum, **state.part_sums}.items()
        }
        self._num_summed = torch.tensor(float(state.loss_steps), device=accelerator.device)
        # Of a row that an older version began, which may have known fewer losses: a mean needs all its steps.
        self._begun = set(self._sums) if state.loss_steps else None
        self._step: dict[str, Tensor] = {}
        self._since = self._noted = self.clock()
        self._images = 0
        self._wait = 0.0

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Take one micro-batch's losses, `loss` among them; `weight` is its share of the global batch."""
        for name, loss in losses.items():
            self._step[name] = self._step.get(name, 0.0) + loss.detach() * weight

    def step_loss(self) -> Tensor:
        """This process's part of the step's loss so far, float32 ()."""
        return self._step["loss"]

    def take(self, finite: Tensor) -> Tensor:
        """Add the step's losses, over all processes, to the sums; every process must call it.

        Args:
            finite: bool (), whether this process finds the step finite.

        Returns:
            float32 (), 1.0 for a step that some process does not find finite and that counts in no mean,
            otherwise 0.0; the same on all processes.
        """
        own = torch.stack([*self._step.values(), (~finite).float()])
        *losses, unfit = self.accelerator.reduce(own, reduction="sum")
        bad: Tensor = (unfit > 0).float()
        for name, loss in zip(self._step, losses, strict=True):
            # A new run learns the names of its losses here.
            if self._begun is not None and name not in self._begun:
                continue
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(bad > 0, 0.0, loss)
        self._num_summed = self._num_summed + (1.0 - bad)
        self._step = {}
        return bad

    def step_done(self, num_images: int, wait_seconds: float) -> None:
        """Count a finished step: images of the global batch, seconds this process waited for data."""
        self.state.step += 1
        self._images += num_images
        self._wait += wait_seconds

    def pause(self, seconds: float) -> None:
        """Leave time out of the speed, for instance that of a probe."""
        self._since += seconds

    def synchronise(self) -> None:
        """Bring the loss sums and the time spent into the state."""
        *values, num_summed = torch.stack([*self._sums.values(), self._num_summed]).tolist()
        sums = dict(zip(self._sums, values, strict=True))
        self.state.loss_steps = int(num_summed)
        self.state.loss_sum = sums.pop("loss")
        self.state.part_sums = sums
        now = self.clock()
        self.state.elapsed += now - self._noted
        self._noted = now

    def row(self, *, anew: bool = True) -> dict[str, float]:
        """Losses and speed since the last row; no losses where no step was finite.

        Args:
            anew: whether sums and time start anew, as after a row that is written.
        """
        self.synchronise()
        state = self.state
        sums = {"loss": state.loss_sum, **state.part_sums}
        seconds = self.clock() - self._since
        values = {
            **{name: value / state.loss_steps for name, value in sums.items() if state.loss_steps},
            "images_per_second": self._images / seconds,
            "data_wait_share": min(1.0, self._wait / seconds),
        }
        if not anew:
            return values
        state.seconds += seconds
        state.loss_sum, state.part_sums, state.loss_steps = 0.0, dict.fromkeys(state.part_sums, 0.0), 0
        for total in (*self._sums.values(), self._num_summed):
            total.zero_()
        self._since, self._images, self._wait = self.clock(), 0, 0.0
        self._begun = None
        return values


SECONDS_BETWEEN_LINES = 5.0


class _TimeLeft(ProgressColumn):
    """The time that training will take; of an evaluation, whose end nobody knows, the time it has taken."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["left"] if task.total is not None else clock(task.elapsed or 0.0))


class Progress:
    """Shows where a run stands; silent on all processes but the main one.

    The estimated time left assumes that a unit of compute keeps costing what it cost since the last
    row. At small bandwidths a device is used less well, so the estimate shrinks as stages pass.
    """

    def __init__(self, curriculum: Curriculum, *, visible: bool) -> None:
        self.curriculum = curriculum
        """The run's stages, to be replaced when they are planned anew."""
        self.visible = visible
        self.evaluation: str | None = None
        """What follows the last step, in one word; its time is not part of the estimate."""
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
            # What a narrow terminal has no room for is cut off the text.
            self._bar = RichProgress(
                BarColumn(bar_width=16 if self.console.width >= 100 else 8),
                TaskProgressColumn(),
                _TimeLeft(Column(no_wrap=True)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1)),
                console=self.console,
                expand=True,
            )
            # Compute, not steps: a late step costs several early ones.
            self._task = self._bar.add_task("starting", total=1.0, left="ETA ?")
            self._bar.update(self._task, completed=self._spent(step))
            self._bar.start()

    def step(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._spent(step))

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        left, text = self._time_left(row["step"]), self._line(row)
        if self._bar is not None:
            self._bar.update(self._task, description=text, left=left)
            return
        now, done = time.monotonic(), row["step"] == self.curriculum.num_steps
        if done or row["stage"] != self._stage or now - self._spoke >= SECONDS_BETWEEN_LINES:
            self._spoke, self._stage = now, row["stage"]
            self.console.print(f"{self._spent(row['step']):6.1%} {left}  {text}", markup=False)

    @contextmanager
    def evaluating(self, step: int) -> Iterator[None]:
        """Show inside that the model is evaluated, and for how long, after `step` steps."""
        what, bar = f"{self.evaluation} after step {step:,}", self._bar
        if bar is None:
            # A log is told once what the silence at the end, or the first one, means.
            if self._spoke == 0.0 or step == self.curriculum.num_steps:
                self.say(f"{what} ...")
            yield
            return
        bar.update(self._task, visible=False)
        evaluation = bar.add_task(what, total=None, left="")
        try:
            yield
        finally:
            bar.remove_task(evaluation)
            bar.update(self._task, visible=True)

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
            f"step {row['step']}/{self.curriculum.num_steps} at {show_size(tuple(row['bandwidth']))} px "
            f"loss {row['loss']:.4f} {_speed(row['images_per_second'])} img/s "
            f"(stage {row['stage'] + 1}/{len(stages)}) lr {row['lr']:.2e} wait {row['data_wait_share']:.0%}"
        )

    def _time_left(self, step: int) -> str:
        now, spent = time.perf_counter(), self._spent(step)
        left = "?"
        if self._mark is not None and spent > self._mark[1]:
            left = clock((now - self._mark[0]) / (spent - self._mark[1]) * (1 - spent))
            self._mark = (now, spent)
        return f"ETA {left}" + (f" + {self.evaluation}" if self.evaluation else "")


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:.0f}" if images_per_second >= 100 else f"{images_per_second:.3g}"


def clock(seconds: float) -> str:
    """A time as `h:mm:ss`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def shown_numbers(numbers: Mapping[str, float | None]) -> str:
    """Named numbers in one line, without those that are None."""
    return ", ".join(
        f"{name} {shown_number(name, value)}" for name, value in numbers.items() if value is not None
    )
