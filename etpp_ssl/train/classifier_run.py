"""Opening a run that trains a classifier: everything is checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.data.augmentation import Mixup, RandomErasing
from etpp_ssl.data.sources.splits import check_labels, check_same_classes, open_split
from etpp_ssl.data.training import TrainingImages
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.dist.fsdp import prepare, sharding_in_use
from etpp_ssl.dist.peers import with_peers
from etpp_ssl.evaluation.classification import ClassifierEvaluation
from etpp_ssl.model.classifier import Classifier
from etpp_ssl.randomness import derive_key
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.base_run import BaseRun
from etpp_ssl.train.checkpoint import load_checkpoint
from etpp_ssl.train.ema import WeightAverage
from etpp_ssl.train.memory import check_host_memory
from etpp_ssl.train.metrics import MetricsFile
from etpp_ssl.train.progress import Progress
from etpp_ssl.train.run import check_start, crop_view, open_training_images, restore
from etpp_ssl.train.start import starting_point
from etpp_ssl.weights.loading import load_classifier_init


@dataclass(kw_only=True)
class ClassifierRun(BaseRun):
    """A run that trains a classifier."""

    recipe: FinetuneRecipe
    bare_model: Classifier
    erase: RandomErasing
    mix: Mixup
    average: WeightAverage | None
    evaluation: ClassifierEvaluation | None

    def trained_model(self) -> nn.Module:
        """What is evaluated and exported: the moving average, where there is one; a copy if it is sharded.

        Batch norms' statistics are each process's own; here all processes get the main one's, which are
        those that a checkpoint holds. Every process must call it.
        """
        model: nn.Module = self.bare_model if self.average is None else self.average.model
        if self.copies is not None:
            model = self.copies.whole(model)
        for buffer in model.buffers():
            broadcast(buffer)
        return model


@with_peers()
def open_classifier_run(recipe: FinetuneRecipe, fork: Path | None = None) -> ClassifierRun:
    """Open a recipe's run folder: a new run, or the newest checkpoint of the one that is there.

    Nothing is written; see `etpp_ssl.train.run.prepare_run`.

    Args:
        recipe: the run.
        fork: see `etpp_ssl.train.run.open_run`.

    Raises:
        UserError: for anything wrong with recipe, data, folder or checkpoint.
    """
    accelerator = open_accelerator(recipe)
    source = open_training_images(recipe)
    num_classes = recipe.num_classes(source.classes)
    source.check_labels(num_classes)
    curriculum = recipe.build_curriculum(len(source))
    progress = Progress(curriculum, visible=accelerator.is_main_process)
    check_sizes(recipe, curriculum)
    check_host_memory(recipe, partial(recipe.build_model, num_classes))
    model = new_classifier(recipe, num_classes)
    kernels = f"attention {recipe.model.attention}" + sharding_in_use(accelerator)
    mean, std = recipe.data.statistics(recipe.in_chans)
    normalise = Normalise(mean, std, accelerator.device)
    evaluation = open_evaluation(recipe, accelerator, normalise, source.classes, num_classes)
    folder = RunFolder(recipe.output)
    start, state = starting_point(recipe, folder, source, curriculum, fork, progress.say)
    if recipe.init is not None and start is None:
        load_classifier_init(model.net, recipe.init, progress.say)
    check_start(recipe, source, curriculum, state, accelerator.num_processes)
    optimizer = recipe.optim.build(model.net, accelerator.device)
    prepared, prepared_optimizer, copies = prepare(accelerator, recipe, curriculum, model, optimizer)
    average = None
    if recipe.optim.ema is not None:
        averaged = model if copies is None else copies.parts(model)
        average = WeightAverage(averaged, recipe.optim.ema, warmup=recipe.optim.ema_warmup)
    if start is not None:
        saved = load_checkpoint(start, model, optimizer)
        if average is not None:
            average.load_state_dict(start.average() or {}, f"moving average of {start.path}")
        restore(accelerator, saved, kernels, progress)
    return ClassifierRun(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        curriculum=curriculum,
        source=source,
        view=recipe.augment.build_view(crop_view(recipe), mean),
        normalise=normalise,
        erase=recipe.augment.build_erasing(recipe.seed),
        mix=recipe.augment.build_mixup(num_classes, recipe.seed),
        model=prepared,
        bare_model=model,
        copies=copies,
        optimizer=prepared_optimizer,
        average=average,
        evaluation=evaluation,
        state=state,
        metrics=MetricsFile(folder, accelerator, progress.say),
        progress=progress,
        kernels=kernels,
        classes=class_names(source, evaluation, num_classes),
        num_classes=num_classes,
        data_fingerprint=source.fingerprint(),
    )


def class_names(
    source: TrainingImages, evaluation: ClassifierEvaluation | None, num_classes: int
) -> list[str]:
    """Names for the classes of a run: a stream without any takes its evaluation images', or numbers."""
    named = source.classes or (evaluation.source.classes if evaluation is not None else None)
    return named or [str(number) for number in range(num_classes)]


def check_sizes(recipe: FinetuneRecipe, curriculum: Curriculum) -> None:
    """See that the recipe's model can be trained at every stage's bandwidth.

    Raises:
        UserError: if it cannot.
    """
    recipe.model.check(
        image_size=recipe.size,
        in_chans=recipe.in_chans,
        bandwidths=[stage.bandwidth for stage in curriculum.stages],
    )


def new_classifier(recipe: FinetuneRecipe, num_classes: int) -> Classifier:
    """A recipe's model with the weights that its seed gives.

    Args:
        recipe: the run.
        num_classes: of the model.

    Raises:
        UserError: for a model that timm does not know.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(recipe.seed, "init") >> 1)
        return recipe.build_model(num_classes)


def open_evaluation(
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    normalise: Normalise,
    classes: list[str] | None,
    num_classes: int,
) -> ClassifierEvaluation | None:
    """The evaluation of a run's classifier, or None where the recipe wants none.

    Args:
        recipe: the run.
        accelerator, normalise: of the run.
        classes: names of the training data's classes, None where it does not tell them.
        num_classes: of the model.

    Raises:
        UserError: if there are no evaluation images, or they have other classes.
    """
    if recipe.evaluate.split is None:
        return None
    source = open_split(
        recipe.data,
        recipe.evaluate.split,
        in_chans=recipe.in_chans,
        image_size=recipe.size,
        seed=recipe.seed,
    )
    if classes is not None:
        check_same_classes(classes, source.classes)
    check_labels(source, num_classes)
    return ClassifierEvaluation(
        source=source,
        view=EvalView(recipe.size, recipe.data.crop_pct),
        normalise=normalise,
        accelerator=accelerator,
        num_workers=recipe.data.num_workers,
        stall_seconds=recipe.data.stall_seconds,
        num_classes=num_classes,
        config=recipe.evaluate,
    )
