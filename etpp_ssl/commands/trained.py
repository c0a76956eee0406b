"""The trained model that `probe`, `embed` and `evaluate` take: a run's, or a recipe's with other weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.evaluation.measured_on import Training
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.weights.loading import load_classifier_init, load_init, load_trained


class Trained(NamedTuple):
    """A model with weights."""

    model: nn.Module
    """On the CPU; its `encoder` is a timm network, a classifier's with its head."""
    weights: dict[str, Any]
    """For a record: `step` and `weights` (their moving average, or not) of a run, or `init`."""
    source: str
    """The checkpoint's folder, or `init`."""
    trainings: list[Training]
    """What the weights were trained on, as far as it is known."""
    classes: list[str]
    """Of a run's classifier."""


def trained_model(
    recipe: Recipe | FinetuneRecipe, folder: RunFolder | None, say: Callable[[str], None]
) -> Trained:
    """The model of a run's newest checkpoint, or a recipe's with the weights that its `init` names.

    Args:
        recipe: the run's own, with overrides.
        folder: the run; None takes `init`.
        say: told of damaged checkpoints, and of what becomes of other weights.

    Raises:
        UserError: if there are no weights, or they do not fit the recipe's model.
    """
    if folder is not None:
        checkpoint = folder.trained(say)
        classes = checkpoint.classes()
        model = untrained_model(recipe, classes or None)
        load_trained(model, checkpoint)
        weights = {
            "step": checkpoint.step,
            "weights": "moving average" if checkpoint.has_average else "trained",
        }
        return Trained(model, weights, str(checkpoint.path), [_training(folder, checkpoint)], classes)
    if recipe.init is None:
        raise UserError("there are no weights: give the folder of a run, or init=WEIGHTS with the recipe")
    if isinstance(recipe, FinetuneRecipe):
        model = untrained_model(recipe, recipe.open_split("train").classes)
        load_classifier_init(model.encoder, recipe.init, say)
    else:
        model = untrained_model(recipe, None)
        load_init(model, recipe.init, say)
    origin = RunFolder(Path(recipe.init).expanduser())
    trainings = [_training(origin, origin.trained(say))] if origin.exists() else []
    return Trained(model, {"init": recipe.init}, recipe.init, trainings, [])


def untrained_model(recipe: Recipe | FinetuneRecipe, classes: list[str] | None) -> Any:
    """The recipe's model with its initial weights, on the CPU; `classes` are those of a classifier."""

    def build() -> nn.Module:
        if isinstance(recipe, FinetuneRecipe):
            return recipe.build_model(recipe.num_classes(classes))
        return recipe.build_model()

    return freshly_initialised(recipe.seed, build)


def _training(run: RunFolder, checkpoint: Checkpoint) -> Training:
    return run.any_recipe(), checkpoint.state().get("data")
