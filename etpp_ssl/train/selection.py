"""What the holdout decides about a classifier's run: the learning rate before it, the weights at its end.

The holdout is the part of the training images that `data.holdout_share` keeps from training, so that no
evaluation image has a part in either.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError
from etpp_ssl.files import write_text
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.recipe_base import CheckpointConfig, TrackerConfig
from etpp_ssl.run_folder import RunFolder, read_object
from etpp_ssl.tasks.classify import Classification
from etpp_ssl.train.run import Run

FEWEST_STEPS = 30
"""Of a trial, where the run itself has as many."""
MAX_BYTES = 1 << 20


def settled(
    recipe: FinetuneRecipe, run_trial: Callable[[FinetuneRecipe, Path], Run], say: Callable[[str], None]
) -> FinetuneRecipe:
    """A recipe whose `optim.base_lr` is a number.

    For `auto`, each of `optim.auto_lrs` trains for `optim.auto_share` of the budget, from the same start,
    with a schedule of its own to its end; see `best_of` for the choice. Trials are ordinary runs in `trials/`
    of the run folder, and are resumed like one; the choice is recorded there, and holds when the run is
    resumed.

    Args:
        recipe: of a run that is about to be opened.
        run_trial: trains a recipe, given the folder of features that all trials share.
        say: told of each trial's result, and of the choice.

    Raises:
        UserError: for `auto` without a holdout, and for whatever keeps a trial from starting.
    """
    if recipe.optim.base_lr != "auto":
        return recipe
    if not recipe.data.holdout_share:
        raise UserError(
            "optim.base_lr is auto, which chooses on a holdout of the training images, and "
            "data.holdout_share is 0: give a share, such as 0.1, or the learning rate as a number"
        )
    folder = RunFolder(recipe.output)
    file = folder.trials_folder / "chosen.json"
    chosen = _recorded(file)
    if chosen is None:
        chosen = _try_all(recipe, folder, run_trial, say)
        write_text(file, json.dumps(chosen, indent=1) + "\n")
        for trial in folder.trials_folder.glob("*/checkpoints"):
            shutil.rmtree(trial, ignore_errors=True)
    optim = recipe.optim.model_copy(update={"base_lr": chosen["base_lr"]})
    return recipe.model_copy(update={"optim": optim})


def _recorded(file: Path) -> dict[str, Any] | None:
    """The choice of an earlier start, or None where there is none."""
    try:
        values = read_object(file, MAX_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(file)!r} cannot be read ({error}): remove it, and the trials are judged anew"
        ) from error
    if not isinstance(values.get("base_lr"), float):
        raise UserError(f"{str(file)!r} has no base_lr: remove it, and the trials are judged anew")
    return values


def _try_all(
    recipe: FinetuneRecipe,
    folder: RunFolder,
    run_trial: Callable[[FinetuneRecipe, Path], Run],
    say: Callable[[str], None],
) -> dict[str, Any]:
    trials = []
    for number, lr in enumerate(recipe.optim.auto_lrs, 1):
        trial = _trial(recipe, folder, lr)
        run = run_trial(trial, folder.features_folder)
        rows = [row for row in run.folder.metrics() if "eval_loss" in row]
        found = {key: rows[-1][key] for key in ("top1", "eval_loss", "num_images")}
        trials.append({"base_lr": lr, **found})
        say(
            f"trial {number} of {len(recipe.optim.auto_lrs)}: optim.base_lr={lr:g} for {run.state.step:,} "
            f"steps: top1 {found['top1']:.4g} %, cross-entropy {found['eval_loss']:.4g} on the holdout of "
            f"{found['num_images']:,} images"
        )
    best = best_of(trials)
    say(f"optim.base_lr={best['base_lr']:g} is chosen")
    return {"base_lr": best["base_lr"], "trials": trials}


def best_of(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The first trial, or the most accurate one where it is better by more than noise.

    Noise is one standard error of the difference of two shares, each of `num_images`: on a holdout of 50
    images about ten points. (The lowest cross-entropy would be another criterion, and was a worse one: it
    grows with the learning rate where accuracy still does, too.)

    Args:
        trials: with `top1` in per cent and `num_images`, the one to prefer first.
    """
    first = trials[0]
    best = max(trials, key=lambda trial: trial["top1"])
    shares = [trial["top1"] / 100 for trial in (first, best)]
    noise = (sum(share * (1 - share) for share in shares) / first["num_images"]) ** 0.5
    return best if shares[1] - shares[0] > noise else first


def _trial(recipe: FinetuneRecipe, folder: RunFolder, lr: float) -> FinetuneRecipe:
    share = recipe.optim.auto_share
    budget = {"budget_hours": recipe.budget_hours and recipe.budget_hours * share}
    if recipe.budget_epochs is not None:
        epochs_of_steps = FEWEST_STEPS * recipe.batch_size / len(recipe.open_training())
        budget = {
            "budget_epochs": min(recipe.budget_epochs, max(recipe.budget_epochs * share, epochs_of_steps))
        }
    evaluate = {"split": "holdout", "every_steps": None, "keep_better": False}
    return recipe.model_copy(
        update={
            **budget,
            "output": str(folder.trials_folder / f"lr-{lr:g}"),
            "optim": recipe.optim.model_copy(update={"base_lr": lr}),
            "evaluate": recipe.evaluate.model_copy(update=evaluate),
            "checkpoint": CheckpointConfig(keep=1),
            "tracker": TrackerConfig(),
        }
    )


def keep_better(run: Run) -> float:
    """Put what training began with in the place of trained weights that are worse on the holdout.

    Worse is a difference that noise does not make: of the images that only one of the two gets right, the
    start's are more than the trained model's by more than the square root of their number (one standard
    deviation, McNemar's test). Every process must call it; only a classifier's run with
    `evaluate.keep_better` does anything.

    Returns:
        The seconds it took.
    """
    judge = run.task.judge if isinstance(run.task, Classification) else None
    if judge is None:
        return 0.0
    since = time.perf_counter()
    model = run.trained_model()
    trained, began = judge.right(model), judge.began()
    before = judge.right(began)
    only_before, only_trained = int((before & ~trained).sum()), int((trained & ~before).sum())
    worse = only_before - only_trained > (only_before + only_trained) ** 0.5
    if worse:
        model = run.bare_model if run.average is None else run.average.module
        model.load_state_dict(began.state_dict())
    top1, start_top1 = (100.0 * right.double().mean().item() for right in (trained, before))
    run.metrics.write(
        {"step": run.state.step, "holdout_top1": top1, "start_holdout_top1": start_top1, "start_kept": worse}
    )
    kept = "what the run began with" if worse else "the trained weights"
    run.progress.say(
        f"{'warning: training has made it worse: ' if worse else ''}on the holdout of {len(trained):,} "
        f"images {start_top1:.4g} % before training, {top1:.4g} % after it; {kept} will be evaluated and "
        f"exported"
    )
    return time.perf_counter() - since
