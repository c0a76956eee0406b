"""The recipe that `etpp transfer` fine-tunes by: the shipped one, for an encoder and its new images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.recipe_file import RecipeText, shipped_recipes
from etpp_ssl.run_folder import RunFolder

RECIPE = "transfer"
"""Name of the shipped recipe that the command starts from."""
EVERYTHING = {"holdout_share": 0.0, "label_share": None, "labels_per_class": None}
"""Of `data`: draws that look at labels, and cannot tell well that there are none."""
FEWEST_IMAGES, OF_ROOT, FEWEST_EPOCHS = 51_200, 2_236, 10
"""See `epochs_for`."""
VALUES = ("range", "clip", "nodata", "axes", "channels", "array", "reader")
"""Keys of `data` that say how files become values."""


def epochs_for(num_images: int) -> float:
    """Passes over a training set of `num_images` that fine-tuning takes where nobody asks for a number.

    As many as show 51,200 images (800 steps of 64), or 2,236 times the square root of `num_images` if that
    is more, and 10 passes at least: 512 passes for 100 images, 102 for 500, 32 for 5,000, 16 for 20,000.

    Args:
        num_images: at least 1.

    Returns:
        Rounded to three digits.
    """
    images = max(FEWEST_IMAGES, OF_ROOT * num_images**0.5, FEWEST_EPOCHS * num_images)
    return float(f"{images / num_images:.3g}")


def recipe_of(source: str, overrides: Sequence[str], say: Callable[[str], None]) -> FinetuneRecipe:
    """The recipe of the fine-tuning run: the shipped one, for this encoder and these images.

    Args:
        source: a run, or what else `init` may name.
        overrides: `section.key=value` each.
        say: told of the budget, and of images without an evaluation split.

    Raises:
        UserError: for a mistake in them, or data that serves no classifier.
    """
    given = {override.partition("=")[0] for override in overrides}
    if "init" in given:
        raise UserError(f"init is {source!r}, the first argument: leave init=... out")
    run = RunFolder(Path(source).expanduser())
    layer: dict[str, Any] = {"init": source}
    first: list[str] = []
    if run.exists():
        run.trained(say)
        layer, first = _as_in_run(source, run.any_recipe(), given)
    elif not given & {"model", "model.name"}:
        raise UserError(
            f"{source!r} is not a run, which would say what network its weights are of: name it, as in "
            f"model=vit_small_patch16_224, and image_size where that is not 224"
        )
    if "budget_hours" in given:
        layer["budget_epochs"] = None

    def load(*more: str) -> FinetuneRecipe:
        text = RecipeText.read(shipped_recipes()[RECIPE], [*first, *overrides, *more])
        return FinetuneRecipe.of_text(replace(text, layers=(*text.layers, layer)))

    # The recipe's own number stands for images that are not at hand.
    recipe, more = load(), [] if "data.num_images" in given else ["data.num_images=null"]
    if not recipe.data.holdout_share:
        raise UserError(
            "data.holdout_share is 0, and etpp transfer compares protocols on the holdout: give a share of "
            "the training images, such as 0.1"
        )
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update=EVERYTHING)}).open_split("train")
    if whole.classes is None or len(whole.classes) < 2:
        raise UserError(
            f"a classifier needs labels of two classes at least, and what was found has no class "
            f"sub-folders, or a single one (nor class names in a list): {whole.describe()}"
        )
    train = recipe.open_split("train")
    if not given & {"budget_epochs", "budget_hours"}:
        epochs = epochs_for(len(train))
        more.append(f"budget_epochs={epochs:g}")
        steps = epochs * len(train) / recipe.batch_size
        say(
            f"budget_epochs={epochs:g} is chosen for {len(train):,} training images: about {steps:,.0f} "
            f"steps of {recipe.batch_size}"
        )
    if recipe.evaluate.split is None:
        raise UserError("evaluate.split is null, but etpp transfer is there to evaluate; leave it out")
    if recipe.evaluate.split == "eval" and not given & {"data.eval_split", "data.eval_file", "data.holdout"}:
        try:
            recipe.open_split("eval")
        except UserError as error:
            more.append("evaluate.split=holdout")
            say(
                f"warning: {error}. All numbers are of the holdout, the {recipe.data.holdout_share:.0%} of "
                f"the training images that settings are chosen on, and a little too good"
            )
    return load(*more) if more else recipe


def _as_in_run(
    source: str, recipe: Recipe | FinetuneRecipe, given: set[str]
) -> tuple[dict[str, Any], list[str]]:
    """What is as in the encoder's run: precision, and how values of files are read.

    Returns:
        A layer of the recipe, and overrides.
    """
    data = recipe.data
    layer: dict[str, Any] = {"init": source, "precision": recipe.precision}
    if data.range is not None and "data.range" not in given:
        layer["data"] = data.model_dump(mode="json", include=set(VALUES))
    if data.channel_sampling is None:
        return layer, []
    if "data.channels" not in given:
        raise UserError(
            f"run {source!r} was pre-trained with data.channel_sampling={data.channel_sampling}, on any "
            f"channels of an image; a classifier is shown the same ones of each: name "
            f"{data.channel_sampling} of them, as in data.channels={list(range(recipe.in_chans))}"
        )
    # That run's own defaults are others than those of fixed channels.
    mean, std = data.statistics(recipe.in_chans)
    return layer, [f"data.mean={list(mean)}", f"data.std={list(std)}"]
