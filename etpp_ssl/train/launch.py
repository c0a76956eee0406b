"""A training run around its loop: opening it, signals, status, rewinds, and faults as sentences.

Opening resolves a recipe into components, once. Everything is checked before anything is written.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.data.training import TrainingImages
from etpp_ssl.dist.accelerator import StopRequest, open_accelerator, process_as_found
from etpp_ssl.dist.peers import finish_trackers, leave, leave_words, lost_peer, with_peers, words_of
from etpp_ssl.dist.sharding import check_sharded, prepare, sharding_in_use
from etpp_ssl.evaluation.collapse import sign_of_answers
from etpp_ssl.evaluation.measured_on import measured_on
from etpp_ssl.files import flush
from etpp_ssl.model.encoders import unused_weights
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.base import Evaluation, Measured, Task
from etpp_ssl.tasks.classify import Classification, Judge, open_evaluation
from etpp_ssl.tasks.mae import MaskedAutoencoding, build_probe
from etpp_ssl.train.checkpoint import clear_leftovers
from etpp_ssl.train.log import MetricsFile, Progress
from etpp_ssl.train.loop import train
from etpp_ssl.train.memory import check_host_memory, check_replay, freed_memory_kept, replay_notes
from etpp_ssl.train.nonfinite import NonFinite, rewind
from etpp_ssl.train.records import write_status
from etpp_ssl.train.run import Run, weight_average
from etpp_ssl.train.selection import settled
from etpp_ssl.train.start import check_depth, check_room, starting_point, write_plan
from etpp_ssl.train.summary import counted, tell_end, tell_start
from etpp_ssl.train.time_budget import Speed, decide_steps, measure


@process_as_found()
def pretrain(recipe: Recipe, fork: Path | None = None) -> Run:
    """Pre-train to the end of the budget, from the run folder's newest checkpoint if there is one.

    Args:
        recipe: the run; a finished one is left as it is.
        fork: a run folder to start from instead; see `etpp_ssl.train.launch.open_run`.

    Returns:
        The finished run.

    Raises:
        UserError: for a mistake in recipe, data, folder or checkpoint, or a budget in hours that is too
            short.
        RunFault: for a disk, a data worker, another process or a loss that failed on the way.
        Interrupted: after SIGTERM or SIGINT, once the step is finished and its checkpoint is written.
    """
    run = open_run(recipe, fork)
    launch(run)
    return run


@process_as_found()
def finetune(recipe: FinetuneRecipe, fork: Path | None = None) -> Run:
    """Train a classifier to the end of the budget; see `pretrain`.

    With `optim.base_lr=auto`, short runs come first; see `etpp_ssl.train.selection.settled`.
    """

    def say(text: str) -> None:
        # Before a run is opened nobody else speaks for the main process.
        if os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr, flush=True)

    run = open_run(settled(recipe, _run_trial, say), fork)
    launch(run)
    return run


def _run_trial(recipe: FinetuneRecipe, features: Path) -> Run:
    run = open_run(recipe, features=features, shown=False)
    launch(run)
    return run


def launch(run: Run) -> None:
    """Train a run to its end; a finished one is left as it is.

    Args:
        run: as it was opened.

    Raises:
        UserError, RunFault, Interrupted: see `pretrain`.
    """
    # To the very end: torchrun sends SIGTERM to those that are left when one process has failed, and they
    # still have to say so.
    with StopRequest() as stop_request:
        with with_peers():
            run.check_agreement()
        if run.finished:
            tell_end(run)
            leave(run.accelerator)
            return
        try:
            with freed_memory_kept(run.accelerator.device):
                decide_steps(run)
                prepare_run(run)
                write_status(run, "running")
                signum = _train_through(run, stop_request)
        except Exception as error:
            told = error if isinstance(error, UserError) else lost_peer(error) or error
            leave_words(told)
            exit_code = told.exit_code if isinstance(told, UserError) else 1
            write_status(run, "failed", exit_code=exit_code, message=words_of(told))
            if told is error:
                raise
            raise told from error
        else:
            interrupted = None if run.finished else Interrupted(signum, run.state.step)
            if interrupted is None:
                write_status(run, "finished", exit_code=0)
                run.progress.stop()
                tell_end(run)
            else:
                write_status(run, "stopped", exit_code=interrupted.exit_code, message=str(interrupted))
                run.progress.say(f"etpp: {interrupted}; the same command resumes")
        finally:
            run.progress.stop()
            run.lock.release()
            finish_trackers(run.accelerator)
        leave(run.accelerator)
    if interrupted is not None:
        raise interrupted


def _train_through(run: Run, stop_request: StopRequest) -> int:
    while True:
        try:
            return train(run, stop_request)
        except NonFinite as fault:
            if not fault.rewinds:
                raise
            rewind(run, fault)
        finally:
            if run.batches is not None:
                run.batches.close()


@with_peers()
def open_run(
    recipe: Recipe | FinetuneRecipe,
    fork: Path | None = None,
    *,
    features: Path | None = None,
    shown: bool = True,
) -> Run:
    """Open a recipe's run folder: a new run, or the newest checkpoint of the one that is there.

    Nothing is written but features that `model.head=linear` is fitted to; see `prepare_run`.

    Args:
        recipe: the run.
        fork: another run folder to start from: its newest checkpoint's weights, optimizer and step go
            into a new folder under this recipe, whose schedules hold from that step on.
        features: folder where they are kept; None is the run's own.
        shown: whether the run says what it does.

    Raises:
        UserError: for anything wrong with recipe, data, folder or checkpoint.
    """
    accelerator = open_accelerator(recipe)
    source = recipe.open_training()
    other_count = recipe.compare_count(len(source))
    if other_count:
        # Recorded with the run, whose reports and plans count by it where the data is not at hand.
        data = recipe.data.model_copy(update={"num_images": len(source)})
        recipe = recipe.model_copy(update={"data": data})
    recipe = recipe.for_images(len(source)).counted(source)
    curriculum = recipe.build_curriculum(len(source))
    progress = Progress(curriculum, visible=shown and accelerator.is_main_process)
    recipe.check_curriculum(curriculum)
    task, classes = _open_task(recipe, source, accelerator)
    if task.evaluation is not None:
        progress.evaluation = task.evaluation.name
    folder = RunFolder(recipe.output)
    start, state = starting_point(recipe, folder, source, curriculum, fork, progress.say)
    if other_count:
        progress.say(other_count)
    if start is None:
        kept = check_depth(source, recipe.data.reading(recipe.in_chans), recipe.data.stall_seconds)
        if kept:
            progress.say(kept)
    kept_in = features or folder.features_folder
    if start is None:
        _begin(task, recipe, accelerator, kept_in, progress.say)
    if (
        isinstance(task, Classification)
        and isinstance(recipe, FinetuneRecipe)
        and recipe.evaluate.keep_better
    ):
        task.judge = _judge(task, recipe, accelerator, source.classes, kept_in)
    if state.plan is not None:
        curriculum = progress.curriculum = curriculum.laid_out(state.plan.segments)
    for stage in curriculum.stages:
        if stage.batch_size < accelerator.num_processes:
            raise UserError(
                f"batch_size {stage.batch_size} (stage {stage.index + 1}) is smaller than the "
                f"{accelerator.num_processes} processes; each needs at least one image per step"
            )
    if state.step > curriculum.num_steps:
        raise UserError(
            f"checkpoint of step {state.step} is beyond this recipe's {curriculum.num_steps} steps"
        )
    check_replay(recipe.crop_view(), recipe.in_chans, curriculum, accelerator.num_processes, state.step)
    if accelerator.is_fsdp2:
        check_sharded(
            curriculum.stages,
            micro_batch_size=recipe.micro_batch_size,
            batch_size=recipe.batch_size,
            num_processes=accelerator.num_processes,
            compiled=isinstance(recipe, Recipe) and recipe.model.compiled,
        )
    optimizer = recipe.optim.build(task.net, accelerator.device)
    model, prepared_optimizer, copies = prepare(accelerator, task.model, optimizer)
    average = None
    if isinstance(recipe, FinetuneRecipe) and recipe.optim.ema is not None:
        averaged = task.model if copies is None else copies.parts(task.model)
        average = weight_average(averaged, recipe.optim.ema, warmup=recipe.optim.ema_warmup)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        curriculum=curriculum,
        source=source,
        task=task,
        model=model,
        copies=copies,
        optimizer=prepared_optimizer,
        average=average,
        state=state,
        metrics=MetricsFile(folder, accelerator, progress.say),
        progress=progress,
        kernels=task.kernels + sharding_in_use(accelerator),
        data_fingerprint=source.fingerprint(),
        classes=classes,
    )
    run.check_stream()
    if start is not None:
        run.load(start)
    return run


def _begin(
    task: Task,
    recipe: Recipe | FinetuneRecipe,
    accelerator: Accelerator,
    features: Path,
    say: Callable[[str], None],
) -> None:
    """Give a freshly initialised model the weights that a new run begins with."""
    if recipe.init is not None:
        task.load_init(recipe.init, say)
    if (
        isinstance(task, Classification)
        and isinstance(recipe, FinetuneRecipe)
        and recipe.model.head == "linear"
    ):
        task.fit_head(recipe, accelerator, features, say)


def _judge(
    task: Classification,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    classes: list[str] | None,
    features: Path,
) -> Judge:
    """Compares what a run began with and what came of it on the holdout."""
    on_holdout = recipe.evaluate.model_copy(update={"split": "holdout"})
    images = open_evaluation(
        recipe.model_copy(update={"evaluate": on_holdout}),
        accelerator,
        task.normalise,
        classes,
        task.num_classes,
    )
    assert images is not None

    def began() -> nn.Module:
        def build(model: Callable[[], nn.Module]) -> nn.Module:
            return freshly_initialised(recipe.seed, model)

        anew = bare_task(recipe, accelerator.device, task.num_classes, build)
        _begin(anew, recipe, accelerator, features, lambda _: None)
        return anew.model.to(accelerator.device)

    return Judge(images.right, began)


def bare_task(
    recipe: Recipe | FinetuneRecipe,
    device: torch.device,
    num_classes: int | None,
    build: Callable[[Callable[[], nn.Module]], Any],
) -> MaskedAutoencoding | Classification:
    """A recipe's task with nothing to evaluate.

    Args:
        recipe: of any task.
        device: of the images.
        num_classes: of a classifier; None for a masked autoencoder.
        build: called with a function that builds the model; returns the model.
    """
    if isinstance(recipe, FinetuneRecipe):
        assert num_classes is not None
        return Classification(recipe, build(partial(recipe.build_model, num_classes)), device, num_classes)
    return MaskedAutoencoding(recipe, build(recipe.build_model), device)


def _open_task(
    recipe: Recipe | FinetuneRecipe,
    source: TrainingImages,
    accelerator: Accelerator,
) -> tuple[Task, list[str] | None]:
    """A recipe's task with its evaluation, and the class names of a classifier."""
    num_classes = None
    if isinstance(recipe, FinetuneRecipe):
        num_classes = recipe.num_classes(source.classes)
        source.check_labels(num_classes)

    def build(model: Callable[[], nn.Module]) -> nn.Module:
        check_host_memory(
            recipe.model.name,
            model,
            image_shape=(recipe.in_chans, *recipe.size),
            batch_size=recipe.batch_size,
            micro_batch_size=recipe.micro_batch_size,
        )
        return freshly_initialised(recipe.seed, model)

    task = bare_task(recipe, accelerator.device, num_classes, build)
    if isinstance(recipe, Recipe):
        assert isinstance(task, MaskedAutoencoding)
        probe = build_probe(recipe, accelerator, task.normalise, task.objective)
        if probe is not None:
            how, every = f"probe {recipe.probe.name}", getattr(recipe.probe, "every_steps", None)
            data = measured_on(recipe, "eval", probe.evaluation, [(recipe, None)])
            numbers = probe.run
            task.evaluation = Evaluation(
                "probe", how, lambda model: Measured(numbers(model)), probe.evaluation, data, every
            )
        return task, None
    assert isinstance(task, Classification)
    task.know_counts(source.class_counts(task.num_classes, read=False))
    images = open_evaluation(recipe, accelerator, task.normalise, source.classes, task.num_classes)
    # A stream may not tell class names; its evaluation images may.
    named = source.classes or (images.source.classes if images is not None else None)
    if images is not None:
        result_of = images.run

        def measure(model: nn.Module) -> Measured:
            result = result_of(model)
            return Measured(result.numbers(), sign_of_answers(result.confusion, named or ()))

        task.evaluation = Evaluation(
            "evaluation",
            "accuracy",
            measure,
            images.source,
            measured_on(recipe, recipe.evaluate.split or "eval", images.source, [(recipe, None)]),
            recipe.evaluate.every_steps,
        )
    return task, named or [str(number) for number in range(task.num_classes)]


