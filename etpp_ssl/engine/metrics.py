"""`metrics.jsonl`: one object a line, cut back to the checkpoint's step on resume."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from etpp_ssl.config import UserError
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
        self._since = self._noted = time.perf_counter()
        self._images = 0
        self._wait = 0.0

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Take one micro-batch's losses, `loss` among them; `weight` is its share of the global batch."""
        for name, loss in losses.items():
            # A new run learns the names of its losses here.
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach() * weight

    def step_done(self, num_images: int, wait_seconds: float) -> None:
        """Count a finished step: images of the global batch, seconds this process waited for data."""
        self.state.step += 1
        self.state.loss_steps += 1
        self._images += num_images
        self._wait += wait_seconds

    def pause(self, seconds: float) -> None:
        """Leave time out of the speed, for instance that of a probe."""
        self._since += seconds

    def synchronise(self) -> None:
        """Bring the loss sums, over all processes, and the time spent into the state.

        Raises:
            UserError: on every process, if it is not finite.
        """
        total: Tensor = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
        sums = dict(zip(self._sums, total.tolist(), strict=True))
        self.state.loss_sum = sums.pop("loss")
        self.state.part_sums = sums
        now = time.perf_counter()
        self.state.elapsed += now - self._noted
        self._noted = now
        if not math.isfinite(self.state.loss_sum):
            first = self.state.step - self.state.loss_steps + 1
            raise UserError(
                f"the loss is {self.state.loss_sum} after steps {first} to {self.state.step}; the last "
                f"checkpoint is from before: lower optim.base_lr, set optim.clip_grad=1.0, or use "
                f"precision=bf16 or fp32"
            )

    def row(self) -> dict[str, float]:
        """Losses and speed since the last row, which start anew."""
        self.synchronise()
        state = self.state
        sums = {"loss": state.loss_sum, **state.part_sums}
        seconds = time.perf_counter() - self._since
        values = {
            **{name: value / state.loss_steps for name, value in sums.items()},
            "images_per_second": self._images / seconds,
            "data_wait_share": min(1.0, self._wait / seconds),
        }
        state.seconds += seconds
        state.loss_sum, state.part_sums, state.loss_steps = 0.0, dict.fromkeys(state.part_sums, 0.0), 0
        for total in self._sums.values():
            total.zero_()
        self._since, self._images, self._wait = time.perf_counter(), 0, 0.0
        return values
