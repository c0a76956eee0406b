"""Table and figure of a study's results, as far as they are recorded.

    python tools/study_report.py tools/studies/cifar10.yaml

Writes the table as Markdown beside the study file and the figure to tools/figures/. A mean is over seeds,
with the standard deviation where there are several; differences from the baseline arm are paired by seed, at
equal share of the budget.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study_file import Study, load_study, recorded

COLOURS = ("#1f5fa8", "#c8501e", "#3a8f4d", "#8a4fa3", "#777777", "#b0892b")
INK = "#222222"


def main() -> None:
    """Parse, read, write, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a study file")
    parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "figures")
    options = parser.parse_args()
    study = load_study(options.study)
    rows = recorded(study.results)
    table = options.study.with_suffix(".md")
    table.write_text(markdown(study, rows), encoding="utf-8")
    print(table)
    figure = options.figures / f"study_{options.study.stem}.png"
    draw(study, rows).savefig(figure, dpi=150)
    print(figure)


def grouped(study: Study, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (arm, share), in the order of the study file; the last one of each seed."""
    newest = {row["key"]: row for row in rows}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in study.entries:
        if entry.key in newest:
            groups.setdefault((entry.arm, entry.share), []).append(newest[entry.key])
    return groups


def markdown(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table, with differences from the baseline paired by seed."""
    names = study.numbers
    groups = grouped(study, rows)
    lines = [
        f"| arm | budget | seeds | images seen | FLOPs (1e15) | training (min) | {' | '.join(names)} |",
        f"|---|---|---|---|---|---|{'---|' * len(names)}",
    ]
    for (arm, share), group in groups.items():
        values = [
            shown([row["numbers"][name] for row in group])
            + against(group, groups.get((study.baseline, share), []), name, arm == study.baseline)
            for name in names
        ]
        lines.append(
            f"| {arm} | {share} | {len(group)} | {group[0]['images_seen']:,} | "
            f"{group[0]['flops'] / 1e15:.3g} | {shown([row['seconds'] / 60 for row in group], 1)} | "
            f"{' | '.join(values)} |"
        )
    return "\n".join(lines) + "\n"


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and standard deviation of several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def against(
    group: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], name: str, itself: bool
) -> str:
    """The mean difference from the baseline over the seeds that both have, in brackets."""
    if itself:
        return ""
    theirs = {row["seed"]: row["numbers"][name] for row in baseline}
    pairs = [row["numbers"][name] - theirs[row["seed"]] for row in group if row["seed"] in theirs]
    return f" ({statistics.mean(pairs):+.2f})" if pairs else ""


def draw(study: Study, rows: Sequence[dict[str, Any]]) -> Figure:
    """Each number against wall time and against counted operations; arms with several budgets as lines."""
    names = study.numbers
    figure = Figure(figsize=(9.0, 2.6 * len(names)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(names), 2, squeeze=False)
    costs: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("minutes of training", lambda row: row["seconds"] / 60),
        ("counted operations (1e15)", lambda row: row["flops"] / 1e15),
    )
    arms: dict[str, list[list[dict[str, Any]]]] = {}
    for (arm, _), group in grouped(study, rows).items():
        arms.setdefault(arm, []).append(group)
    for line, name in zip(panels, names, strict=True):
        for panel, (label, cost) in zip(line, costs, strict=True):
            for number, (arm, groups) in enumerate(arms.items()):
                colour = COLOURS[min(number, len(COLOURS) - 1)]
                ordered = sorted(groups, key=lambda group: statistics.mean(map(cost, group)))
                places = [statistics.mean(map(cost, group)) for group in ordered]
                values = [[row["numbers"][name] for row in group] for group in ordered]
                means = [statistics.mean(group) for group in values]
                spreads = [statistics.stdev(group) if len(group) > 1 else 0.0 for group in values]
                if len(groups) > 1:
                    panel.errorbar(
                        places, means, spreads, color=colour, marker="o", ms=4, lw=1.5, capsize=3, label=arm
                    )
                else:
                    panel.plot(places, means, color=colour, marker="x", ls="", ms=5)
                    panel.annotate(
                        arm, (places[0], means[0]), xytext=(4, 2), textcoords="offset points", fontsize=6
                    )
            panel.set_xlabel(label, color=INK, fontsize=8)
            panel.set_ylabel(f"{name} (%)", color=INK, fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25, lw=0.5)
    if arms:
        panels[0][0].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    main()
