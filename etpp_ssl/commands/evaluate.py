"""Evaluating a classifier that is there already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from etpp_ssl.config import UserError
from etpp_ssl.data.views import Normalise
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.dist.peers import leave, with_peers
from etpp_ssl.evaluation.classification import ClassificationResult
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.tasks.classify import open_evaluation
from etpp_ssl.weights.loading import load_trained


class Evaluated(NamedTuple):
    """What an evaluation found."""

    result: ClassificationResult
    classes: list[str]
    protocol: dict[str, Any]
    """Checkpoint, weights, split and size that the numbers are of."""


@with_peers()
def evaluate_run(recipe: FinetuneRecipe, folder: RunFolder, say: Callable[[str], None]) -> Evaluated:
    """Evaluate a run's newest checkpoint: its moving average, where the run keeps one.

    Args:
        recipe: the run's own, with whatever was overridden (`evaluate.split`, `data.root` ...).
        folder: the run.
        say: told of damaged checkpoints.

    Raises:
        UserError: if there is no checkpoint, the data has other classes, or the model is another.
    """
    if recipe.evaluate.split is None:
        raise UserError("evaluate.split is null; choose a split, for instance evaluate.split=eval")
    checkpoint = folder.trained(say)
    classes = classes_of(checkpoint)
    accelerator = open_accelerator(recipe)
    num_classes = recipe.num_classes(classes)
    model = freshly_initialised(recipe.seed, partial(recipe.build_model, num_classes))
    load_trained(model, checkpoint)
    model.to(accelerator.device)
    mean, std = recipe.data.statistics(recipe.in_chans)
    normalise = Normalise(mean, std, accelerator.device)
    evaluation = open_evaluation(recipe, accelerator, normalise, classes, num_classes)
    assert evaluation is not None
    protocol = {
        "step": checkpoint.step,
        "weights": "moving average" if checkpoint.has_average else "trained",
        "split": recipe.evaluate.split,
        "image_size": list(recipe.size),
        "crop_pct": recipe.data.crop_pct,
        "precision": recipe.precision,
    }
    result = evaluation.run(model)
    leave(accelerator)
    return Evaluated(result, classes, protocol)


def classes_of(checkpoint: Checkpoint) -> list[str]:
    """The class names that a classifier's checkpoint remembers, in the order of its outputs.

    Raises:
        UserError: if it is no classifier's.
    """
    classes = checkpoint.state().get("classes")
    if not classes:
        raise UserError(f"checkpoint {checkpoint.path} is no classifier's: it has no classes")
    return [str(name) for name in classes]
