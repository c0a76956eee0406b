"""Segments: which steps a run spends on which stage, as a plan records it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one stage, over which progress grows linearly.

    A run is a sequence of segments, one per stage unless a budget in hours cuts a stage into several.
    Compute is counted in images at full resolution. After `k` steps of the segment the progress is
    `(spent + k * cost) / total`, where `cost` is that of one step.
    """

    stage: int
    """Index of its stage."""
    share: float
    """Share of the run's compute that it was given."""
    first_step: int
    num_steps: int
    spent: float
    """Compute before the segment, on a scale where the whole run takes `total`."""
    total: float


def whole_steps(dues: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Steps for each part of a run, at least one each.

    Args:
        dues: what each part is to cost, in any unit.
        costs: what one step of it costs, in the same unit, > 0.

    Returns:
        Numbers of steps whose costs add up to those due within half a step of the last part, unless what
        was left for a part was less than one step of it.
    """
    counts = []
    spent = due = 0.0
    for part, cost in zip(dues, costs, strict=True):
        due += part
        # Rounding against what is due so far keeps the whole run within half a step of its budget.
        counts.append(max(1, round((due - spent) / cost)))
        spent += counts[-1] * cost
    return counts


def segments_from(
    parts: Sequence[tuple[int, float]],
    counts: Sequence[int],
    step_costs: Sequence[float],
    *,
    first_step: int,
    progress: float,
) -> list[Segment]:
    """Segments that lead from a step and its progress to the end of the run, progress 1.

    Args:
        parts: (index of the stage, share of compute) of each segment.
        counts: its steps.
        step_costs: compute of one step of each stage.
        first_step: optimizer steps done before the first segment.
        progress: share of the run's compute spent by then, in [0, 1).
    """
    costs = [count * step_costs[stage] for count, (stage, _) in zip(counts, parts, strict=True)]
    rest = 0.0
    for cost in costs:
        rest += cost
    # Progress must reach 1 when the rest is done, however much compute it was planned with before.
    total = rest / (1 - progress)
    spent, step = progress * total, first_step
    segments = []
    for (stage, share), count, cost in zip(parts, counts, costs, strict=True):
        segments.append(Segment(stage, share, step, count, spent, total))
        spent += cost
        step += count
    return segments
