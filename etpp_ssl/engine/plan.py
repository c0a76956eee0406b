"""What a recipe would cost, computed without training, data or memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.curriculum.cost import Cost, area_share, count_cost
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.data.sampler import micro_batch_of
from etpp_ssl.data.splits import open_split
from etpp_ssl.engine.start import read_plan
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import num_visible
from etpp_ssl.model.patches import grid_of
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments, in float32."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run, in numbers."""

    stage: Stage
    grid: tuple[int, int]
    num_visible: int
    """Patches per image that the encoder sees, prefix tokens not counted."""
    num_images: int
    """Images seen, repeats counted."""
    area_share: float
    """Share of the run's compute by the area rule."""
    flops_share: float
    """Share of the run's compute by counted operations."""
    flops_per_image: int
    """Forward and backward."""
    micro_batch: int
    """Images that one process, where it is the only one, takes at a time."""
    memory_bytes: int
    """Estimated device memory of one process at that micro-batch."""


@dataclass(frozen=True)
class Plan:
    """A run, in numbers."""

    recipe: Recipe
    num_images: int
    curriculum: Curriculum
    decided: bool
    """Whether the numbers of steps are known: a budget in hours becomes steps when the run starts."""
    recorded: TimePlan | None
    """What a budget in hours has become."""
    stages: list[StagePlan]
    encoder_parameters: int
    decoder_parameters: int
    total_flops: int
    baseline_epochs: float
    """Epochs at full resolution to compare with: the recipe's, or else as many as the run's own."""
    speedup_by_area: float
    """Area-rule compute of `baseline_epochs` at full resolution over this run's."""
    speedup_by_flops: float
    notes: list[str]


def plan_run(recipe: Recipe, folder: RunFolder | None = None) -> Plan:
    """Compute the plan of a recipe.

    The number of images is `data.num_images`, or comes from the data where that is not given.

    Args:
        recipe: the run.
        folder: its folder, which knows what a budget in hours has become.

    Raises:
        UserError: for anything that would keep the run from starting, as far as it shows without data.
    """
    num_images = recipe.data.num_images
    recipe.data.statistics(recipe.in_chans)
    if num_images is None:
        num_images = len(
            open_split(
                recipe.data,
                "train",
                in_chans=recipe.in_chans,
                image_size=recipe.size,
                seed=recipe.seed,
            )
        )
    curriculum = recipe.build_curriculum(num_images)
    recorded = read_plan(folder) if folder is not None else None
    if recorded is not None and (recorded.hours, recorded.stages) != (
        recipe.budget_hours,
        curriculum.portions,
    ):
        recorded = None
    if recorded is not None:
        curriculum = curriculum.laid_out(recorded.segments)
    with torch.device("meta"):
        model = recipe.build_model()
    parameters = sum(p.numel() for p in model.parameters())
    encoder_parameters = sum(p.numel() for p in model.encoder.parameters())
    bytes_per_value = 4 if recipe.precision == "fp32" else 2

    costs = {stage.bandwidth: cost_at(recipe, model, stage.bandwidth) for stage in curriculum.stages}
    full = costs[recipe.size]
    images = [stage.num_steps * stage.batch_size for stage in curriculum.stages]
    flops = [n * costs[s.bandwidth].flops for n, s in zip(images, curriculum.stages, strict=True)]
    area = [n * area_share(s.bandwidth, recipe.size) for n, s in zip(images, curriculum.stages, strict=True)]
    stages = []
    for stage, seen, spent, covered in zip(curriculum.stages, images, flops, area, strict=True):
        grid = grid_of(stage.bandwidth, recipe.patch_size)
        cost = costs[stage.bandwidth]
        micro_batch = micro_batch_of(stage.samples_per_step, recipe.micro_batch_size, recipe.batch_size)
        stages.append(
            StagePlan(
                stage=stage,
                grid=grid,
                num_visible=num_visible(grid[0] * grid[1], recipe.model.mask_ratio),
                num_images=seen,
                area_share=covered / sum(area),
                flops_share=spent / sum(flops),
                flops_per_image=cost.flops,
                micro_batch=micro_batch,
                memory_bytes=parameters * BYTES_PER_PARAMETER
                + micro_batch * cost.saved_values * bytes_per_value,
            )
        )
    baseline_epochs = recipe.baseline_epochs or recipe.budget_epochs or curriculum.equivalent_epochs
    baseline_images = baseline_epochs * num_images
    return Plan(
        recipe=recipe,
        num_images=num_images,
        curriculum=curriculum,
        decided=recipe.budget_epochs is not None or recorded is not None,
        recorded=recorded,
        stages=stages,
        encoder_parameters=encoder_parameters,
        decoder_parameters=parameters - encoder_parameters,
        total_flops=sum(flops),
        baseline_epochs=baseline_epochs,
        speedup_by_area=baseline_images / sum(area),
        speedup_by_flops=baseline_images * full.flops / sum(flops),
        notes=recipe.curriculum.roundings(recipe.size, recipe.patch_size),
    )


def cost_at(recipe: Recipe, model: MaskedAutoencoder, bandwidth: tuple[int, int]) -> Cost:
    """Counted cost of one image at a bandwidth, forward and backward, target included.

    Args:
        recipe: the run.
        model: its model, on the meta device.
        bandwidth: (height, width) in pixels.
    """
    grid = grid_of(bandwidth, recipe.patch_size)
    num_patches = grid[0] * grid[1]
    num_keep = num_visible(num_patches, recipe.model.mask_ratio)
    objective = recipe.build_objective()
    with torch.device("meta"):
        images = torch.zeros(1, recipe.in_chans, *bandwidth)
        ids_keep = torch.zeros(1, num_keep, dtype=torch.int64)

    def loss() -> Tensor:
        values, ids_removed = model(images, ids_keep)
        return objective(values, ids_removed, images)

    return count_cost(loss, model)
