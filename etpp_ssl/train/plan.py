"""What a recipe would cost, computed without training, data or memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.curriculum.cost import Cost, area_share, count_cost
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.data.sampler import micro_batch_of
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.base import Inputs, Task
from etpp_ssl.train.memory import replay_bytes, replay_notes
from etpp_ssl.train.open import bare_task

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments, in float32."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run, in numbers."""

    stage: Stage
    num_images: int
    """Images trained on, repeats counted."""
    area_share: float
    """Share of the run's compute by the area rule."""
    flops_share: float
    """Share of the run's compute by counted operations."""
    cost: Cost
    """Of one image, losses included; where the mask ratio follows a schedule, at the stage's mean."""
    columns: dict[str, str]
    """What the task tells of the stage; see `Task.plan_rows`."""
    micro_batch: int
    """Images that one process, where it is the only one, takes at a time."""
    memory_bytes: int
    """Estimated device memory of one process at that micro-batch, at the mask ratio of the stage that takes
    most."""
    replay_bytes: int
    """Host memory of the replay buffers, over all processes; 0 without replay."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, in numbers."""

    recipe: Recipe | FinetuneRecipe
    title: str
    """The model, in a line."""
    parameters: int
    num_images: int
    curriculum: Curriculum
    stages: list[StagePlan]
    decided: bool
    """Whether the numbers of steps are known: a budget in hours becomes steps when the run starts."""
    recorded: TimePlan | None
    """What a budget in hours has become."""
    total_flops: int
    baseline_epochs: float
    """Epochs at full resolution to compare with: the recipe's, or else as many as the run's own."""
    speedup_by_area: float
    """Area-rule compute of `baseline_epochs` at full resolution over this run's."""
    speedup_by_flops: float
    notes: list[str]


@dataclass(frozen=True)
class _At:
    """A moment of a run; see `Shown`."""

    bandwidth: tuple[int, int]
    progress: float


def plan_run(recipe: Recipe | FinetuneRecipe, folder: RunFolder | None = None) -> Plan:
    """Compute the plan of a recipe.

    The number of images is `data.num_images`, or comes from the data where that is not given.

    Args:
        recipe: the run.
        folder: its folder, which knows what a budget in hours has become.

    Raises:
        UserError: for anything that would keep the run from starting, as far as it shows without data.
    """
    recipe.data.statistics(recipe.in_chans)
    num_images, num_classes = recipe.data.stated_images, None
    if isinstance(recipe, FinetuneRecipe):
        told = None if recipe.model.num_classes is not None else recipe.open_training().classes
        num_classes = recipe.num_classes(told)
    if num_images is None:
        num_images = len(recipe.open_split("train"))
    curriculum = recipe.build_curriculum(num_images)
    recorded = folder.plan() if folder is not None else None
    if recorded is not None and (recorded.hours, recorded.stages) != (
        recipe.budget_hours,
        curriculum.portions,
    ):
        recorded = None
    if recorded is not None:
        curriculum = curriculum.laid_out(recorded.segments)
    task = bare_task(recipe, torch.device("cpu"), num_classes, _on_meta)
    known: dict[tuple[torch.Size, ...], Cost] = {}

    def cost(shown: _At) -> Cost:
        inputs = task.blank_inputs(shown)
        key = tuple(tensor.shape for tensor in inputs.values())
        if key not in known:
            known[key] = _counted(task, inputs)
        return known[key]

    try:
        at_full = cost(_At(recipe.size, 0.5))
        means = [
            _At(stage.bandwidth, sum(span) / 2)
            for stage, span in zip(curriculum.stages, curriculum.spans, strict=True)
        ]
        mean_costs = [cost(mean) for mean in means]
    except (RuntimeError, ValueError, AssertionError):
        # A model that cannot run at a stage's size is told in a sentence; for others this is slow.
        recipe.check_curriculum(curriculum)
        raise

    images = [stage.num_steps * stage.batch_size for stage in curriculum.stages]
    area = [n * area_share(s.bandwidth, recipe.size) for n, s in zip(images, curriculum.stages, strict=True)]
    flops = [n * mean.flops for n, mean in zip(images, mean_costs, strict=True)]
    parameters = sum(p.numel() for p in task.model.parameters())
    bytes_per_value = 4 if recipe.precision == "fp32" else 2
    view = recipe.crop_view()
    stages = []
    for index, stage in enumerate(curriculum.stages):
        at_ends = [cost(_At(stage.bandwidth, progress)) for progress in curriculum.spans[index]]
        saved_values = max(one.saved_values for one in (mean_costs[index], *at_ends))
        micro_batch = micro_batch_of(stage.batch_size, recipe.micro_batch_size, recipe.batch_size)
        stages.append(
            StagePlan(
                stage=stage,
                num_images=images[index],
                area_share=area[index] / sum(area),
                flops_share=flops[index] / sum(flops),
                cost=mean_costs[index],
                columns=task.plan_rows(means[index], mean_costs[index]),
                micro_batch=micro_batch,
                memory_bytes=parameters * BYTES_PER_PARAMETER + micro_batch * saved_values * bytes_per_value,
                replay_bytes=replay_bytes(view, recipe.in_chans, stage),
            )
        )
    baseline_epochs = recipe.baseline_epochs or recipe.budget_epochs or curriculum.equivalent_epochs
    baseline_images = baseline_epochs * num_images
    return Plan(
        recipe=recipe,
        title=task.describe(),
        parameters=parameters,
        num_images=num_images,
        curriculum=curriculum,
        stages=stages,
        decided=recipe.budget_epochs is not None or recorded is not None,
        recorded=recorded,
        total_flops=sum(flops),
        baseline_epochs=baseline_epochs,
        speedup_by_area=baseline_images / sum(area),
        speedup_by_flops=baseline_images * at_full.flops / sum(flops),
        notes=[
            *recipe.curriculum.roundings(recipe.size, recipe.bandwidth_multiple),
            *replay_notes(view, recipe.in_chans, curriculum.stages),
            *task.plan_notes(at_full),
        ],
    )


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().train()


def cost_at(task: Task, bandwidth: tuple[int, int], progress: float) -> Cost:
    """Counted cost of one image, forward and backward, losses included.

    Args:
        task: with its model on the meta device.
        bandwidth: (height, width) in pixels.
        progress: share of the run's compute that is spent, which a mask ratio may follow.
    """
    return _counted(task, task.blank_inputs(_At(bandwidth, progress)))


def _counted(task: Task, inputs: Inputs) -> Cost:
    return count_cost(lambda: task.losses(task.forward(task.model, inputs), inputs)["loss"], task.model)
