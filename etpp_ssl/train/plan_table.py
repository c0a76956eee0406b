"""A plan, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from etpp_ssl.config import show_size
from etpp_ssl.model.masking import MaskRatioRamp
from etpp_ssl.optim.classifier import ClassifierOptimConfig
from etpp_ssl.optim.schedule import OptimConfig
from etpp_ssl.recipe import Recipe, RunRecipe
from etpp_ssl.train.plan import BasePlan, Plan

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60


def print_plan(plan: Plan, console: Console) -> None:
    """Stages, learning rate, parameters, memory and cost."""
    recipe = plan.recipe
    console.print(
        f"{recipe.model.name}, image {show_size(recipe.size)}, patch {show_size(recipe.patch_size)}, "
        f"{recipe.in_chans} channels, {_masking(recipe)}: "
        f"{plan.encoder_parameters / 1e6:.2f} M parameters in the encoder, "
        f"{plan.decoder_parameters / 1e6:.2f} M in the {recipe.model.decoder.name} decoder"
    )
    console.print(f"{plan.num_images:,} images, global batch {recipe.batch_size}, {budget(plan)}")
    console.print(_stage_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(_decoders(plan))
    console.print(learning_rate(plan, recipe.optim))
    if plan.decided:
        console.print(compute(plan))
    console.print(memory(recipe, [row.micro_batch for row in plan.stages]))


def _masking(recipe: Recipe) -> str:
    ratio = recipe.model.mask_ratio
    shown = f"{ratio.start:g} to {ratio.end:g}" if isinstance(ratio, MaskRatioRamp) else f"{ratio:g}"
    pattern = recipe.model.masking.name
    return f"mask ratio {shown}" + (f" ({pattern})" if pattern != "uniform" else "")


def _decoders(plan: Plan) -> str:
    own, full = plan.recipe.model.decoder, plan.stages[-1]
    others = ", ".join(
        f"{flops / 1e9:.4g} with a {name} decoder" for name, flops in plan.other_decoders.items()
    )
    share = full.decoder_flops_per_image / full.flops_per_image
    return (
        f"encoder (target included) and decoder are in GFLOP per image, forward and backward; at full "
        f"resolution the {own.name} decoder takes {full.decoder_flops_per_image / 1e9:.4g} ({share:.0%}); it "
        f"would be {others} of this width, depth and heads that predicts every masked patch"
    )


def budget(plan: BasePlan) -> str:
    """What the run may spend, in equivalent epochs, steps and images, or in hours."""
    recipe, curriculum, recorded = plan.recipe, plan.curriculum, plan.recorded
    if not plan.decided:
        return f"a budget of {recipe.budget_hours:g} hours: the run measures its speed and decides its steps"
    asked = f"asked: {recipe.budget_epochs:g}" if recipe.budget_epochs is not None else ""
    if recorded is not None:
        asked = (
            f"for {recorded.hours:g} hours, as planned at step {recorded.step:,} "
            f"after {recorded.elapsed / 3600:.3g} hours"
        )
    return (
        f"{curriculum.equivalent_epochs:.4g} equivalent epochs ({asked}), "
        f"{curriculum.num_steps:,} steps, {curriculum.num_slots:,} images seen "
        f"({curriculum.num_slots / plan.num_images:.4g} passes)"
    )


def _stage_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE, collapse_padding=True)
    for title in (
        "stage",
        "bandwidth",
        "grid",
        "visible",
        "predicted",
        "batch",
        "steps",
        "images",
        "area share",
        "FLOP share",
        "encoder",
        "decoder",
        "memory",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in plan.stages:
        table.add_row(
            str(row.stage.index + 1),
            show_size(row.stage.bandwidth),
            f"{row.grid[0]}x{row.grid[1]}",
            str(row.num_visible),
            str(row.num_predicted),
            str(row.stage.batch_size),
            f"{row.stage.num_steps:,}" if plan.decided else "?",
            f"{row.num_images:,}" if plan.decided else "?",
            f"{row.area_share:.1%}",
            f"{row.flops_share:.1%}",
            f"{(row.flops_per_image - row.decoder_flops_per_image) / 1e9:.4g}",
            f"{row.decoder_flops_per_image / 1e9:.4g}",
            f"{row.memory_bytes / 1e9:.2f} GB",
        )
    return table


def compute(plan: BasePlan) -> str:
    """Operations of the whole run, and how they compare with the baseline."""
    return (
        f"compute: {plan.total_flops / 1e18:.4g} EFLOP; computed speed-up over "
        f"{plan.baseline_epochs:.4g} epochs at full resolution: {plan.speedup_by_area:.2f}x by the area "
        f"rule, {plan.speedup_by_flops:.2f}x by counted FLOPs"
    )


def memory(recipe: RunRecipe, micro_batches: Sequence[int]) -> str:
    """What the memory column means; `micro_batches` are the stages'."""
    at_a_time = " / ".join(str(size) for size in dict.fromkeys(micro_batches))
    return f"memory is estimated per process, for {at_a_time} images at a time in {recipe.precision}" + (
        "" if recipe.micro_batch_size else " (set micro_batch_size to accumulate smaller ones)"
    )


def learning_rate(plan: BasePlan, optim: OptimConfig | ClassifierOptimConfig) -> str:
    """The schedule of `optim` over compute, drawn and in words."""
    stages = plan.curriculum.stages
    schedules = [optim.schedule(stage.batch_size) for stage in stages]
    highest = max(schedule.peak for schedule in schedules)
    heights = []
    for i in range(SPARK_WIDTH):
        progress = i / (SPARK_WIDTH - 1)
        index = max(stage.index for stage in stages if stage.progress <= progress)
        # A minimum above the peak is drawn as the peak.
        heights.append(min(1.0, schedules[index](progress) / highest))
    spark = "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
    peaks = " / ".join(f"{peak:.3g}" for peak in dict.fromkeys(schedule.peak for schedule in schedules))
    changes = ", ".join(f"{stage.progress:.0%}" for stage in stages[1:])
    how = "unbroken" if len({stage.batch_size for stage in stages}) == 1 else "rescaled with the batch"
    at_changes = f", {how} at the stage changes ({changes})" if changes else ""
    return (
        f"learning rate over compute: {spark}\n"
        f"  0 -> {peaks} linearly in the first {optim.warmup_share:.3g} of compute, then one "
        f"half-cosine to {optim.min_lr:.3g}{at_changes}"
    )
