"""What a recipe would cost, computed without training, data or memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.curriculum.cost import Cost, area_share, count_cost
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.data.sampler import micro_batch_of
from etpp_ssl.data.sources.splits import open_split
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import MaskCounts, MaskRatioRamp
from etpp_ssl.model.patches import grid_of
from etpp_ssl.recipe import Recipe, RunRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.decoder_cost import decoder_flops, other_decoders
from etpp_ssl.train.memory import replay_bytes, replay_notes

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments, in float32."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run, in numbers."""

    stage: Stage
    grid: tuple[int, int]
    num_visible: int
    """Patches per image that the encoder sees, prefix tokens not counted; like all numbers here at the
    stage's mean mask ratio, where the ratio follows a schedule."""
    num_predicted: int
    """Patches per image that the decoder predicts."""
    num_images: int
    """Images trained on, repeats counted."""
    area_share: float
    """Share of the run's compute by the area rule."""
    flops_share: float
    """Share of the run's compute by counted operations."""
    flops_per_image: int
    """Forward and backward, target included."""
    decoder_flops_per_image: int
    """The decoder's part of `flops_per_image`, forward and backward."""
    micro_batch: int
    """Images that one process, where it is the only one, takes at a time."""
    memory_bytes: int
    """Estimated device memory of one process at that micro-batch, at the mask ratio of the stage that takes
    most."""
    replay_bytes: int
    """Host memory of the replay buffers, over all processes; 0 without replay."""


@dataclass(frozen=True, kw_only=True)
class BasePlan:
    """A run of any task, in numbers."""

    recipe: RunRecipe
    num_images: int
    curriculum: Curriculum
    decided: bool = True
    """Whether the numbers of steps are known: a budget in hours becomes steps when the run starts."""
    recorded: TimePlan | None = None
    """What a budget in hours has become."""
    total_flops: int
    baseline_epochs: float
    """Epochs at full resolution to compare with: the recipe's, or else as many as the run's own."""
    speedup_by_area: float
    """Area-rule compute of `baseline_epochs` at full resolution over this run's."""
    speedup_by_flops: float
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Plan(BasePlan):
    """A pre-training run, in numbers."""

    recipe: Recipe
    stages: list[StagePlan]
    encoder_parameters: int
    decoder_parameters: int
    other_decoders: dict[str, int]
    """By name, FLOPs per image at full resolution, forward and backward, of the decoders that the recipe
    does not use, at the width, depth and heads of the one that it uses, predicting every masked patch."""


def plan_run(recipe: Recipe, folder: RunFolder | None = None) -> Plan:
    """Compute the plan of a recipe.

    The number of images is `data.num_images`, or comes from the data where that is not given.

    Args:
        recipe: the run.
        folder: its folder, which knows what a budget in hours has become.

    Raises:
        UserError: for anything that would keep the run from starting, as far as it shows without data.
    """
    num_images = images_of(recipe)
    curriculum = recipe.build_curriculum(num_images)
    recorded = folder.plan() if folder is not None else None
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

    masker = recipe.build_masker()
    num_values = recipe.build_objective().num_values
    costs: dict[tuple[tuple[int, int], MaskCounts], Cost] = {}

    def cost(bandwidth: tuple[int, int], counts: MaskCounts) -> Cost:
        key = (bandwidth, counts)
        if key not in costs:
            costs[key] = cost_at(recipe, model, bandwidth, counts)
        return costs[key]

    images = [stage.num_steps * stage.batch_size for stage in curriculum.stages]
    area = [n * area_share(s.bandwidth, recipe.size) for n, s in zip(images, curriculum.stages, strict=True)]
    means = [
        masker.counts(stage.bandwidth, sum(span) / 2)
        for stage, span in zip(curriculum.stages, curriculum.spans, strict=True)
    ]
    flops = [
        n * cost(stage.bandwidth, counts).flops
        for n, stage, counts in zip(images, curriculum.stages, means, strict=True)
    ]
    stages = []
    for index, stage in enumerate(curriculum.stages):
        at_ends = [masker.counts(stage.bandwidth, progress) for progress in curriculum.spans[index]]
        saved_values = max(cost(stage.bandwidth, c).saved_values for c in (means[index], *at_ends))
        grid = grid_of(stage.bandwidth, recipe.patch_size)
        micro_batch = micro_batch_of(stage.batch_size, recipe.micro_batch_size, recipe.batch_size)
        stages.append(
            StagePlan(
                stage=stage,
                grid=grid,
                num_visible=means[index].num_keep,
                num_predicted=means[index].num_predict,
                num_images=images[index],
                area_share=area[index] / sum(area),
                flops_share=flops[index] / sum(flops),
                flops_per_image=cost(stage.bandwidth, means[index]).flops,
                decoder_flops_per_image=decoder_flops(
                    recipe.model.decoder, model, grid, means[index], num_values
                ),
                micro_batch=micro_batch,
                memory_bytes=parameters * BYTES_PER_PARAMETER + micro_batch * saved_values * bytes_per_value,
                replay_bytes=replay_bytes(recipe, stage),
            )
        )
    full_counts = masker.counts(recipe.size, 0.5)
    full_grid = grid_of(recipe.size, recipe.patch_size)
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
        speedup_by_flops=baseline_images * cost(recipe.size, full_counts).flops / sum(flops),
        other_decoders={
            other.name: decoder_flops(other, model, full_grid, full_counts.everything, num_values)
            for other in other_decoders(recipe.model.decoder)
        },
        notes=[
            *recipe.curriculum.roundings(recipe.size, recipe.patch_size),
            *_schedule_note(recipe),
            *replay_notes(recipe, curriculum),
        ],
    )


def images_of(recipe: RunRecipe) -> int:
    """Images that a recipe trains on: `data.num_images`, or from the data where that is not given.

    Raises:
        UserError: if the data is not there.
    """
    recipe.data.statistics(recipe.in_chans)
    stated = recipe.data.stated_images
    if stated is not None:
        return stated
    return len(
        open_split(recipe.data, "train", in_chans=recipe.in_chans, image_size=recipe.size, seed=recipe.seed)
    )


def cost_at(recipe: Recipe, model: MaskedAutoencoder, bandwidth: tuple[int, int], counts: MaskCounts) -> Cost:
    """Counted cost of one image at a bandwidth, forward and backward, target included.

    Args:
        recipe: the run.
        model: its model, on the meta device.
        bandwidth: (height, width) in pixels.
        counts: patches of the image.
    """
    objective = recipe.build_objective()
    with torch.device("meta"):
        images = torch.zeros(1, recipe.in_chans, *bandwidth)
        ids_keep = torch.zeros(1, counts.num_keep, dtype=torch.int64)
        ids_predict = torch.zeros(1, counts.num_predict, dtype=torch.int64)

    def loss() -> Tensor:
        values, ids_predicted = model(images, ids_keep, ids_predict)
        return objective(values, ids_predicted, images)

    return count_cost(loss, model)


def _schedule_note(recipe: Recipe) -> list[str]:
    ratio = recipe.model.mask_ratio
    if not isinstance(ratio, MaskRatioRamp):
        return []
    return [
        f"the mask ratio goes from {ratio.start:g} to {ratio.end:g} over compute: patches and operations are "
        f"those of each stage's mean ratio (of the run's, for full resolution), memory is of its heaviest"
    ]
