"""`etpp evaluate`: the accuracy of a trained classifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etpp_ssl.commands.trained import trained_model
from etpp_ssl.config import UserError
from etpp_ssl.data.sources.splits import TRAINING
from etpp_ssl.dist.accelerator import open_accelerator, process_as_found
from etpp_ssl.dist.peers import leave, with_peers
from etpp_ssl.evaluation.classification import ClassificationResult
from etpp_ssl.evaluation.collapse import sign_of_answers
from etpp_ssl.evaluation.measured_on import measured_on, without_looking
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.recipe_base import task_of
from etpp_ssl.recipe_file import RecipeText
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.classify import collapse_of, open_evaluation

BESIDE_THE_RESULT: dict[str, Any] = {
    "output": True,
    "evaluate": {"split", "every_steps", "batch_size"},
    "data": {"num_images", "strict", "num_workers", "prefetch", "stall_seconds", "description"},
}
"""Keys that may be overridden without making another evaluation of it."""


class Evaluated(NamedTuple):
    """The result of an evaluation."""

    result: ClassificationResult
    classes: list[str]
    protocol: dict[str, Any]
    """Checkpoint, weights, split and size that the numbers are of."""
    data: dict[str, Any]
    """The images; see `etpp_ssl.evaluation.measured_on`."""
    without_looking: str
    """See there."""
    collapse: str
    """A sentence on a classifier that has collapsed; empty for others."""


def classifier_of(run: str, overrides: Sequence[str]) -> FinetuneRecipe:
    """The recipe of a classifier's run, with overrides.

    Raises:
        UserError: if there is no run, or it is of another task.
    """
    text = RecipeText.read(run, overrides)
    if task_of(text) != "finetune":
        raise UserError(
            f"run {run!r} is of a masked autoencoder, which has no classes to get right; `etpp probe {run}` "
            f"measures its encoder"
        )
    return FinetuneRecipe.of_text(text)


def place_of(recipe: FinetuneRecipe, folder: RunFolder) -> Path:
    """Where a run keeps an evaluation, in a folder for each split and data set.

    It is called by the split, and where the recipe says something else than the run's own, by that, too.

    Args:
        recipe: the run's own, with overrides.
        folder: the run.

    Raises:
        UserError: if no split is chosen, or there is no run.
    """
    if recipe.evaluate.split is None:
        raise UserError("evaluate.split is null; choose a split, for instance evaluate.split=eval")
    name = recipe.evaluate.split if recipe.evaluate.split in TRAINING else "eval"
    own, here = (r.model_dump(mode="json", exclude=BESIDE_THE_RESULT) for r in (folder.any_recipe(), recipe))
    if own != here:
        name += f"-{hashlib.blake2b(json.dumps(here).encode(), digest_size=4).hexdigest()}"
    return folder.evaluation_folder / name


@process_as_found()
@with_peers()
def evaluate_run(recipe: FinetuneRecipe, folder: RunFolder, say: Callable[[str], None]) -> Evaluated:
    """Evaluate a run's newest checkpoint: its moving average, where the run keeps one.

    Args:
        recipe: the run's own, with overrides (`evaluate.split`, `data.root` ...).
        folder: the run.
        say: told of damaged checkpoints.

    Raises:
        UserError: if there is no checkpoint, the data has other classes, or the weights do not fit the
            recipe's model.
    """
    if recipe.evaluate.split is None:
        raise UserError("evaluate.split is null; choose a split, for instance evaluate.split=eval")
    accelerator = open_accelerator(recipe)
    trained = trained_model(recipe, folder, say)
    classes = trained.classes
    if not classes:
        raise UserError(f"checkpoint {trained.source} is not of a classifier: it has no classes")
    normalise = recipe.normaliser(accelerator.device)
    evaluation = open_evaluation(recipe, accelerator, normalise, classes, recipe.num_classes(classes))
    assert evaluation is not None
    protocol = {
        **trained.weights,
        "split": recipe.evaluate.split,
        "image_size": list(recipe.size),
        "crop_pct": recipe.data.crop_pct,
        "precision": recipe.precision,
    }
    result = evaluation.run(trained.model.to(accelerator.device))
    data = measured_on(recipe, recipe.evaluate.split, evaluation.source, trained.trainings)
    leave(accelerator)
    sign = sign_of_answers(result.confusion, classes)
    collapse = "" if sign is None else collapse_of(recipe, sign, trained.weights["step"])
    return Evaluated(result, classes, protocol, data, without_looking(evaluation.source), collapse)
