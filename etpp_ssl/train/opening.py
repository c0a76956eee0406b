"""Opens a run: a recipe is resolved into components, once, and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.data.training import TrainingImages
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.dist.peers import with_peers
from etpp_ssl.dist.sharding import check_sharded, prepare, sharding_in_use
from etpp_ssl.evaluation.collapse import sign_of_answers
from etpp_ssl.evaluation.measured_on import measured_on
from etpp_ssl.optim.registry import MUON
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.base import Evaluation, Measured, Task
from etpp_ssl.tasks.classify import Classification, Judge, open_evaluation
from etpp_ssl.tasks.mae import MaskedAutoencoding, build_probe
from etpp_ssl.train.log import MetricsFile, Progress
from etpp_ssl.train.memory import check_host_memory, check_replay
from etpp_ssl.train.run import Run, weight_average
from etpp_ssl.train.start import check_depth, starting_point


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
        licence = _begin(task, recipe, accelerator, kept_in, progress.say)
    else:
        licence = RunFolder(start.path.parent.parent).any_recipe().init_licence
    recipe = recipe.model_copy(update={"init_licence": licence})
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
            whole_matrices=recipe.optim.name in MUON,
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
) -> str | None:
    """Give a freshly initialised model the weights that a new run begins with; see `Task.load_init`."""
    licence = task.load_init(recipe.init, say) if recipe.init is not None else None
    if (
        isinstance(task, Classification)
        and isinstance(recipe, FinetuneRecipe)
        and recipe.model.head == "linear"
    ):
        task.fit_head(recipe, accelerator, features, say)
    return licence


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
