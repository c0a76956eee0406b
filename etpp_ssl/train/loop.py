"""The training loop, of every task.

One continuous run. At every optimizer step a pure function says how much of each image's spectrum is shown;
the task crops to it, and masks or mixes; all parameters stay at the base resolution. So a stage change is
nothing but a different number.

To read the whole method: this file, `tasks/mae.py`, `curriculum/efficienttrain.py` and
`curriculum/frequency.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from etpp_ssl.dist.accelerator import StopRequest
from etpp_ssl.optim.schedules import set_learning_rate
from etpp_ssl.tasks.base import forward_backward
from etpp_ssl.train.batches import BadImages, ImageCounts, TrainingBatches
from etpp_ssl.train.checkpoint import CheckpointClock
from etpp_ssl.train.log import Meter
from etpp_ssl.train.nonfinite import NonFiniteCheck
from etpp_ssl.train.records import evaluate_and_record, evaluation_due, log_due, log_row, save
from etpp_ssl.train.run import Run
from etpp_ssl.train.selection import keep_better
from etpp_ssl.train.time_budget import replan_due, replan_steps

on_step_end: list[Callable[[Run], None]] = []
"""Called, in order, after every optimizer step of every run in this process, before the step's row,
evaluation and checkpoint. `run.state.step` counts the finished steps. What one raises ends the run."""


def train(run: Run, stop_request: StopRequest) -> int:
    """Train to the end, or until a signal arrives.

    Args:
        run: opened and prepared.
        stop_request: notes signals.

    Returns:
        The signal, or 0 at the end.

    Raises:
        NonFinite: on all processes, if a step is not finite and the run is to stop or to rewind.
        RunFault: for a disk, a data worker or another process that failed.
    """
    task, state, accelerator, optimizer = run.task, run.state, run.accelerator, run.optimizer
    meter = Meter(accelerator, state, run.clock)
    batches = _open_batches(run)
    check = NonFiniteCheck(run, meter, batches)
    bad_images = BadImages(state, len(run.source), run.recipe.data.max_bad_share, run.progress)
    counts = ImageCounts(state)
    clock = CheckpointClock(run.recipe.checkpoint)
    first_step = state.step + 1
    run.model.train()
    run.progress.start(state.step)
    if state.step == 0 and (state.plan is not None or run.recipe.nonfinite.policy == "rewind"):
        # Measured again after a kill, the speed would give another plan; and a rewind needs a place.
        save(run)

    while not run.finished:
        stage = run.curriculum.stage_at(state.step)
        lr = run.learning_rate(stage)
        set_learning_rate(optimizer, lr)

        for batch in batches.step():
            bad_images.note(batch)
            counts.note(batch)
            with run.synchronised(batch):
                losses = forward_backward(
                    task, run.model, batch, stage, accelerator.backward, accelerator.num_processes
                )
            meter.add(losses, batch.request.weight)

        if check.passes():
            optimizer.step()
        optimizer.zero_grad()
        meter.step_done(stage.batch_size, batches.wait_seconds)
        if run.average is not None:
            run.average.update(run.bare_model, state.step)
        run.progress.step(state.step)
        for hook in on_step_end:
            hook(run)

        if log_due(run):
            bad_images.share(accelerator.num_processes)
            counts.share(accelerator.num_processes)
            log_row(run, stage, meter, lr)
        elif state.step == first_step:
            # Long before the first row on a slow machine.
            log_row(run, stage, meter, lr, written=False)
        if run.finished:
            meter.pause(keep_better(run))
        if evaluation_due(run):
            meter.pause(evaluate_and_record(run))
        replanned = replan_due(run)
        if replanned:
            check.settle()
            meter.synchronise()  # The time of an evaluation counts, too.
            replan_steps(run)
            # The workers may have prepared batches for steps that have another stage now.
            batches.close()
            batches = check.batches = _open_batches(run)
        signum, checkpoint_due = run.agreement.reach(stop_request.signum, replanned or clock.due(state.step))
        if checkpoint_due or signum or run.finished:
            check.settle()
            meter.synchronise()
            counts.share(accelerator.num_processes)
            save(run, required=bool(signum))
            clock.start()
        if signum:
            return signum
    return 0


def _open_batches(run: Run) -> TrainingBatches:
    return run.open_batches(run.curriculum.stage_at, range(run.state.step, run.curriculum.num_steps))
