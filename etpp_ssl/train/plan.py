"""What a recipe would cost, computed without training, data or memory.

Only time has to be measured, by `etpp_ssl.train.launch.measured_speed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from etpp_ssl.config import NotAtHand, UserError, shown_bytes
from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.curriculum.cost import Cost, area_share, count_cost
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.data.cache import cache_folder, keeping
from etpp_ssl.data.sampler import micro_batch_of
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import with_classes
from etpp_ssl.data.training import IndexedImages, TrainingImages
from etpp_ssl.model.encoders import unused_weights
from etpp_ssl.optim.registry import OptimizerCost
from etpp_ssl.randomness import ShapesOnly
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.base import Shown, Task
from etpp_ssl.train.memory import replay_bytes, replay_notes, training_bytes
from etpp_ssl.train.opening import bare_task
from etpp_ssl.train.start import check_depth
from etpp_ssl.train.summary import described_evaluation, short_run_warnings
from etpp_ssl.train.time_budget import Speed

ASSUMED_CLASSES = 1000
"""Of a classifier whose recipe leaves their number to data that is not at hand; they change little."""


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
    found: list[str]
    """What the data at hand holds, and what is left out of it; or that it is not at hand."""
    curriculum: Curriculum
    stages: list[StagePlan]
    decided: bool
    """Whether the numbers of steps are known: a budget in hours becomes steps when the run starts."""
    recorded: TimePlan | None
    """What a budget in hours has become."""
    optimizer: OptimizerCost
    total_flops: int
    """Of all images and all steps of the optimizer."""
    baseline_epochs: float
    """Epochs at full resolution to compare with: the recipe's, or else as many as the run's own."""
    speedup_by_area: float
    """Area-rule compute of `baseline_epochs` at full resolution over this run's."""
    speedup_by_flops: float
    speed: Speed | None
    """Of this machine, where it was measured."""
    notes: list[str]
    warnings: list[str]

    @property
    def seconds(self) -> float:
        """That the whole run takes at the measured speed, evaluations included."""
        assert self.speed is not None
        steps = [row.stage.num_steps for row in self.stages]
        return sum(n * s for n, s in zip(steps, self.speed.pace, strict=True)) + self.speed.evaluation


