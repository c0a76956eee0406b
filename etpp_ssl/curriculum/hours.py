"""A budget in hours: from measured seconds per step to the steps of a run, in pure arithmetic.

A plan gives every stage its share of compute, in as many steps as fill the time. It is made again at
every end of a stage, and at fixed points within the long ones, from the seconds that were really spent:
the past stays, progress continues from where it is, and what is left of it is spread over what is left of
the time. So the learning rate, a function of progress, does not jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from pydantic import TypeAdapter

from etpp_ssl.curriculum.base import Curriculum, Portion
from etpp_ssl.curriculum.cost import Segment, segments_from, whole_steps

LARGEST_SHARE = 1 / 8
"""Stages are cut into equal segments of at most this share of the run's compute. What a surprise costs is
taken from what is left: found out at the end of a long stage, it would starve the stage after it. The
run's last segment is cut again, since no later one could make up for its error."""


@dataclass(frozen=True)
class TimePlan:
    """What a budget in hours has been turned into so far."""

    hours: float
    """The budget."""
    stages: tuple[Portion, ...]
    """What the segments' stages are."""
    segments: tuple[Segment, ...]
    """The whole run, its past included."""
    pace: tuple[float, ...]
    """Seconds that one step of each stage was expected to take when the plan was made."""
    step: int
    """Optimizer steps done when the plan was made."""
    elapsed: float
    """Seconds spent when the plan was made."""
    reserve: float
    """Seconds set aside for what follows the last step."""

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON to the bit."""
        stages = [
            {**asdict(stage), "replay": stage.replay and stage.replay.model_dump()} for stage in self.stages
        ]
        return {**asdict(self), "stages": stages}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TimePlan:
        """The inverse of `to_json`.

        Raises:
            ValueError: if it is not what `to_json` gives.
        """
        plan = TypeAdapter(cls).validate_python(values)
        step = 0
        for segment in plan.segments:
            if segment.first_step != step or segment.num_steps < 1 or segment.total <= 0:
                raise ValueError(f"the segment from step {segment.first_step} does not follow step {step}")
            step += segment.num_steps
        stages = {segment.stage for segment in plan.segments}
        if not stages or not stages == set(range(len(plan.stages))) == set(range(len(plan.pace))):
            raise ValueError("its stages, their segments and their pace do not belong together")
        return plan


def first_plan(
    curriculum: Curriculum, *, hours: float, pace: Sequence[float], elapsed: float, reserve: float
) -> TimePlan:
    """The plan of a run that has not begun.

    Args:
        curriculum: its stages; their numbers of steps do not matter.
        hours: the budget, > 0.
        pace: seconds per step of each stage, > 0.
        elapsed: seconds of the budget that are spent already.
        reserve: seconds to leave after the last step.
    """
    segments = _spread(
        curriculum,
        _whole_parts(curriculum),
        pace,
        seconds=3600 * hours - elapsed - reserve,
        first_step=0,
        progress=0.0,
    )
    return TimePlan(hours, curriculum.portions, tuple(segments), tuple(pace), 0, elapsed, reserve)


def shortest_seconds(curriculum: Curriculum, pace: Sequence[float]) -> float:
    """Seconds that the shortest plan takes: one step of every segment."""
    return sum(pace[stage] for stage, _ in _whole_parts(curriculum))


def replan(
    curriculum: Curriculum, plan: TimePlan, *, step: int, elapsed: float, hours: float | None = None
) -> TimePlan:
    """The plan with its future fitted to the time that is left.

    All that is left is taken to be as much faster or slower than expected as the steps since the plan
    was made. At least one step of each segment remains, even when the time is over.

    Args:
        curriculum: the run's stages; their numbers of steps do not matter.
        plan: the plan so far.
        step: optimizer steps done, plan.step <= step < the plan's last.
        elapsed: seconds spent.
        hours: another budget from now on; None keeps the plan's.
    """
    assert plan.step <= step < plan.segments[-1].first_step + plan.segments[-1].num_steps
    hours = plan.hours if hours is None else hours
    past, parts = _cut(plan.segments, step)
    pace = plan.pace
    if step > plan.step and elapsed > plan.elapsed:
        stage = past[-1].stage
        ratio = (elapsed - plan.elapsed) / (step - plan.step) / pace[stage]
        pace = tuple(p * ratio if index >= stage else p for index, p in enumerate(pace))
    future = _spread(
        curriculum,
        parts,
        pace,
        seconds=3600 * hours - elapsed - plan.reserve,
        first_step=step,
        progress=curriculum.laid_out(plan.segments).progress_after(step),
    )
    return TimePlan(hours, plan.stages, (*past, *future), pace, step, elapsed, plan.reserve)


def _whole_parts(curriculum: Curriculum) -> list[tuple[int, float]]:
    """(stage, share) of each segment of a whole run."""
    parts = []
    for stage, portion in enumerate(curriculum.portions):
        # Shares such as 0.375 are not always whole eighths once they are floats.
        count = ceil(portion.share / LARGEST_SHARE - 1e-6)
        parts += [(stage, portion.share / count)] * count
    stage, share = parts.pop()
    return [*parts, (stage, share / 2), (stage, share / 2)]


def _cut(segments: Sequence[Segment], step: int) -> tuple[list[Segment], list[tuple[int, float]]]:
    """Segments up to a step, and (stage, share) of those after it."""
    past, parts = [], []
    for segment in segments:
        done = min(max(step - segment.first_step, 0), segment.num_steps)
        share = segment.share * done / segment.num_steps
        if done:
            past.append(replace(segment, num_steps=done, share=share))
        if done < segment.num_steps:
            parts.append((segment.stage, segment.share - share))
    return past, parts


def _spread(
    curriculum: Curriculum,
    parts: Sequence[tuple[int, float]],
    pace: Sequence[float],
    *,
    seconds: float,
    first_step: int,
    progress: float,
) -> list[Segment]:
    """Segments whose steps take `seconds` in all, and compute in the proportion of their shares."""
    costs = curriculum.step_costs
    weights = [share / costs[stage] * pace[stage] for stage, share in parts]
    scale = max(0.0, seconds) / sum(weights)
    counts = whole_steps([weight * scale for weight in weights], [pace[stage] for stage, _ in parts])
    return segments_from(parts, counts, costs, first_step=first_step, progress=progress)
