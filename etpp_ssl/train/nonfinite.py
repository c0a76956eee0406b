"""A loss or a gradient that is not finite: found on all processes before the optimizer steps."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from etpp_ssl.config import RunFault
from etpp_ssl.files import disk_fault
from etpp_ssl.train.batches import TrainingBatches
from etpp_ssl.train.dump import write_dump
from etpp_ssl.train.log import Meter
from etpp_ssl.train.run import Run

MOST_SKIPS_IN_A_ROW = 10
"""More steps than this without a finite one: the weights themselves are lost."""

on_gradients: list[Callable[[Run, Tensor, Tensor], None]] = []
"""Called, in order, before every optimizer step of every run in this process, with this process's part of the
step's loss and the norm of the gradients, both float32 (). What one raises ends the run."""


class NonFinite(RunFault):
    """A loss or a gradient that is not finite, raised on all processes.

    Args:
        message: what the user is told.
        step: the optimizer step, counted from 0.
        rewinds: whether the run is to go back to its newest checkpoint.
    """

    everywhere = True

    def __init__(self, message: str, step: int, *, rewinds: bool) -> None:
        super().__init__(message)
        self.step = step
        self.rewinds = rewinds


class NonFiniteCheck:
    """Judges every step's loss and gradients, and acts on the recipe's `nonfinite`.

    The verdict is shared by all processes: what one finds, all act on. It is a number on the device. With a
    fused AdamW on a GPU the host does not wait for it: the kernel leaves the update out by itself, and the
    host reads the number one step later. Everywhere else the host reads it before the optimizer steps.
    Under float16 a gradient that is not finite is the loss scaler's business, and only the loss is judged.

    Args:
        run: the run.
        meter: has the step's losses.
        batches: has the step's batches, for a dump.
    """

    def __init__(self, run: Run, meter: Meter, batches: TrainingBatches) -> None:
        self.run = run
        self.meter = meter
        self.batches = batches
        self.scaled = run.accelerator.scaler is not None
        # accelerate wraps the optimizer whose kernel reads `found_inf`.
        self._optimizer: Any = getattr(run.optimizer, "optimizer", run.optimizer)
        fused = isinstance(self._optimizer, torch.optim.AdamW) and bool(self._optimizer.defaults.get("fused"))
        on_device = run.accelerator.device.type == "cuda" and fused and not self.scaled
        self.late = on_device if run.late_verdicts is None else run.late_verdicts
        # A forward pass changes them, whatever the optimizer does then.
        self._statistics = [
            (buffer, buffer.clone())
            for module in run.bare_model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._in_a_row = 0

    def passes(self) -> bool:
        """Clip the gradients; whether the optimizer is to step.

        Raises:
            NonFinite: on all processes, if the run is to stop or to go back.
        """
        step = self.run.state.step
        finite = self._finite()
        # Before the new verdict reaches the optimizer: the weights are still those of the step before.
        self.settle()
        bad = self.meter.take(finite)
        for buffer, before in self._statistics:
            before.copy_(torch.where(bad > 0, before, buffer))
            buffer.copy_(before)
        if not self.late:
            left_out = bool(bad)
            self._act(step, left_out)
            return not left_out
        self._optimizer.found_inf = bad
        on_gpu, arrived = bad.device.type == "cuda", None
        on_host = torch.empty_like(bad, device="cpu", pin_memory=on_gpu).copy_(bad, non_blocking=True)
        if on_gpu:
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = (step, on_host, arrived)
        return True

    def settle(self) -> None:
        """Act on a verdict that was not read yet.

        Raises:
            NonFinite: see `passes`.
        """
        if self._pending is None:
            return
        step, bad, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        self._act(step, bool(bad))

    def _finite(self) -> Tensor:
        """bool (), whether this process finds loss and gradients finite, once the latter are clipped."""
        loss, norm = self.meter.step_loss(), self.run.gradient_norm()
        for hook in on_gradients:
            hook(self.run, loss, norm)
        finite = loss.isfinite()
        return finite if self.scaled else finite & norm.isfinite()

    def _act(self, step: int, bad: bool) -> None:
        if not bad:
            self._in_a_row = 0
            return
        run, config = self.run, self.run.recipe.nonfinite
        self._in_a_row += 1
        samples = run.curriculum.stage_at(step).samples
        what = (
            f"loss or gradients of step {step + 1} (samples {samples.start} to {samples.stop - 1}) are not "
            f"finite"
        )
        if self._in_a_row == 1:
            folder = write_dump(run, step, self.batches.kept.get(step, []))
            if folder is not None:
                what += f"; etpp replay-nan {shlex.quote(str(folder))} shows where"
        if config.policy == "skip" and self._in_a_row <= MOST_SKIPS_IN_A_ROW:
            run.state.num_skipped += 1
            run.progress.say(f"{what}; the step is left out")
            return
        if config.policy == "rewind" and run.state.num_rewinds < config.max_rewinds:
            raise NonFinite(what, step, rewinds=True)
        tried = {
            "stop": "",
            "skip": f"; so were the {MOST_SKIPS_IN_A_ROW} steps before",
            "rewind": f"; so they were after {config.max_rewinds} rewinds",
        }[config.policy]
        raise NonFinite(
            f"{what}{tried}; the newest checkpoint is from before: lower optim.base_lr, set "
            f"optim.clip_grad=1.0, use precision=bf16 or fp32, or choose nonfinite.policy skip or rewind",
            step,
            rewinds=False,
        )


def rewind(run: Run, fault: NonFinite) -> None:
    """Bring a run back to its newest checkpoint, with a lower learning rate; every process must call it.

    The factor is a part of the state, so a run that is killed and resumed keeps it. One that is
    killed before its next checkpoint meets the same step again, and goes back again.

    Args:
        run: the run.
        fault: why.

    Raises:
        UserError: if no checkpoint can be read, or the processes have read different ones.
        RunFault: if the rows after it cannot be removed.
    """
    accelerator, config = run.accelerator, run.recipe.nonfinite
    accelerator.wait_for_everyone()
    checkpoint = run.folder.trained(run.progress.say)
    state = run.load(checkpoint)
    run.optimizer.zero_grad()
    state.num_rewinds = run.state.num_rewinds + 1
    state.lr_factor = run.state.lr_factor * config.lr_factor
    run.state = state
    if state.plan is not None:
        run.curriculum = run.progress.curriculum = run.curriculum.laid_out(state.plan.segments)
    run.check_agreement()
    disk = ""
    if accelerator.is_main_process:
        try:
            run.metrics.cut_back(state.step)
        except OSError as error:
            disk = disk_fault(error) or str(error)
    disk = run.agreement.main_says(disk)
    if disk:
        raise RunFault(f"{fault}; and {str(run.folder.metrics_file)!r} cannot be cut back: {disk}")
    run.progress.say(
        f"{fault}; back to step {state.step} with {state.lr_factor:g} of the learning rate "
        f"(rewind {state.num_rewinds} of {config.max_rewinds})"
    )
