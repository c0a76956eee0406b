"""How fast each stage is on this machine, and how many steps a budget in hours gives it for that.

`decide_steps` measures before the first step, `replan_steps` corrects at every end of a segment. The
arithmetic is in `curriculum/hours.py`. All processes take the main one's clock, so that all have the same
plan. A plan is recorded with every checkpoint: between two plans a run is a function of the step.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from accelerate.utils import broadcast_object_list

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.curriculum.hours import TimePlan, first_plan, replan, shortest_seconds
from etpp_ssl.dist.sharding import own_parts
from etpp_ssl.optim.schedules import set_learning_rate
from etpp_ssl.tasks.base import forward_backward
from etpp_ssl.train.batches import TrainingBatches
from etpp_ssl.train.run import Run
from etpp_ssl.train.start import write_plan
from etpp_ssl.train.summary import machine_of

FEWEST_STEPS, MOST_STEPS = 3, 1000
MOST_SECONDS = 10.0
MOST_SHARE = 0.01
"""Measuring a stage ends, between these steps, once it took `MOST_SECONDS` or this share of a budget in
hours."""


@dataclass(frozen=True)
class Speed:
    """How fast a run is on a machine, in seconds."""

    steps: tuple[float, ...]
    """Of one training step of each stage."""
    evaluation: float
    """Of one evaluation; 0 where there is none."""
    every_steps: int | None
    """Steps between two evaluations, beside the last one."""
    elapsed: float
    """That measuring took."""
    machine: str
    """For people."""

    @property
    def pace(self) -> list[float]:
        """Seconds per step of each stage, evaluations between steps included."""
        between = self.evaluation / self.every_steps if self.every_steps else 0.0
        return [seconds + between for seconds in self.steps]

    def plan(self, curriculum: Curriculum, hours: float) -> TimePlan:
        """The steps that a new run has in `hours`.

        Raises:
            UserError: if they are too short for one step of each segment.
        """
        need = self.elapsed + self.evaluation + shortest_seconds(curriculum, self.pace)
        if 3600 * hours < need:
            raise UserError(
                f"budget_hours {hours:g} is too short: measuring, one step of each segment and the last "
                f"evaluation take {_shown(need)}, so give more than {need / 3600:.2g}"
            )
        return first_plan(
            curriculum, hours=hours, pace=self.pace, elapsed=self.elapsed, reserve=self.evaluation
        )


def decide_steps(run: Run) -> None:
    """Turn a new run's budget in hours into steps; every process must call it.

    Does nothing for a run with a budget in epochs, or with a plan.

    Raises:
        UserError: if the budget is too short for one step of each segment.
    """
    hours = run.recipe.budget_hours
    if hours is None or run.state.plan is not None:
        return
    run.progress.say(f"measuring the stages' speed, to fill {_shown(3600 * hours)}")
    speed = measure(run)
    plan = speed.plan(run.curriculum, hours)
    run.state.elapsed = speed.elapsed
    _adopt(run, plan)


def replan_due(run: Run) -> bool:
    """Whether the steps to come are to be planned anew; the same on all processes."""
    return run.state.plan is not None and not run.finished and run.curriculum.ends_segment(run.state.step)


def replan_steps(run: Run) -> None:
    """Fit the steps to come to the time that is left; every process must call it."""
    state = run.state
    assert state.plan is not None
    state.elapsed = _agreed(state.elapsed)
    _adopt(run, replan(run.curriculum, state.plan, step=state.step, elapsed=state.elapsed))
    if run.accelerator.is_main_process:
        try:
            write_plan(run.folder, state.plan)
        except UserError as error:
            # The checkpoint that follows has the plan too, and says for all processes whether the disk fails.
            run.progress.say(f"warning: {error}")


def _adopt(run: Run, plan: TimePlan) -> None:
    before = run.curriculum.num_steps if plan.step else None
    run.state.plan = plan
    run.curriculum = run.progress.curriculum = run.curriculum.laid_out(plan.segments)
    run.progress.say(
        f"step {plan.step}: {_shown(plan.elapsed)} of {_shown(3600 * plan.hours)} spent; planned are "
        f"{run.curriculum.num_steps} steps{f' (before: {before})' if before is not None else ''}, "
        f"{run.curriculum.equivalent_epochs:.4g} equivalent epochs"
    )


def measure(run: Run) -> Speed:
    """Time a few steps of each stage, and one evaluation; every process must call it.

    Trains with a learning rate of zero on real batches, and leaves no trace: weights, optimizer, loss
    scale and random generators are as before, and the order of samples has no memory.
    """
    began = run.clock()
    device, scaler = run.accelerator.device, run.accelerator.scaler
    weights = {name: value.to("cpu", copy=True) for name, value in own_parts(run.bare_model).items()}
    scale = scaler.state_dict() if scaler is not None else None
    # No tensors yet, but settings, to which timm's Lamb adds a count of steps.
    untouched = deepcopy(run.optimizer.state_dict())
    run.model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        steps = tuple(_step_seconds(run, stage) for stage in run.curriculum.stages)
        evaluation = _evaluation_seconds(run)
    for name, value in own_parts(run.bare_model).items():
        value.copy_(weights[name])
    run.optimizer.load_state_dict(untouched)
    if scaler is not None:
        scaler.load_state_dict(scale)
    every_steps = run.task.evaluation.every_steps if run.task.evaluation is not None else None
    return Speed(steps, evaluation, every_steps, _agreed(run.clock() - began), machine_of(run))


def _step_seconds(run: Run, stage: Stage) -> float:
    hours, streams = run.recipe.budget_hours, run.state.streams
    enough = MOST_SECONDS if hours is None else min(MOST_SECONDS, MOST_SHARE * 3600 * hours)
    # The first step allocates and tunes; and every worker has a batch ready when the first one arrives,
    # so that only later batches show how fast they come.
    warm_up = 1 + run.recipe.data.num_workers
    steps_at_most = range(stage.first_step, stage.first_step + warm_up + MOST_STEPS)
    batches = run.open_batches(lambda step: replace(stage, step=step), steps_at_most)
    for _ in range(warm_up):
        train_step(run, stage, batches, lr=0.0)
    start, seconds, steps = _now(run), 0.0, 0
    while steps < FEWEST_STEPS or (seconds < enough and steps < MOST_STEPS):
        train_step(run, stage, batches, lr=0.0)
        steps += 1
        seconds = _agreed(_now(run) - start)
    batches.close()
    run.state.streams = streams
    return seconds / steps


def train_step(run: Run, stage: Stage, batches: TrainingBatches, lr: float) -> None:
    """What a step of the loop computes, without its bookkeeping."""
    set_learning_rate(run.optimizer, lr)
    accelerator = run.accelerator
    for batch in batches.step():
        with run.synchronised(batch):
            forward_backward(
                run.task, run.model, batch, stage, accelerator.backward, accelerator.num_processes
            )
    run.gradient_norm()
    run.optimizer.step()
    run.optimizer.zero_grad()


def _evaluation_seconds(run: Run) -> float:
    if run.task.evaluation is None:
        return 0.0
    start = _now(run)
    run.task.evaluation.run(run.trained_model())
    return _agreed(_now(run) - start)


def _now(run: Run) -> float:
    if run.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    return run.clock()


def _agreed(number: float) -> float:
    """The main process's number, on all."""
    numbers = [number]
    broadcast_object_list(numbers)
    return numbers[0]


def _shown(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds:.1f} seconds"
