"""A plan, for a person to read."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from etpp_ssl.config import show_size
from etpp_ssl.train.plan import Plan

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60


def print_plan(plan: Plan, console: Console) -> None:
    """Stages, learning rate, parameters, memory and cost."""
    recipe = plan.recipe
    console.print(plan.title)
    console.print(f"{plan.num_images:,} images, global batch {recipe.batch_size}, {_budget(plan)}")
    console.print(_stage_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print(_learning_rate(plan))
    if plan.decided:
        console.print(_compute(plan))
    console.print(_memory(plan))


def _budget(plan: Plan) -> str:
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
    for number, row in enumerate(plan.stages):
        cells = {
            "stage": str(row.stage.index + 1),
            "bandwidth": show_size(row.stage.bandwidth),
            "batch": str(row.stage.batch_size),
            "steps": f"{row.stage.num_steps:,}" if plan.decided else "?",
            "images": f"{row.num_images:,}" if plan.decided else "?",
            "area share": f"{row.area_share:.1%}",
            "FLOP share": f"{row.flops_share:.1%}",
            **row.columns,
            "memory": f"{row.memory_bytes / 1e9:.2f} GB",
        }
        if number == 0:
            for title in cells:
                table.add_column(title, justify="right", no_wrap=True)
        table.add_row(*cells.values())
    return table


def _compute(plan: Plan) -> str:
    """Operations of the whole run, and how they compare with the baseline."""
    return (
        f"compute: {plan.total_flops / 1e18:.4g} EFLOP; computed speed-up over "
        f"{plan.baseline_epochs:.4g} epochs at full resolution: {plan.speedup_by_area:.2f}x by the area "
        f"rule, {plan.speedup_by_flops:.2f}x by counted FLOPs"
    )


def _memory(plan: Plan) -> str:
    at_a_time = " / ".join(str(size) for size in dict.fromkeys(row.micro_batch for row in plan.stages))
    return f"memory is estimated per process, for {at_a_time} images at a time in {plan.recipe.precision}" + (
        "" if plan.recipe.micro_batch_size else " (set micro_batch_size to accumulate smaller ones)"
    )


def _learning_rate(plan: Plan) -> str:
    """The schedule over compute, drawn and in words."""
    optim = plan.recipe.optim
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
