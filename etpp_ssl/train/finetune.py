"""Training of classifiers, from a pre-trained encoder or from scratch, under any curriculum: the loop.

The twin of `pretrain.py`: the same stages, order, crop and checkpoints, with labels. Fine-tuning is a run
with `init` and usually `curriculum: constant`; supervised EfficientTrain++ is one without `init`, with
its curriculum and a RandAugment that grows over compute.

Every draw is a function of the seed and the sample's number, so a run is the same for any number of
workers, and resumes to the bit. Two things follow the micro-batch, by their nature: which images are
mixed (partners are of one micro-batch, and it has one ratio), and the statistics of batch norms, which each
process keeps for itself as torch's DDP does. So a run with mixup or batch norms is repeated exactly by the
same number of processes and the same `micro_batch_size` only.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.dist.signals import StopRequest
from etpp_ssl.optim.classifier import set_learning_rate
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.tasks.classify import soft_target_cross_entropy
from etpp_ssl.train.checkpoint import CheckpointClock
from etpp_ssl.train.classifier_run import ClassifierRun, open_classifier_run
from etpp_ssl.train.conduct import conduct
from etpp_ssl.train.feed import BadImages
from etpp_ssl.train.metrics import Meter
from etpp_ssl.train.nonfinite import Guard
from etpp_ssl.train.records import log_due, log_row, save
from etpp_ssl.train.run import prepare_run


def finetune(recipe: FinetuneRecipe, fork: Path | None = None) -> ClassifierRun:
    """Train to the end of the recipe's budget, from its run folder's newest checkpoint if there is one.

    Args:
        recipe: the run; a finished one is left as it is.
        fork: a run folder to start from instead; see `etpp_ssl.train.run.open_run`.

    Returns:
        The finished run.

    Raises:
        UserError: for a mistake in recipe, data, folder or checkpoint.
        RunFault: for a disk, a data worker, another process or a loss that failed on the way.
        Interrupted: after SIGTERM or SIGINT, once the step is finished and its checkpoint is written.
    """
    run = open_classifier_run(recipe, fork)
    conduct(run, partial(prepare_run, run), partial(_train, run))
    return run


def _train(run: ClassifierRun, stop_request: StopRequest) -> int:
    """Train to the end, or until a signal arrives; returns the signal, or 0."""
    recipe, state, accelerator = run.recipe, run.state, run.accelerator
    model, optimizer, average = run.model, run.optimizer, run.average
    meter = Meter(accelerator, state)
    feed = run.open_feed(run.curriculum.stage_at, range(state.step, run.curriculum.num_steps))
    bad_images = BadImages(state, len(run.source), recipe.data.max_bad_share, run.progress)
    guard = Guard(run, meter, feed, clip_grad=recipe.optim.clip_grad)
    clock = CheckpointClock(recipe.checkpoint)
    model.train()
    run.progress.start(state.step)
    if state.step == 0 and recipe.nonfinite.policy == "rewind":
        save(run)

    while not run.finished:
        stage = run.curriculum.stage_at(state.step)
        lr = state.lr_factor * recipe.optim.schedule(stage.batch_size)(stage.progress)
        set_learning_rate(optimizer, lr)

        for batch in feed.step():
            bad_images.note(batch)
            images = low_frequency_crop(run.normalise(batch.images), stage.bandwidth)
            images = run.erase(images, batch.positions)
            images, targets = run.mix(images, batch.labels, batch.first_position)
            with run.synchronised(batch):
                logits = model(images, batch.positions)
                loss = soft_target_cross_entropy(logits, targets)
                # DDP averages over the processes; the weights are shares of the global batch.
                accelerator.backward(loss * batch.request.weight * accelerator.num_processes)
            meter.add({"loss": loss}, batch.request.weight)

        if guard.passes():
            optimizer.step()
        optimizer.zero_grad()
        meter.step_done(stage.batch_size, feed.wait_seconds)
        if average is not None:
            average.update(run.bare_model, state.step)
        run.progress.step(state.step)

        if log_due(run):
            bad_images.share(accelerator)
            log_row(run, stage, meter, lr)
        if _evaluation_due(run):
            meter.pause(_evaluate(run))
        signum, checkpoint_due = run.agreement.reach(stop_request.signum, clock.due(state.step))
        if checkpoint_due or signum or run.finished:
            guard.settle()
            meter.synchronise()
            save(run, required=bool(signum))
            clock.start()
        if signum:
            return signum
    return 0


def _evaluation_due(run: ClassifierRun) -> bool:
    if run.evaluation is None:
        return False
    every = run.recipe.evaluate.every_steps
    return run.finished or (every is not None and run.state.step % every == 0)


def _evaluate(run: ClassifierRun) -> float:
    """Write a row of the evaluation's numbers; returns the seconds it took."""
    assert run.evaluation is not None
    start = time.perf_counter()
    result = run.evaluation.run(run.trained_model())
    seconds = time.perf_counter() - start
    numbers = result.numbers()
    run.metrics.write({"step": run.state.step, **numbers, "evaluation_seconds": seconds})
    shown = ", ".join(
        f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in numbers.items()
        if value is not None
    )
    run.progress.say(f"step {run.state.step}: {shown} ({seconds:.0f} s)")
    return seconds
