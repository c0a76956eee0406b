"""What a run says of itself: before its first step what will happen, after its last one what came of it."""

from __future__ import annotations

import shlex
import textwrap
from functools import partial

import torch

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.data.sources.base import ImageSource, images_of
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.train.log import clock, shown_numbers
from etpp_ssl.train.run import Run

FEWEST_STEPS, FEWEST_WARMUP_STEPS = 10, 2
"""Fewer are warned of: nothing much can be learned in them."""
INDENT = 14 * " "
COPIED = ("output", "weights", "next")
"""Lines of paths and commands."""


def short_run_warnings(recipe: Recipe | FinetuneRecipe, curriculum: Curriculum) -> list[str]:
    """A sentence for a run, or a warm-up, of too few steps, with the keys that change it.

    Args:
        recipe: the run.
        curriculum: its stages, with the numbers of steps that they will have.
    """
    steps, share = curriculum.num_steps, recipe.optim.warmup_share
    budget = "budget_epochs" if recipe.budget_hours is None else "budget_hours"
    if steps < FEWEST_STEPS:
        return [
            f"the run has only {counted(steps, 'optimizer step')}, in which little is learned: "
            f"{budget} {getattr(recipe, budget):g} of {curriculum.num_images:,} images at batch_size "
            f"{recipe.batch_size}; raise {budget} or lower batch_size"
        ]
    warmup = sum(curriculum.stage_at(step).progress < share for step in range(FEWEST_WARMUP_STEPS))
    if share and warmup < FEWEST_WARMUP_STEPS:
        return [
            f"the warm-up has only {counted(warmup, 'step')} of {steps}: optim.warmup_share is {share:g}; "
            f"raise it or {budget}, or lower batch_size (optim.warmup_share=0 asks for no warm-up)"
        ]
    return []


def tell_start(run: Run) -> None:
    """Say in one block what is about to be trained, on what, and where it goes."""
    curriculum = run.curriculum
    batches = " / ".join(dict.fromkeys(f"{stage.batch_size:,}" for stage in curriculum.stages))
    done = f", of which {run.state.step:,} are done" if run.state.step else ""
    _tell(
        run,
        training=run.task.describe(),
        images=run.source.describe(),
        evaluation=_evaluation(run),
        steps=f"{curriculum.num_steps:,}{done}; batches of {batches} images, "
        f"{curriculum.equivalent_epochs:.4g} equivalent epochs",
        on=machine_of(run),
        output=str(run.folder.path),
    )
    for warning in short_run_warnings(run.recipe, curriculum):
        run.progress.say(f"warning: {warning}")


def machine_of(run: Run) -> str:
    """Device, precision, processes and data workers."""
    device = run.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{name} in {run.recipe.precision}, {counted(run.accelerator.num_processes, 'process')} with "
        f"{counted(run.recipe.data.num_workers, 'data worker')}"
    )


def _evaluation(run: Run) -> str:
    """On which images, how, and when the run is evaluated."""
    evaluation = run.task.evaluation
    if evaluation is None:
        return "none"
    every = f"every {counted(evaluation.every_steps, 'step')} and " if evaluation.every_steps else ""
    images = described_evaluation(run.recipe, evaluation.images)
    return f"{images}; {evaluation.how} {every}after the last step"


def described_evaluation(recipe: Recipe | FinetuneRecipe, images: ImageSource) -> str:
    """The evaluation images of a recipe, for people who have read of its training images."""
    split = recipe.evaluate.split if isinstance(recipe, FinetuneRecipe) else "eval"
    if split == "holdout":
        return f"{images_of(len(images))} kept from training (data.holdout_share)"
    if recipe.data.holdout and split != "train":
        return f"{images_of(len(images))} kept from training (data.holdout)"
    return images.describe()


def tell_end(run: Run) -> None:
    """Say in one block what came of a finished run, where it lies, and which commands come next."""
    step, folder = run.state.step, shlex.quote(str(run.folder.path))
    if run.newest:
        run.progress.say(
            f"finished {counted(step, 'step')}, {run.curriculum.equivalent_epochs:.4g} equivalent epochs, in "
            f"{clock(run.state.elapsed)}: {shown_numbers(run.newest)}"
        )
    else:
        run.progress.say(f"run {run.folder.path} is finished ({counted(step, 'step')})")
    loaded = run.curriculum.stage_at(step - 1).samples.stop
    if run.state.num_without_data:
        run.progress.say(
            f"{run.state.num_without_data:,} images showed too little data, beside the {loaded:,} that were "
            f"trained on in their places"
        )
    if run.state.num_outside:
        clipped = ", which were clipped" if run.recipe.data.clip else " (data.clip=true would clip them)"
        run.progress.say(
            f"{run.state.num_outside:,} of {loaded:,} images had values outside data.range{clipped}"
        )
    measure = f"etpp evaluate {folder}"
    if isinstance(run.recipe, Recipe):
        measure = f"etpp probe {folder} probe=knn" if run.source.classes else f"etpp reconstruct {folder}"
    _tell(
        run,
        weights=str(run.folder.checkpoint_folder / f"step-{step:08d}"),
        next=f"etpp report {folder}\n{measure}\netpp export {folder}",
    )


def _tell(run: Run, **lines: str) -> None:
    """Lines of text, each under its name; on a terminal they are folded, but for what is to be copied."""
    console = run.progress.console
    for name, text in lines.items():
        rows = text.splitlines()
        if console.is_terminal and name not in COPIED:
            fold = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
            rows = [part for row in rows for part in fold(row, width=max(console.width - len(INDENT), 20))]
        for number, row in enumerate(rows):
            run.progress.say(INDENT[:2] + f"{'' if number else name:<{len(INDENT) - 2}}{row}")


def counted(count: int, what: str) -> str:
    """A number and what it counts, as `1 step` or `1,000 steps`; `what` is one of the latter."""
    return f"{count:,} {what}" + ("" if count == 1 else "es" if what.endswith("s") else "s")
