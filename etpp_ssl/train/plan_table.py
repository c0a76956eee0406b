"""The plan of a run as text: its stages in a table, learning rate, compute, memory and time."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from etpp_ssl.config import show_size, shown_bytes
from etpp_ssl.curriculum.base import Stage
from etpp_ssl.optim.optimizers import ClassifierOptimConfig
from etpp_ssl.train.log import clock
from etpp_ssl.train.plan import Plan
from etpp_ssl.train.time_budget import Speed

UNITS = ("", "k", "M", "G", "T", "P", "E")
BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60


def print_plan(plan: Plan, console: Console) -> None:
    """Stages, learning rate, parameters, memory and cost."""
    recipe = plan.recipe
    console.print(plan.title)
    console.print(f"{plan.num_images:,} images, global batch {recipe.batch_size}, {_budget(plan)}")
    for line in plan.found:
        console.print(line, markup=False)
    for table in _stage_tables(plan, console.width):
        console.print(table)
    for note in plan.notes:
        console.print(note if note.startswith("warning: ") else f"note: {note}")
    console.print(_learning_rate(plan))
    if recipe.optim.name != "adamw":
        console.print(_optimizer(plan))
    if plan.decided:
        console.print(_compute(plan))
    console.print(_memory(plan))
    if plan.speed is not None:
        console.print(_time(plan, plan.speed))
    for warning in plan.warnings:
        console.print(f"warning: {warning}")


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


def _stage_tables(plan: Plan, width: int) -> Iterator[Table]:
    """One table of the stages, or several below each other where a line has no room for all columns."""
    rows = [
        {
            "stage": str(row.stage.index + 1),
            "bandwidth": show_size(row.stage.bandwidth),
            "batch": str(row.stage.batch_size),
            "steps": f"{row.stage.num_steps:,}" if plan.decided else "?",
            "images": f"{row.num_images:,}" if plan.decided else "?",
            "area share": f"{row.area_share:.1%}",
            "FLOP share": f"{row.flops_share:.1%}",
            **row.columns,
            "memory": f"{row.memory_bytes / 1e9:.2f} GB",
            **_timed(plan.speed, row.stage),
        }
        for row in plan.stages
    ]
    first, *others = rows[0]
    while others:
        table = Table(box=box.SIMPLE, collapse_padding=True)
        table.add_column(first, justify="right", no_wrap=True)
        columns, used = [first], len(first) + 4
        while others:
            wide = max(len(others[0]), *(len(row[others[0]]) for row in rows)) + 2
            if used + wide > width and len(columns) > 1:
                break
            columns.append(others.pop(0))
            table.add_column(columns[-1], justify="right", no_wrap=True)
            used += wide
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        yield table


def _compute(plan: Plan) -> str:
    """Operations of the whole run, and how they compare with the baseline where the recipe has one."""
    digits = min(6, max(3, (len(str(plan.total_flops)) - 1) // 3))
    compute = f"compute: {plan.total_flops / 1000**digits:.4g} {UNITS[digits]}FLOP"
    if plan.recipe.baseline_epochs is None:
        return compute
    return (
        f"{compute}; computed speed-up over {plan.baseline_epochs:.4g} epochs (baseline_epochs) at full "
        f"resolution: {plan.speedup_by_area:.2f}x by the area rule, {plan.speedup_by_flops:.2f}x by counted "
        f"FLOPs"
    )


def _memory(plan: Plan) -> str:
    at_a_time = " / ".join(str(size) for size in dict.fromkeys(row.micro_batch for row in plan.stages))
    return f"memory is estimated per process, for {at_a_time} images at a time in {plan.recipe.precision}" + (
        "" if plan.recipe.micro_batch_size else " (set micro_batch_size to accumulate smaller ones)"
    )


def _timed(speed: Speed | None, stage: Stage) -> dict[str, str]:
    if speed is None:
        return {}
    seconds = speed.steps[stage.index]
    return {"images/s": f"{stage.batch_size / seconds:,.4g}", "time": clock(seconds * stage.num_steps)}


def _time(plan: Plan, speed: Speed) -> str:
    """Hours of the whole run at the measured speed."""
    evaluation = f", {clock(speed.evaluation)} for each evaluation included" if speed.evaluation else ""
    return (
        f"time: {clock(plan.seconds)} at the speed of a few steps of each stage, measured on "
        f"{speed.machine}{evaluation}"
    )


def _learning_rate(plan: Plan) -> str:
    """The schedule over compute, drawn and in words."""
    optim = plan.recipe.optim
    stages = plan.curriculum.stages
    schedules = [optim.learning_rates(stage.batch_size) for stage in stages]
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
    auto = ""
    if isinstance(optim, ClassifierOptimConfig) and optim.base_lr == "auto":
        lrs = ", ".join(f"{lr:g}" for lr in optim.auto_lrs)
        auto = (
            f"  drawn for the first of the base rates {lrs}; one is chosen on the holdout before the run, by "
            f"trials of {optim.auto_share:.0%} of its budget each\n"
        )
    return (
        f"learning rate over compute: {spark}\n{auto}"
        f"  0 -> {peaks} linearly in the first {optim.warmup_share:.3g} of compute, then "
        f"{schedules[0].describe()}{at_changes}"
    )


def _optimizer(plan: Plan) -> str:
    """What it keeps, and what it computes where that is more than element by element."""
    cost, stages = plan.optimizer, plan.stages
    line = f"optimizer: {plan.recipe.optim.name}, {shown_bytes(cost.state_bytes)} of state"
    if not cost.flops:
        return line
    steps = sum(row.stage.num_steps for row in stages)
    return (
        f"{line}; its matrix products take {cost.flops / 1e9:,.3g} GFLOP a step, "
        f"{steps * cost.flops / plan.total_flops:.1%} of the compute"
    )
