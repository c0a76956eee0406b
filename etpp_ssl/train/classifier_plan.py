"""What training a classifier would cost, computed without training, data or memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from etpp_ssl.config import show_size
from etpp_ssl.curriculum.base import Stage
from etpp_ssl.curriculum.cost import Cost, area_share, count_cost
from etpp_ssl.data.sampler import micro_batch_of
from etpp_ssl.data.training import open_training
from etpp_ssl.model.classifier import Classifier
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.train.classifier_run import check_sizes
from etpp_ssl.train.memory import replay_notes
from etpp_ssl.train.plan import BYTES_PER_PARAMETER, BasePlan, images_of
from etpp_ssl.train.plan_table import budget, compute, learning_rate, memory


@dataclass(frozen=True)
class ClassifierStagePlan:
    """One stage of a run, in numbers."""

    stage: Stage
    num_images: int
    area_share: float
    """Share of the run's compute by the area rule."""
    flops_share: float
    """Share of the run's compute by counted operations."""
    forward_flops: int
    """Of one image; one multiply-add is two, so half of it is what papers call FLOPs."""
    flops_per_image: int
    """Forward and backward."""
    micro_batch: int
    memory_bytes: int
    """Estimated device memory of one process at that micro-batch."""


@dataclass(frozen=True, kw_only=True)
class ClassifierPlan(BasePlan):
    """A run, in numbers."""

    recipe: FinetuneRecipe
    stages: list[ClassifierStagePlan]
    num_classes: int
    parameters: int


def plan_classifier(recipe: FinetuneRecipe) -> ClassifierPlan:
    """Compute the plan of a recipe; see `etpp_ssl.train.plan.plan_run`.

    Raises:
        UserError: for anything that would keep the run from starting, as far as it shows without data.
    """
    num_images, num_classes = images_of(recipe), _num_classes(recipe)
    curriculum = recipe.build_curriculum(num_images)
    with torch.device("meta"):
        model = recipe.build_model(num_classes)
    sizes = [stage.bandwidth for stage in curriculum.stages]
    try:
        costs = {size: classifier_cost(model, recipe.in_chans, size) for size in {*sizes, recipe.size}}
    except (RuntimeError, ValueError, AssertionError):
        # A model that cannot run at a stage's size is told in a sentence; for others this is slow.
        check_sizes(recipe, curriculum)
        raise

    images = [stage.num_steps * stage.batch_size for stage in curriculum.stages]
    area = [n * area_share(size, recipe.size) for n, size in zip(images, sizes, strict=True)]
    flops = [n * costs[size].flops for n, size in zip(images, sizes, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    bytes_per_value = 4 if recipe.precision == "fp32" else 2
    stages = []
    for index, stage in enumerate(curriculum.stages):
        cost = costs[stage.bandwidth]
        micro_batch = micro_batch_of(stage.batch_size, recipe.micro_batch_size, recipe.batch_size)
        stages.append(
            ClassifierStagePlan(
                stage=stage,
                num_images=images[index],
                area_share=area[index] / sum(area),
                flops_share=flops[index] / sum(flops),
                forward_flops=cost.forward_flops,
                flops_per_image=cost.flops,
                micro_batch=micro_batch,
                memory_bytes=parameters * BYTES_PER_PARAMETER
                + micro_batch * cost.saved_values * bytes_per_value,
            )
        )
    baseline_epochs = recipe.baseline_epochs or recipe.budget_epochs or curriculum.equivalent_epochs
    baseline_images = baseline_epochs * num_images
    return ClassifierPlan(
        recipe=recipe,
        num_images=num_images,
        curriculum=curriculum,
        stages=stages,
        num_classes=num_classes,
        parameters=parameters,
        total_flops=sum(flops),
        baseline_epochs=baseline_epochs,
        speedup_by_area=baseline_images / sum(area),
        speedup_by_flops=baseline_images * costs[recipe.size].flops / sum(flops),
        notes=[
            *recipe.curriculum.roundings(recipe.size, recipe.bandwidth_multiple),
            *replay_notes(recipe, curriculum),
        ],
    )


def classifier_cost(model: Classifier, in_chans: int, size: tuple[int, int]) -> Cost:
    """Counted cost of one image of (height, width) pixels, forward and backward, on the meta device."""
    model.train()

    def loss() -> Tensor:
        with torch.device("meta"):
            images = torch.zeros(1, in_chans, *size)
            positions = torch.zeros(1, dtype=torch.int64)
        total: Tensor = model(images, positions).sum()
        return total

    return count_cost(loss, model)


def print_classifier_plan(plan: ClassifierPlan, console: Console) -> None:
    """Stages, learning rate, parameters, memory and cost."""
    recipe = plan.recipe
    console.print(
        f"{recipe.model.name}, image {show_size(recipe.size)}, {recipe.in_chans} channels, "
        f"{plan.num_classes:,} classes: {plan.parameters / 1e6:.2f} M parameters"
    )
    console.print(f"{plan.num_images:,} images, global batch {recipe.batch_size}, {budget(plan)}")
    console.print(_stage_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(learning_rate(plan, recipe.optim))
    console.print(compute(plan))
    console.print(memory(recipe, [row.micro_batch for row in plan.stages]))


def _stage_table(plan: ClassifierPlan) -> Table:
    table = Table(box=box.SIMPLE, collapse_padding=True)
    for title in (
        "stage",
        "bandwidth",
        "batch",
        "steps",
        "images",
        "area share",
        "FLOP share",
        "GMAC forward",
        "GFLOP in all",
        "memory",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in plan.stages:
        table.add_row(
            str(row.stage.index + 1),
            show_size(row.stage.bandwidth),
            str(row.stage.batch_size),
            f"{row.stage.num_steps:,}",
            f"{row.num_images:,}",
            f"{row.area_share:.1%}",
            f"{row.flops_share:.1%}",
            f"{row.forward_flops / 2e9:.4g}",
            f"{row.flops_per_image / 1e9:.4g}",
            f"{row.memory_bytes / 1e9:.2f} GB",
        )
    return table


def _num_classes(recipe: FinetuneRecipe) -> int:
    if recipe.model.num_classes is not None:
        return recipe.num_classes(None)
    source = open_training(recipe.data, in_chans=recipe.in_chans, image_size=recipe.size, seed=recipe.seed)
    return recipe.num_classes(source.classes)
