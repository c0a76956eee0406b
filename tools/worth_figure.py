"""The figure of the README: accuracy over minutes of training, drawn from the results of the CIFAR-10 study.

Three lines: the curriculum, constant resolution, and the original MAE code. A point is the mean of a budget
that was run with three seeds, a bar the standard deviation. The original was run with one budget, so its line
is level from there.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study_file import load_study, recorded
from study_report import grouped

STUDY = Path(__file__).parent / "studies" / "cifar10.yaml"
NUMBER = "linear_cached"
"""Top-1 of a linear head on frozen features, in per cent."""
ARMS = {
    "efficienttrain": ("etpp_ssl, curriculum", "#d55e00", "-"),
    "constant": ("etpp_ssl, constant resolution", "#0072b2", "-"),
    "original_fp32": ("original MAE code", "#444444", "--"),
}
"""Arm of the study: name, colour and line style in the figure."""
SEEDS = 3
INK = "#222222"


@dataclass(frozen=True)
class Point:
    """One budget of one arm: means and standard deviations over seeds."""

    minutes: float
    accuracy: float
    spread: float


def points(arm: str) -> list[Point]:
    """The budgets of an arm that were run with at least `SEEDS` seeds, cheapest first."""
    study = load_study(STUDY)
    groups = grouped(study, recorded(study.results))
    return sorted(
        (point(rows) for (name, _), rows in groups.items() if name == arm and len(rows) >= SEEDS),
        key=lambda found: found.minutes,
    )


def point(rows: Sequence[dict[str, Any]]) -> Point:
    """Of the runs of one budget."""
    values = [row["numbers"][NUMBER] for row in rows]
    minutes = statistics.mean(row["seconds"] / 60 for row in rows)
    return Point(minutes, statistics.mean(values), statistics.stdev(values))


def worth_figure() -> Figure:
    """The figure, on white; 8.3 inches wide."""
    figure = Figure(figsize=(8.3, 4.0), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for arm, (name, colour, line) in ARMS.items():
        found = points(arm)
        minutes, values = [p.minutes for p in found], [p.accuracy for p in found]
        spreads = [p.spread for p in found]
        axes.errorbar(
            minutes,
            values,
            spreads,
            color=colour,
            linestyle=line,
            marker="o",
            ms=6,
            lw=2,
            capsize=3,
            elinewidth=1,
        )
        if len(found) == 1:
            axes.axhline(values[0], color=colour, linestyle=line, lw=1.2, zorder=0)
        axes.annotate(
            f"{name}: {values[-1]:.1f} %",
            (minutes[-1], values[-1]),
            xytext=(-8, -14) if len(found) == 1 else (10, 0),
            textcoords="offset points",
            ha="right" if len(found) == 1 else "left",
            va="center",
            color=colour,
            fontsize=11,
        )
    axes.set_xlim(0, 21.5)
    axes.set_xlabel("minutes of pre-training on one CPU core", color=INK, fontsize=10)
    axes.set_ylabel("linear probe, top-1 (%)", color=INK, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
