"""Table and figure of a study's results, as far as they are recorded.

    python tools/study_report.py tools/studies/cifar10.yaml [--into docs/study/index.md]

Writes the tables as Markdown beside the study file, and between the lines `<!-- study NAME -->` and
`<!-- end of study NAME -->` of another file, and the figure to docs/figures/. What was run with several
seeds comes first, what was run with one is folded. A mean is over seeds, with the standard deviation where
there are several; differences from an arm's control, in brackets, are paired by seed, at equal share of the
budget. A last table says which of the budgets that were run, with as many seeds, is the cheapest one to reach
what the original's code did, on average, and how many times less its training takes, by the runs of days on
which both were trained. In the figure, thin lines join the runs of one seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_file import Study, load_study, recorded

COLOURS = ("#1f5fa8", "#c8501e", "#3a8f4d", "#8a4fa3", "#777777", "#b0892b", "#d6478f", "#2aa6a6", "#6b4423")
MARKERS = "X^vs*DPp<>hd"
"""Of arms with a single budget."""
LINES = ("-", "--", ":")
"""Of arms with several, once all colours are taken."""
INK = "#222222"

Groups = dict[tuple[str, str], list[dict[str, Any]]]
"""Results by (arm, share of the budget)."""


def main() -> None:
    """Parse, read, write, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a study file")
    parser.add_argument("--figures", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    parser.add_argument("--into", type=Path, metavar="FILE", help="Markdown that shows the tables, too")
    options = parser.parse_args()
    study = load_study(options.study)
    rows = recorded(study.results)
    tables = options.study.with_suffix(".md")
    tables.write_text(markdown(study, rows), encoding="utf-8")
    print(tables)
    if options.into is not None:
        text = options.into.read_text(encoding="utf-8")
        shown_in = with_tables(text, options.study.stem, markdown(study, rows))
        options.into.write_text(shown_in, encoding="utf-8")
        print(options.into)
    figure = options.figures / f"study_{options.study.stem}.png"
    draw(study, rows).savefig(figure, dpi=150)
    print(figure)


def with_tables(text: str, name: str, tables: str) -> str:
    """A Markdown text with a study's tables between their two marks.

    Raises:
        ValueError: if there are no such marks.
    """
    start, end = f"<!-- study {name} -->\n", f"<!-- end of study {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"there is no {start.strip()} with an {end}")
    return f"{before}{start}\n{tables}\n{end}{after}"


def grouped(study: Study, rows: Sequence[dict[str, Any]]) -> Groups:
    """Rows by (arm, share), in the order of the study file; the last one of each seed."""
    newest = {row["key"]: row for row in rows}
    groups: Groups = {}
    for entry in study.entries:
        if entry.key in newest:
            groups.setdefault((entry.arm, entry.share), []).append(newest[entry.key])
    return groups


def markdown(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown tables: runs of several seeds, of one seed, and what reaches the original's."""
    groups = grouped(study, rows)
    several = {key: group for key, group in groups.items() if len(group) > 1}
    single = {key: group for key, group in groups.items() if len(group) == 1}
    tables = [table(study, groups, chosen) for chosen in (several, single) if chosen]
    if len(tables) > 1:
        summary = f"<summary>What was run with one seed (rows: {len(single)})</summary>"
        tables[1] = "\n".join(["<details markdown>", summary, "", tables[1], "", "</details>"])
    reached = reaching(study, groups)
    return "\n\n".join([*tables, *(["\n".join(reached)] if reached else [])]) + "\n"


def table(study: Study, groups: Groups, chosen: Groups) -> str:
    """Some of the results as a Markdown table, with differences from each arm's control paired by seed."""
    names = study.numbers
    lines = [
        f"| arm | budget | seeds | images seen | TFLOP | training (min) | CPU (min) | {' | '.join(names)} |",
        f"|---|---|---|---|---|---|---|{'---|' * len(names)}",
    ]
    for (arm, share), group in chosen.items():
        control = study.controls[arm]
        theirs = groups.get((control, share), []) if arm != control else []
        values = [measured(group, theirs, name) for name in names]
        lines.append(
            f"| {arm} | {share} | {len(group)} | {group[0]['images_seen']:,} | "
            f"{group[0]['flops'] / 1e12:,.3g} | {shown([row['seconds'] / 60 for row in group], 1)} | "
            f"{shown([row['cpu_seconds'] / 60 for row in group], 1)} | {' | '.join(values)} |"
        )
    return "\n".join(lines)


def measured(group: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]], name: str) -> str:
    """A number of some runs, and the difference from the control over the seeds that both have."""
    values = {row["seed"]: row["numbers"][name] for row in group if name in row["numbers"]}
    theirs = {row["seed"]: row["numbers"][name] for row in control if name in row["numbers"]}
    if not values:
        return ""
    pairs = [value - theirs[seed] for seed, value in values.items() if seed in theirs]
    return shown(list(values.values())) + (f" ({shown(pairs, sign='+')})" if pairs else "")


