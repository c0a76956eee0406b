"""`metrics.jsonl`: one object a line, cut back to the checkpoint's step on resume."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from etpp_ssl.engine.state import TrainState
from etpp_ssl.run_folder import RunFolder


class MetricsFile:
    """Appends rows and passes them on to accelerate's trackers; only the main process writes."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator) -> None:
        self.path = folder.metrics_file
        self.folder = folder
        self.accelerator = accelerator

    def cut_back(self, step: int) -> None:
        """Forget rows after `step`: the run goes on from there and writes them again."""
        if not self.path.exists():
            return
        rows = [row for row in self.folder.metrics() if row["step"] <= step]
        aside = self.path.with_suffix(".writing")
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; `row["step"]` counts finished optimizer steps."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self.accelerator.log(numbers, step=row["step"])


class Meter:
    """Loss and speed since the last row, without waiting for the device in between."""

    def __init__(self, accelerator: Accelerator, state: TrainState) -> None:
        self.accelerator = accelerator
        self.state = state
        # The other processes' part of a resumed sum is in the main process's.
        share = 1.0 if accelerator.is_main_process else 0.0
        self._sums = {
            name: torch.tensor(share * value, dtype=torch.float32, device=accelerator.device)
            for name, value in {"loss": state.loss_sum, **state.part_sums}.items()
        }
        self._num_summed = torch.tensor(share * state.loss_steps, device=accelerator.device)
        self._step: dict[str, Tensor] = {}
        self._since = self._noted = time.perf_counter()
        self._images = 0
        self._wait = 0.0

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Take one micro-batch's losses, `loss` among them; `weight` is its share of the global batch."""
        for name, loss in losses.items():
            self._step[name] = self._step.get(name, 0.0) + loss.detach() * weight

    def step_loss(self) -> Tensor:
        """This process's part of the step's loss so far, float32 ()."""
        return self._step["loss"]

    def take(self, bad: Tensor) -> None:
        """Add the step's losses to the sums.

        Args:
            bad: 1.0 for a step that is not finite and counts in no mean, otherwise 0.0.
        """
        for name, loss in self._step.items():
            # A new run learns the names of its losses here.
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(bad > 0, 0.0, loss)
        self._step = {}
        if self.accelerator.is_main_process:
            self._num_summed = self._num_summed + (1.0 - bad)

    def step_done(self, num_images: int, wait_seconds: float) -> None:
        """Count a finished step: images of the global batch, seconds this process waited for data."""
        self.state.step += 1
        self._images += num_images
        self._wait += wait_seconds

    def pause(self, seconds: float) -> None:
        """Leave time out of the speed, for instance that of a probe."""
        self._since += seconds

    def synchronise(self) -> None:
        """Bring the loss sums, over all processes, and the time spent into the state."""
        numbers = torch.stack([*self._sums.values(), self._num_summed])
        *sums_of_all, num_summed = self.accelerator.reduce(numbers, reduction="sum").tolist()
        sums = dict(zip(self._sums, sums_of_all, strict=True))
        self.state.loss_steps = int(num_summed)
        self.state.loss_sum = sums.pop("loss")
        self.state.part_sums = sums
        now = time.perf_counter()
        self.state.elapsed += now - self._noted
        self._noted = now

    def row(self) -> dict[str, float]:
        """Losses and speed since the last row, which start anew; no losses where no step was finite."""
        self.synchronise()
        state = self.state
        sums = {"loss": state.loss_sum, **state.part_sums}
        seconds = time.perf_counter() - self._since
        values = {
            **{name: value / state.loss_steps for name, value in sums.items() if state.loss_steps},
            "images_per_second": self._images / seconds,
            "data_wait_share": min(1.0, self._wait / seconds),
        }
        state.seconds += seconds
        state.loss_sum, state.part_sums, state.loss_steps = 0.0, dict.fromkeys(state.part_sums, 0.0), 0
        for total in (*self._sums.values(), self._num_summed):
            total.zero_()
        self._since, self._images, self._wait = time.perf_counter(), 0, 0.0
        return values