def prepare_run(run: Run) -> None:
    """Create the folder of a run that is about to train, or bring it back to where the run stands.

    Raises:
        UserError: on all processes, if the disk is too full, the folder cannot be written to, or another
            process trains in it.
    """
    # The other processes may still be reading what the main one is about to change.
    run.accelerator.wait_for_everyone()
    fault = ""
    if run.accelerator.is_main_process:
        try:
            prepare_folder(run)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"output {str(run.folder.path)!r} cannot be written to: {error.strerror or error}"
    fault = run.agreement.main_says(fault)
    if fault:
        raise UserError(fault)
    tell_start(run)
    recipe, stages = run.recipe, run.curriculum.stages
    for note in (
        *recipe.notes,
        *(unused_weights(recipe.model.name, recipe.init) if run.state.step == 0 else ()),
        *replay_notes(recipe.crop_view(), recipe.in_chans, stages),
    ):
        run.progress.say(note)
    if recipe.tracker.name != "none":
        run.accelerator.init_trackers(recipe.tracker.project)


def prepare_folder(run: Run) -> None:
    """The main process's part of `prepare_run`.

    Raises:
        OSError: if the folder cannot be written to.
        UserError: for what else keeps the run from it.
    """
    folder, state = run.folder, run.state
    run.lock.acquire()
    clear_leftovers(folder, state.step)
    # The optimizer keeps two moments of what is trained.
    num_values = sum(p.numel() * (3 if p.requires_grad else 1) for p in run.bare_model.parameters())
    check_room(folder, run.recipe.checkpoint.keep, num_values)
    # First, since it makes a folder a run.
    run.recipe.save(folder.recipe_file)
    run.lock.acquire()
    folder.checkpoint_folder.mkdir(exist_ok=True)
    run.metrics.cut_back(state.step)
    write_plan(folder, state.plan)
    flush(folder.path)


@process_as_found()
@with_peers()
def measured_speed(recipe: Recipe | FinetuneRecipe) -> Speed:
    """How fast a recipe's run is here. It is opened anew, and leaves nothing; every process must call it.

    Raises:
        UserError: for anything that keeps the run from starting.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        run = open_run(_without_choices(recipe).model_copy(update={"output": nowhere}))
        evaluation = f" and one {run.task.evaluation.how}" if run.task.evaluation is not None else ""
        run.progress.say(f"measuring {counted(len(run.curriculum.stages), 'stage')}{evaluation} ...")
        with freed_memory_kept(run.accelerator.device):
            speed = measure(run)
        leave(run.accelerator)
    return speed


def _without_choices(recipe: Recipe | FinetuneRecipe) -> Recipe | FinetuneRecipe:
    """A recipe whose run starts at once, and is as fast."""
    if isinstance(recipe, Recipe):
        return recipe
    evaluate = recipe.evaluate.model_copy(update={"keep_better": False})
    model = recipe.model.model_copy(update={"head": "random"})
    return recipe.model_copy(update={"evaluate": evaluate, "model": model})