def reaching(study: Study, groups: Groups) -> list[str]:
    """A table of the cheapest runs that are, on average, at least as good as the original's code.

    What has fewer seeds than the original is left out: of many single runs, one is lucky. So is what was
    never trained on a day on which the original was: times of two days may be of two machines.
    """
    originals = {entry.arm for entry in study.entries if entry.original}
    lines = []
    for (arm, share), group in groups.items():
        for name in study.numbers if arm in originals else ():
            theirs = having(group, name)
            if not theirs:
                continue
            goal = average(theirs, name)
            good = []
            for (other, part), runs in groups.items():
                ours = having(runs, name)
                times = minutes_of_common_days(theirs, ours)
                if other in originals or times is None or len(ours) < len(theirs):
                    continue
                value = average(ours, name)
                if value >= goal:
                    good.append((times[0] / times[1], f"{other} at {part}", value, times))
            cells = "no arm | | | | |"
            if good:
                ratio, which, value, times = max(good)
                cells = f"{which} | {value:.2f} | {times[0]:.1f} | {times[1]:.1f} | {ratio:.2f} |"
            lines.append(f"| {arm} at {share} | {name} {goal:.2f} | {cells}")
    head = "| original | its mean | reached by | with | original (min) | ours (min) | times less |"
    return [head, "|---|---|---|---|---|---|---|", *lines] if lines else []


def minutes_of_common_days(
    some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> tuple[float, float] | None:
    """Mean minutes of training of two kinds of runs over the days that both have; None without such days.

    A day weighs the same in both, however many of its runs are of either kind.
    """
    days = {row["date"] for row in some} & {row["date"] for row in others}
    if not days:
        return None
    first, second = (
        statistics.mean(
            statistics.mean(row["seconds"] / 60 for row in rows if row["date"] == day) for day in days
        )
        for rows in (some, others)
    )
    return first, second


def having(group: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The runs that have a number."""
    return [row for row in group if name in row["numbers"]]


def average(group: Sequence[dict[str, Any]], name: str) -> float:
    """The mean of a number over runs that have it."""
    return statistics.mean(row["numbers"][name] for row in group)


def shown(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean, and standard deviation of several."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(study: Study, rows: Sequence[dict[str, Any]]) -> Figure:
    """Each number against wall time and against counted operations; arms with several budgets as lines."""
    figure = Figure(figsize=(9.0, 2.9 * len(study.numbers)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(study.numbers), 2, squeeze=False)
    costs: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("minutes of training", lambda row: row["seconds"] / 60),
        ("counted operations (TFLOP)", lambda row: row["flops"] / 1e12),
    )
    originals = {entry.arm for entry in study.entries if entry.original}
    arms: dict[str, list[list[dict[str, Any]]]] = {}
    for (arm, _), group in grouped(study, rows).items():
        arms.setdefault(arm, []).append(group)
    looks = looks_of(arms, originals)
    for line, name in zip(panels, study.numbers, strict=True):
        for panel, (label, cost) in zip(line, costs, strict=True):
            for arm, groups in arms.items():
                with_name = [having(group, name) for group in groups]
                with_name = sorted(filter(None, with_name), key=lambda group: cost(group[0]))
                draw_arm(panel, arm, with_name, name, cost, looks[arm])
            panel.set_xlabel(label, color=INK, fontsize=8)
            panel.set_ylabel(f"{name} (%)", color=INK, fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25, lw=0.5)
    if arms:
        handles = dict(zip(*panels[0][0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=7
        )
    return figure


@dataclass(frozen=True)
class Look:
    """How an arm is drawn."""

    colour: str
    marker: str
    line: str
    """Empty for an arm of a single budget."""


def looks_of(arms: dict[str, list[list[dict[str, Any]]]], originals: set[str]) -> dict[str, Look]:
    """A look for each arm: no two lines are alike, and no two markers.

    Args:
        arms: the runs of each arm, by budget.
        originals: arms of the original's code, which are in ink.
    """
    looks = {}
    for several in (True, False):
        of_a_kind = [arm for arm, groups in arms.items() if (len(groups) > 1) == several]
        for number, arm in enumerate(of_a_kind):
            colour = INK if arm in originals else COLOURS[number % len(COLOURS)]
            if several:
                looks[arm] = Look(colour, "o", LINES[number // len(COLOURS) % len(LINES)])
            else:
                looks[arm] = Look(colour, MARKERS[number % len(MARKERS)], "")
    return looks


def draw_arm(
    panel: Axes,
    arm: str,
    groups: Sequence[Sequence[dict[str, Any]]],
    name: str,
    cost: Callable[[dict[str, Any]], float],
    look: Look,
) -> None:
    """An arm's means over its budgets, with bars of one standard deviation."""
    places = [statistics.mean(map(cost, group)) for group in groups]
    values = [[row["numbers"][name] for row in group] for group in groups]
    means = [statistics.mean(group) for group in values]
    # No bar of length zero where there is nothing to spread.
    spreads = [statistics.stdev(group) if len(group) > 1 else math.nan for group in values]
    shape = {"marker": look.marker, "ls": look.line, "ms": 4 if look.line else 6}
    panel.errorbar(places, means, spreads, color=look.colour, lw=1.5, capsize=3, label=arm, **shape)
    for seed in sorted({row["seed"] for group in groups for row in group}):
        own = [row for group in groups for row in group if row["seed"] == seed]
        heights = [row["numbers"][name] for row in own]
        panel.plot(list(map(cost, own)), heights, color=look.colour, lw=0.5, alpha=0.4)


if __name__ == "__main__":
    main()
