"""What every training loop writes: rows of metrics, and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from etpp_ssl.curriculum.base import Stage
from etpp_ssl.engine.checkpoint import save_checkpoint
from etpp_ssl.engine.metrics import Meter
from etpp_ssl.engine.run import BaseRun
from etpp_ssl.engine.state import environment


def log_due(run: BaseRun) -> bool:
    """Every so many steps, and at a segment's last one, so that no row mixes two bandwidths."""
    done = run.state.step
    return done % run.recipe.log_every_steps == 0 or run.curriculum.ends_segment(done)


def log_row(run: BaseRun, stage: Stage, meter: Meter, lr: float) -> None:
    """Write and show losses and speed since the last row; `stage` and `lr` are those of the last step."""
    state, curriculum = run.state, run.curriculum
    speed = meter.row()
    if "loss" not in speed:
        return  # Each step was told of when it was left out.
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
        "skipped_steps": state.num_skipped,
        "num_processes": run.accelerator.num_processes,
        "seconds": state.seconds,
        **speed,
    }
    run.metrics.write(row)
    run.progress.row(row)


def save(run: BaseRun, average: Mapping[str, Tensor] | None = None) -> None:
    """Write a checkpoint of the run as it stands; every process may call it.

    Args:
        run: the run.
        average: a moving average of the model's tensors, where the run keeps one.
    """
    accelerator = run.accelerator
    if accelerator.is_main_process:
        scaler = accelerator.scaler
        save_checkpoint(
            run.folder,
            run.state.step,
            run.bare_model,
            run.optimizer,
            {
                "state": run.state.to_json(),
                "environment": environment(accelerator.num_processes, accelerator.device, run.kernels),
                "data": run.data_fingerprint,
                "classes": run.classes,
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            keep=run.recipe.checkpoint.keep,
            average=average,
        )