def plan_run(
    recipe: Recipe | FinetuneRecipe, folder: RunFolder | None = None, speed: Speed | None = None
) -> Plan:
    """Compute the plan of a recipe.

    Images at hand are counted; `data.num_images` stands for those that are not.

    Args:
        recipe: the run.
        folder: its folder, which knows what a budget in hours has become.
        speed: of this machine, which tells what a budget in hours would become.

    Raises:
        UserError: for anything that would keep the run from starting, as far as it shows without data.
    """
    recipe.data.statistics(recipe.in_chans)
    stated, num_classes = recipe.data.stated_images, None
    indexed: ImageSource | None = None
    classes: list[str] | None
    classes_needed = isinstance(recipe, FinetuneRecipe) and recipe.model.num_classes is None
    try:
        training = recipe.open_training()
    except NotAtHand as error:
        if stated is None:
            raise
        num_images, classes = stated, [str(number) for number in range(ASSUMED_CLASSES)]
        for_classes = f" and {ASSUMED_CLASSES:,} classes" if classes_needed else ""
        found = [f"{error}: planned for the {stated:,} images of data.num_images{for_classes}"]
    else:
        num_images, classes = len(training), training.classes
        other_count = recipe.compare_count(num_images)
        recipe = recipe.counted(training)
        indexed = training.source if isinstance(training, IndexedImages) else None
        found = [*_found(recipe, training), *([other_count] if other_count else [])]
    if isinstance(recipe, FinetuneRecipe):
        num_classes = recipe.num_classes(classes if classes_needed else None)
    recipe = recipe.for_images(num_images)
    curriculum = recipe.build_curriculum(num_images)
    recorded = folder.plan() if folder is not None else None
    if recorded is not None and (recorded.hours, recorded.stages) != (
        recipe.budget_hours,
        curriculum.portions,
    ):
        recorded = None
    if recorded is None and speed is not None and recipe.budget_hours is not None:
        recorded = speed.plan(curriculum, recipe.budget_hours)
    if recorded is not None:
        curriculum = curriculum.laid_out(recorded.segments)
    if isinstance(recipe, Recipe):
        recipe.check_curriculum(curriculum)
    task = bare_task(recipe, torch.device("cpu"), num_classes, _on_meta)
    known: dict[tuple[torch.Size, ...], Cost] = {}

    def cost(shown: Stage) -> Cost:
        key = tuple(tensor.shape for tensor in task.blank_inputs(shown).values())
        if key not in known:
            known[key] = cost_of(task, shown)
        return known[key]

    try:
        at_full = cost(replace(curriculum.stages[-1], bandwidth=recipe.size, progress=0.5))
        means = [
            replace(stage, progress=sum(span) / 2)
            for stage, span in zip(curriculum.stages, curriculum.spans, strict=True)
        ]
        mean_costs = [cost(mean) for mean in means]
    except (RuntimeError, ValueError, AssertionError):
        # A model that cannot run at a stage's size is told in a sentence; for others this is slow.
        recipe.check_curriculum(curriculum)
        raise

    images = [stage.num_steps * stage.batch_size for stage in curriculum.stages]
    area = [n * area_share(s.bandwidth, recipe.size) for n, s in zip(images, curriculum.stages, strict=True)]
    optimizer = recipe.optim.cost(task.net)
    flops = [
        n * mean.flops + stage.num_steps * optimizer.flops
        for n, mean, stage in zip(images, mean_costs, curriculum.stages, strict=True)
    ]
    parameters = sum(p.numel() for p in task.model.parameters())
    average = isinstance(recipe, FinetuneRecipe) and recipe.optim.ema is not None
    held = training_bytes(task.model, optimizer.state_bytes, average=average)
    bytes_per_value = 4 if recipe.precision == "fp32" else 2
    view = recipe.crop_view()
    kept = []
    if recipe.data.cache != "off" and indexed is not None:
        room = keeping(view, [stage.bandwidth for stage in curriculum.stages]).room(indexed)
        place = "memory in each process" if recipe.data.cache == "ram" else f"disk space in {cache_folder()}"
        kept = [f"data.cache keeps the decoded images in about {shown_bytes(room)} of {place}"]
    stages = []
    for index, stage in enumerate(curriculum.stages):
        at_ends = [cost(replace(stage, progress=progress)) for progress in curriculum.spans[index]]
        peak_values = max(one.peak_values for one in (mean_costs[index], *at_ends))
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
                memory_bytes=held + micro_batch * peak_values * bytes_per_value,
                replay_bytes=replay_bytes(view, recipe.in_chans, stage),
            )
        )
    baseline_epochs = recipe.baseline_epochs or recipe.budget_epochs or curriculum.equivalent_epochs
    baseline_images = baseline_epochs * num_images
    at_full_flops = at_full.flops + optimizer.flops / recipe.batch_size
    decided = recipe.budget_epochs is not None or recorded is not None
    return Plan(
        recipe=recipe,
        title=task.describe(),
        parameters=parameters,
        num_images=num_images,
        found=found,
        curriculum=curriculum,
        stages=stages,
        decided=decided,
        recorded=recorded,
        optimizer=optimizer,
        total_flops=sum(flops),
        baseline_epochs=baseline_epochs,
        speedup_by_area=baseline_images / sum(area),
        speedup_by_flops=baseline_images * at_full_flops / sum(flops),
        speed=speed,
        notes=[
            *recipe.notes,
            *unused_weights(recipe.model.name, recipe.init),
            *recipe.curriculum.roundings(recipe.size, recipe.bandwidth_multiple),
            *replay_notes(view, recipe.in_chans, curriculum.stages),
            *kept,
            *task.plan_notes(at_full),
        ],
        warnings=short_run_warnings(recipe, curriculum) if decided else [],
    )


def _found(recipe: Recipe | FinetuneRecipe, training: TrainingImages) -> list[str]:
    """What there is to train and to evaluate on, or why there are no evaluation images."""
    split = recipe.evaluate.split if isinstance(recipe, FinetuneRecipe) else "eval"
    evaluated = isinstance(recipe, FinetuneRecipe) or recipe.probe.name != "none"
    lines = [f"training: {training.describe()}"]
    try:
        # A plan of a stream asks no server.
        if not training.is_stream:
            kept = check_depth(training, recipe.data.reading(recipe.in_chans), recipe.data.stall_seconds)
            lines += [kept] if kept else []
    except UserError as error:
        lines.append(f"warning: training would not start here: {error}")
    try:
        if evaluated and split == "eval":
            images = recipe.open_split(split)
            if training.classes and images.classes:
                images = with_classes(images, training.classes)
            lines.append(f"evaluation: {described_evaluation(recipe, images)}")
    except UserError as error:
        lines.append(f"warning: training would not start here: {error}")
    return lines


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with ShapesOnly():
        return build().train()


def cost_of(task: Task, shown: Shown) -> Cost:
    """Counted cost of one image, forward and backward, losses included; the model is on the meta device."""
    inputs = task.blank_inputs(shown)
    return count_cost(lambda: task.losses(task.forward(task.model, inputs), inputs)["loss"], task.model)
