"""A plan, for a person to read."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from etpp_ssl.config import show_size
from etpp_ssl.engine.plan import Plan
from etpp_ssl.model.masker import MaskRatioRamp
from etpp_ssl.recipe import Recipe

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60


def print_plan(plan: Plan, console: Console) -> None:
    """Stages, learning rate, parameters, memory and cost."""
    recipe, curriculum = plan.recipe, plan.curriculum
    console.print(
        f"{recipe.model.name}, image {show_size(recipe.size)}, patch {show_size(recipe.patch_size)}, "
        f"{recipe.in_chans} channels, {_masking(recipe)}: "
        f"{plan.encoder_parameters / 1e6:.2f} M parameters in the encoder, "
        f"{plan.decoder_parameters / 1e6:.2f} M in the {recipe.model.decoder.name} decoder"
    )
    console.print(
        f"{plan.num_images:,} images, global batch {recipe.batch_size}, "
        f"{curriculum.equivalent_epochs:.4g} equivalent epochs (asked: {recipe.budget_epochs:g}), "
        f"{curriculum.num_steps:,} steps, {curriculum.num_slots:,} images seen "
        f"({curriculum.num_slots / plan.num_images:.4g} passes)"
    )
    console.print(_stage_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(_decoders(plan))
    console.print(_learning_rate(plan))
    baseline = f"{plan.baseline_epochs:g} epochs at full resolution"
    console.print(
        f"compute: {plan.total_flops / 1e18:.4g} EFLOP; computed speed-up over {baseline}: "
        f"{plan.speedup_by_area:.2f}x by the area rule, {plan.speedup_by_flops:.2f}x by counted FLOPs"
    )
    console.print(
        f"memory is estimated per process, for {plan.micro_batch} images at a time in {recipe.precision}"
        + ("" if recipe.micro_batch_size else " (set micro_batch_size to accumulate smaller ones)")
    )


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
            f"{row.stage.num_steps:,}",
            f"{row.num_images:,}",
            f"{row.area_share:.1%}",
            f"{row.flops_share:.1%}",
            f"{(row.flops_per_image - row.decoder_flops_per_image) / 1e9:.4g}",
            f"{row.decoder_flops_per_image / 1e9:.4g}",
            f"{row.memory_bytes / 1e9:.2f} GB",
        )
    return table


def _learning_rate(plan: Plan) -> str:
    optim = plan.recipe.optim
    schedule = optim.schedule(plan.recipe.batch_size)
    heights = [schedule(i / (SPARK_WIDTH - 1)) / schedule.peak for i in range(SPARK_WIDTH)]
    spark = "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
    changes = ", ".join(f"{s.progress:.0%}" for s in plan.curriculum.stages[1:])
    return (
        f"learning rate over compute: {spark}\n"
        f"  0 -> {schedule.peak:.3g} linearly in the first {optim.warmup_share:.3g} of compute, then one "
        f"half-cosine to {schedule.minimum:.3g}"
        + (f", unbroken at the stage changes ({changes})" if changes else "")
    )
