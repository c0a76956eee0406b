"""What a run writes: rows of metrics and evaluations, checkpoints, and `status.json`."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import UTC, datetime
from typing import Literal

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.curriculum.base import Stage
from etpp_ssl.evaluation.collapse import Sign, is_due, sign_of_loss
from etpp_ssl.evaluation.measured_on import training_mark
from etpp_ssl.files import write_text
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.tasks.classify import collapse_of
from etpp_ssl.train.batches import gather_streams
from etpp_ssl.train.checkpoint import checkpoint_files, what_is_left, write_checkpoint
from etpp_ssl.train.log import Meter, RowsFault, shown_numbers
from etpp_ssl.train.run import Run

RunState = Literal["running", "stopped", "finished", "failed"]


def log_due(run: Run) -> bool:
    """Every so many steps, and at a segment's last one, so that no row mixes two bandwidths."""
    done = run.state.step
    return done % run.recipe.log_every_steps == 0 or run.curriculum.ends_segment(done)


def log_row(run: Run, stage: Stage, meter: Meter, lr: float, *, written: bool = True) -> None:
    """Write and show losses and speed since the last row.

    Args:
        run, meter: of the training.
        stage, lr: those of the last step.
        written: whether the row is, and ends what the next one is about; otherwise it is only shown.
    """
    state, curriculum = run.state, run.curriculum
    speed = meter.row(anew=written)
    if "loss" not in speed:
        return  # Each step was reported when it was left out.
    epochs = curriculum.equivalent_epochs_after(state.step)
    row = {
        "step": state.step,
        "loss": speed.pop("loss"),
        "lr": lr,
        "stage": stage.index,
        "bandwidth": list(stage.bandwidth),
        "batch_size": stage.batch_size,
        "equivalent_epochs": epochs,
        "images_seen": stage.slots.stop,
        "images_loaded": stage.samples.stop,
        "bad_images": len(state.bad_images),
        **({"images_outside_range": state.num_outside} if state.num_outside else {}),
        **({"images_without_data": state.num_without_data} if state.num_without_data else {}),
        "skipped_steps": state.num_skipped,
        "num_processes": run.accelerator.num_processes,
        "seconds": state.seconds,
        **speed,
    }
    if written:
        if "frequency_loss" in row:
            row |= _collapse(run, sign_of_loss(row["loss"], row["frequency_loss"]))
        run.metrics.write(row)
        run.newest["loss"] = row["loss"]
    run.progress.row(row)


def evaluation_due(run: Run) -> bool:
    """At the run's end, and every so many steps where the recipe says so."""
    evaluation = run.task.evaluation
    if evaluation is None:
        return False
    every = evaluation.every_steps
    return run.finished or (every is not None and run.state.step % every == 0)


def evaluate_and_record(run: Run) -> float:
    """Write a row of the task's evaluation; returns the seconds it took."""
    evaluation = run.task.evaluation
    assert evaluation is not None
    start = time.perf_counter()
    with run.progress.evaluating(run.state.step):
        numbers, sign = evaluation.run(run.trained_model())
    seconds = time.perf_counter() - start
    run.newest |= numbers
    row = {"step": run.state.step, **numbers, f"{evaluation.name}_seconds": seconds}
    collapse = _collapse(run, sign)
    run.metrics.write({**row, **collapse, "data": evaluation.data})
    mark = training_mark(evaluation.data)
    on = f" on {mark}" if mark else ""
    run.progress.say(f"step {run.state.step}: {shown_numbers(numbers)}{on} ({seconds:.0f} s)")
    return seconds


def _collapse(run: Run, sign: Sign | None) -> dict[str, str]:
    """What a row says of a classifier's collapse; the first of each kind is told, too."""
    recipe, step, curriculum = run.recipe, run.state.step, run.curriculum
    if sign is None or not isinstance(recipe, FinetuneRecipe):
        return {}
    progress = curriculum.progress_after(step)
    if not is_due(step, curriculum.num_steps, progress, recipe.optim.warmup_share):
        return {}
    sentence = collapse_of(recipe, sign, curriculum.num_steps)
    if sign.kind not in run.collapses:
        run.collapses.add(sign.kind)
        run.progress.say(f"warning: step {step}: {sentence}")
    return {"collapse": sentence}


def save(run: Run, *, required: bool = False) -> bool:
    """Write a checkpoint of the run as it stands; every process must call it.

    Only the main process writes. Whether it could, all processes learn here, and all act alike.

    Args:
        run: the run.
        required: whether the run ends without it, whatever `checkpoint.on_error` says, as at
            the run's end.

    Returns:
        Whether it is written.

    Raises:
        RunFault: on all processes, if it is not written and the run ends for it.
    """
    is_main = run.accelerator.is_main_process
    average = None if run.average is None else run.average.module.state_dict()
    files = checkpoint_files(run.bare_model, run.optimizer, average, keep=is_main)
    gather_streams(run.accelerator, run.state)
    fault = ""
    if is_main:
        try:
            # A resumed run writes no row of before its checkpoint again.
            run.metrics.flush()
            scaler = run.accelerator.scaler
            content = {
                "state": run.state.to_json(),
                "environment": run.environment,
                "data": run.data_fingerprint,
                "classes": run.classes,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            keep = run.recipe.checkpoint.keep
            write_checkpoint(run.folder, run.state.step, files, content, keep=keep)
        except RowsFault as error:
            step, left = run.state.step, what_is_left(run.folder)
            fault = f"checkpoint of step {step} could not be written, since {error}; {left}"
        except RunFault as error:
            fault = str(error)
    fault = run.agreement.main_says(fault)
    if not fault:
        write_status(run, "running")
        return True
    if required or run.finished or run.recipe.checkpoint.on_error == "stop":
        ending = RunFault(fault)
        ending.everywhere = True
        raise ending
    run.progress.say(f"warning: {fault}; training continues, and the next checkpoint tries again")
    return False


def write_status(run: Run, state: RunState, *, exit_code: int | None = None, message: str = "") -> None:
    """Say in the run folder how the run stands; only the main process writes, and only where it trains.

    `stopped` means that it was asked to stop and that its checkpoint is written: the same command resumes.
    torchrun turns the exit code 75 of its processes into its own 1, so a script looks here. The step of a
    `running` run is that of its start or of its newest checkpoint; if its process (`host`, `pid`) is gone, it
    was killed.

    Args:
        run: the run.
        state: how it stands.
        exit_code: of its processes, where it has ended.
        message: what the user was told last.
    """
    if not run.accelerator.is_main_process or not run.lock.held:
        return
    values = {
        "state": state,
        "step": run.state.step,
        "num_steps": run.curriculum.num_steps,
        "exit_code": exit_code,
        "message": message,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_processes": run.accelerator.num_processes,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    try:
        write_text(run.folder.status_file, json.dumps(values, indent=1) + "\n")
    except UserError as error:
        # A full disk ends no run here: the checkpoint's own error says more.
        run.progress.say(f"warning: {error}")
