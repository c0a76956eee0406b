"""Masked-autoencoder pre-training under a frequency-cropping curriculum: the loop.

One continuous run. At every optimizer step a pure function says how much of each image's spectrum is
shown; the same low-frequency crop feeds the encoder and the reconstruction target; all parameters stay
at the base resolution. So a stage change is nothing but a different number.

To read the whole method: this file, `curriculum/efficienttrain.py`, `curriculum/frequency.py` and
`model/mae.py`.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.dist.signals import StopRequest
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.checkpoint import CheckpointClock
from etpp_ssl.train.conduct import conduct
from etpp_ssl.train.feed import BadImages, Feed
from etpp_ssl.train.kernels import attention_notes
from etpp_ssl.train.metrics import Meter
from etpp_ssl.train.nonfinite import Guard
from etpp_ssl.train.records import log_due, log_row, save
from etpp_ssl.train.run import Run, open_run, prepare_run
from etpp_ssl.train.time_budget import decide_steps, replan_due, replan_steps


def pretrain(recipe: Recipe, fork: Path | None = None) -> Run:
    """Train to the end of the recipe's budget, from its run folder's newest checkpoint if there is one.

    Args:
        recipe: the run; a finished one is left as it is.
        fork: a run folder to start from instead; see `open_run`.

    Returns:
        The finished run.

    Raises:
        UserError: for a mistake in recipe, data, folder or checkpoint, or a budget in hours that is too
            short.
        RunFault: for a disk, a data worker, another process or a loss that failed on the way.
        Interrupted: after SIGTERM or SIGINT, once the step is finished and its checkpoint is written.
    """
    run = open_run(recipe, fork)
    conduct(run, partial(_prepare, run), partial(_train, run))
    return run


def _prepare(run: Run) -> None:
    decide_steps(run)
    prepare_run(run, attention_notes(run))


def _train(run: Run, stop_request: StopRequest) -> int:
    """Train to the end, or until a signal arrives; returns the signal, or 0."""
    recipe, state, accelerator = run.recipe, run.state, run.accelerator
    model, optimizer, objective = run.model, run.optimizer, run.objective
    meter = Meter(accelerator, state)
    feed = _open_feed(run)
    guard = Guard(run, meter, feed, clip_grad=recipe.optim.clip_grad)
    bad_images = BadImages(state, len(run.source), recipe.data.max_bad_share, run.progress)
    clock = CheckpointClock(recipe.checkpoint)
    model.train()
    run.progress.start(state.step)
    if state.step == 0 and (state.plan is not None or recipe.nonfinite.policy == "rewind"):
        # Measured again after a kill, the speed would give another plan; and a rewind needs a place.
        save(run)

    while not run.finished:
        stage = run.curriculum.stage_at(state.step)
        lr = state.lr_factor * recipe.optim.schedule(stage.batch_size)(stage.progress)
        for group in optimizer.param_groups:
            group["lr"] = lr

        for batch in feed.step():
            bad_images.note(batch)
            images = low_frequency_crop(run.normalise(batch.images), stage.bandwidth)
            mask = run.masker(batch.positions, stage.bandwidth, stage.progress)
            with run.synchronised(batch):
                values, ids_predicted = model(images, mask.ids_keep, mask.ids_predict)
                losses = objective.losses(values, ids_predicted, images)
                loss = losses["loss"] * batch.request.weight
                # DDP averages over the processes; the weights are shares of the global batch.
                accelerator.backward(loss * accelerator.num_processes)
            meter.add(losses, batch.request.weight)

        if guard.passes():
            optimizer.step()
        optimizer.zero_grad()
        meter.step_done(stage.batch_size, feed.wait_seconds)
        run.progress.step(state.step)

        if log_due(run):
            bad_images.share(accelerator)
            log_row(run, stage, meter, lr)
        if _probe_due(run):
            meter.pause(_run_probe(run))
        replanned = replan_due(run)
        if replanned:
            guard.settle()
            meter.synchronise()  # The time of a probe counts, too.
            replan_steps(run)
            # The workers may have prepared batches for steps that have another stage now.
            feed.close()
            feed = guard.feed = _open_feed(run)
        signum, checkpoint_due = run.agreement.reach(stop_request.signum, replanned or clock.due(state.step))
        if checkpoint_due or signum or run.finished:
            guard.settle()
            meter.synchronise()
            save(run, required=bool(signum))
            clock.start()
        if signum:
            return signum
    return 0


def _open_feed(run: Run) -> Feed:
    return run.open_feed(run.curriculum.stage_at, range(run.state.step, run.curriculum.num_steps))


def _probe_due(run: Run) -> bool:
    if run.probe is None:
        return False
    every = run.recipe.probe.every_steps if run.recipe.probe.name != "none" else None
    return run.finished or (every is not None and run.state.step % every == 0)


def _run_probe(run: Run) -> float:
    """Write a row of the probe's numbers; returns the seconds it took."""
    assert run.probe is not None
    start = time.perf_counter()
    numbers = run.probe.run(run.bare_model)
    seconds = time.perf_counter() - start
    run.metrics.write({"step": run.state.step, **numbers, "probe_seconds": seconds})
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    run.progress.say(f"step {run.state.step}: {shown} ({seconds:.0f} s)")
    return seconds
