"""`etpp evaluate`: the accuracy of a trained classifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from etpp_ssl.config import UserError
from etpp_ssl.dist.accelerator import open_accelerator, process_as_found
from etpp_ssl.dist.peers import leave, with_peers
from etpp_ssl.evaluation.classification import ClassificationResult
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.classify import open_evaluation
from etpp_ssl.weights.loading import load_trained


class Evaluated(NamedTuple):
    """The result of an evaluation."""

    result: ClassificationResult
    classes: list[str]
    protocol: dict[str, Any]
    """Checkpoint, weights, split and size that the numbers are of."""


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
    checkpoint = folder.trained(say)
    classes = checkpoint.classes()
    if not classes:
        raise UserError(f"checkpoint {checkpoint.path} is not of a classifier: it has no classes")
    accelerator = open_accelerator(recipe)
    num_classes = recipe.num_classes(classes)
    model = freshly_initialised(recipe.seed, partial(recipe.build_model, num_classes))
    load_trained(model, checkpoint)
    model.to(accelerator.device)
    normalise = recipe.normaliser(accelerator.device)
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
