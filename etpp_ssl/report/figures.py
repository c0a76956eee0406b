"""Figures of a report: curves of one or more runs over steps, compute or time, and how runs spend compute.

Sizes on paper are in inches; the fonts are chosen for a page that shows one inch as 100 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.cost import area_share
from etpp_ssl.report.history import History, number, probe_keys

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""The palette of Okabe and Ito, which colour-blind readers can distinguish, on white and on grey."""

INK = "#222222"
FAINT = "#b0b0b0"
FONT_SIZE = 9

MOST_POINTS = 400
"""Points of a curve; longer logs are averaged down to about this many."""
FEW_POINTS = 12
"""Curves of at most so many points have a mark at each: a single row has no line."""
PALETTE = (COLOURS[1], COLOURS[0], *COLOURS[2:], INK)
FIGURE_SIZE = (4.4, 2.4)
"""Inches; the text stays readable when a phone shows the width in 360 pixels."""


@dataclass(frozen=True)
class Quantity:
    """A measurement in the rows of the log."""

    key: str
    label: str
    note: str = ""
    factor: float = 1.0
    averaged: bool = True
    """Whether points of long logs are means; otherwise the last value stands for its neighbours."""
    from_zero: bool = False
    broken: bool = False
    """Whether the curve is interrupted between stages, because their values are not comparable."""
    task: str | None = None
    """Runs of other tasks are left out."""


QUANTITIES = (
    Quantity("loss", "training loss", "on what each stage shows: stages do not compare", broken=True),
    Quantity("lr", "learning rate", averaged=False, from_zero=True),
    Quantity("bandwidth", "bandwidth (px)", "of the shorter side", averaged=False),
    Quantity("images_per_second", "images per second", "over all processes", from_zero=True),
    Quantity("data_wait_share", "waiting for data (%)", "share of the time", factor=100, from_zero=True),
)


@dataclass(frozen=True)
class XAxis:
    """The x axis of curves."""

    key: str
    title: str
    label: str
    divisor: float = 1.0


def quantities(histories: Sequence[History]) -> list[Quantity]:
    """All quantities in the runs' logs, including the losses of a combined target's parts.

    The losses of masked autoencoders and of classifiers do not compare, so they have a figure each.
    """
    keys = dict.fromkeys(key for history in histories for row in history.rows for key in row)
    parts = [key for key in keys if key.startswith("loss_")]
    whole, *others = QUANTITIES
    tasks = sorted({history.recipe.task for history in histories}, reverse=True)
    wholes = [replace(whole, label=f"{whole.label} ({task})", task=task) for task in tasks]
    return [
        *(wholes if len(tasks) > 1 else [whole]),
        *(Quantity(key, f"part of the loss: {key[5:]}", whole.note, broken=True) for key in parts),
        *others,
    ]


def x_axes(histories: Sequence[History]) -> list[XAxis]:
    """Steps, compute and time, the last in the unit that suits the longest run."""
    last = [number(row.get("seconds")) or 0.0 for history in histories for row in history.rows[-1:]]
    longest = max(last, default=0.0)
    unit, divisor = next(
        (unit, divisor)
        for unit, divisor in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        if longest >= 2 * divisor or divisor == 1
    )
    return [
        XAxis("step", "steps", "optimizer steps"),
        XAxis("equivalent_epochs", "compute", "compute (equivalent epochs)"),
        XAxis("seconds", "time", f"training time ({unit})", divisor),
    ]


def line_of(index: int) -> tuple[str, bool]:
    """The colour of the run at `index` in a report, and whether it is dashed, as its colour is another's."""
    return PALETTE[index % len(PALETTE)], index >= len(PALETTE)


def curve_figure(histories: Sequence[History], quantity: Quantity, x_axis: XAxis) -> Figure | None:
    """One quantity of all runs; None if no run has it."""
    figure, axes = _empty(x_axis.label)
    drawn = False
    for index, history in enumerate(histories):
        if quantity.task in (None, history.recipe.task):
            x, y = points(history.rows, quantity, x_axis)
            drawn |= _draw(axes, x, y, index, len(histories), stepped=quantity.key == "bandwidth")
    if quantity.from_zero and drawn:
        axes.set_ylim(bottom=0)
    return figure if drawn else None


def probe_figures(histories: Sequence[History], x_axis: XAxis) -> dict[str, Figure]:
    """A figure for each result of the probes that ran during training, where a run has two or more."""
    keys = probe_keys([row for history in histories for row in history.probes])
    figures = {}
    for key in keys:
        figure, axes = _empty(x_axis.label)
        longest = 0
        for index, history in enumerate(histories):
            rows = [row for row in history.probes if number(row.get(key)) is not None]
            x = _probe_positions(history, rows, x_axis)
            _draw(axes, x, np.array([row[key] for row in rows], dtype=float), index, len(histories))
            longest = max(longest, len(rows))
        if longest >= 2:
            figures[key] = figure
    return figures


def points(
    rows: Sequence[dict[str, Any]], quantity: Quantity, x_axis: XAxis
) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a curve, thinned stage by stage; NaN between stages where the curve is broken."""
    kept = [
        (row.get("stage"), x / x_axis.divisor, y * quantity.factor)
        for row in rows
        if (x := number(row.get(x_axis.key))) is not None and (y := _value(row, quantity.key)) is not None
    ]
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    size = -(-len(kept) // MOST_POINTS)
    for stage in dict.fromkeys(stage for stage, _, _ in kept):
        inside = np.array([(x, y) for other, x, y in kept if other == stage])
        parts = np.array_split(inside, -(-len(inside) // size))
        reduced = np.array([part.mean(0) if quantity.averaged else part[-1] for part in parts])
        if quantity.broken and xs:
            xs.append(reduced[:1, 0])
            ys.append(np.array([np.nan]))
        xs.append(reduced[:, 0])
        ys.append(reduced[:, 1])
    if not xs:
        return np.empty(0), np.empty(0)
    return np.concatenate(xs), np.concatenate(ys)


def _value(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if key == "bandwidth" and isinstance(value, list) and value:
        return number(min(value))
    return number(value)


def _probe_positions(history: History, rows: list[dict[str, Any]], x_axis: XAxis) -> np.ndarray:
    """Positions of probes on an axis, interpolated from their steps."""
    steps = np.array([row["step"] for row in rows], dtype=float)
    known = [(row["step"], x) for row in history.rows if (x := number(row.get(x_axis.key))) is not None]
    if x_axis.key == "step" or not known:
        return steps
    at, there = np.array(known, dtype=float).T
    return np.asarray(np.interp(steps, at, there)) / x_axis.divisor


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, index: int, count: int, stepped: bool = False) -> bool:
    colour, is_dashed = line_of(index)
    style: dict[str, Any] = {"color": colour, "lw": 1.5}
    if stepped:
        style["drawstyle"] = "steps-pre"
    axes.plot(x, y, **style, ls="--" if is_dashed else "-")
    if count > 1 and not is_dashed:
        axes.plot(x, y, **style, ls=turns(index, count), zorder=3)
    if len(x) <= FEW_POINTS:
        # Marks that coincide, like rings around each other.
        axes.plot(x, y, color=colour, ls="", marker="o", markersize=3 + 2 * min(count - 1 - index, 3))
    return len(x) > 0


def _empty(x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label, size=FONT_SIZE, color=INK)
    dress(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, lw=0.5, alpha=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    return figure, axes


def stages_figure(
    curricula: Mapping[str, Curriculum],
    learning_rate: Callable[[float], float] | Mapping[str, Callable[[float], float]],
    *,
    figsize: tuple[float, float] = (8.3, 5.2),
    colours: Sequence[str] = (INK, *COLOURS),
    legend: bool = True,
) -> Figure:
    """How runs spend their compute: bandwidth, images seen and learning rate over the share of compute.

    Args:
        curricula: by the name in the legend. The legend also says how many times the images each run
            sees that its compute would buy at full resolution.
        learning_rate: from the share of compute spent, in [0, 1], as an optimizer `Schedule`; one for
            all, as it does not depend on the stages, or one for each name.
        figsize: (width, height) in inches.
        colours: of the curricula, in turn.
        legend: whether the figure names the curricula; without it, the page around has to.

    Returns:
        A figure on white with three axes in this order; bandwidths in pixels (of the shorter side where
        images are not square), images counted with repeats. Bandwidths that coincide are drawn side by
        side.

    Raises:
        UserError: if there are no curricula.
    """
    if not curricula:
        raise UserError("stages_figure needs at least one curriculum")
    figure = Figure(figsize=figsize, facecolor="white", layout="constrained")
    bandwidth_axes, images_axes, rate_axes = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.7, 1.3, 1]}
    )
    shares = np.linspace(0, 1, 1001)
    rates = learning_rate if isinstance(learning_rate, Mapping) else {"": learning_rate}
    for index, rate in enumerate(rates.values()):
        colour = colours[index % len(colours)] if rates is learning_rate else INK
        rate_axes.plot(100 * shares, [rate(share) for share in shares.tolist()], color=colour, lw=1.8)
    for index, line in enumerate(rate_axes.lines if len(rates) > 1 else ()):
        dashes = turns(index, len(rates))
        rate_axes.plot(*line.get_data(), color=line.get_color(), lw=1.8, linestyle=dashes, zorder=3)
    for index, (name, curriculum) in enumerate(curricula.items()):
        colour = colours[index % len(colours)]
        label = f"{name} ({images_gained(curriculum):.3g}× the images)"
        # Neighbouring tracks that step up together stay apart if what is drawn higher steps earlier.
        aside = 2.6 * ((len(curricula) - 1) / 2 - index) / 72
        apart = bandwidth_axes.transData + ScaledTranslation(-aside, aside, figure.dpi_scale_trans)
        starts = [100 * stage.progress for stage in curriculum.stages] + [100.0]
        shown = [min(stage.bandwidth) for stage in curriculum.stages]
        bandwidth_axes.step(
            # Moved aside, tracks must still reach both ends of the axis, which cuts what is beyond.
            [-5, *starts[1:-1], 105],
            [*shown, shown[-1]],
            where="post",
            color=colour,
            lw=2,
            label=label,
            transform=apart,
        )
        seen = [stage.first_slot for stage in curriculum.stages] + [curriculum.num_slots]
        images_axes.plot(starts, seen, color=colour, lw=1.8)
        if len(curricula) > 1:
            dashes = turns(index, len(curricula))
            images_axes.plot(starts, seen, color=colour, lw=1.8, linestyle=dashes, zorder=3)
    _dress_stages(figure, list(curricula.values()))
    if legend:
        figure.legend(
            loc="outside upper center",
            ncols=min(2, len(curricula)),
            fontsize=FONT_SIZE,
            frameon=False,
            labelcolor=INK,
            handlelength=1.8,
        )
    return figure


def _dress_stages(figure: Figure, curricula: list[Curriculum]) -> None:
    bandwidth_axes, images_axes, rate_axes = figure.axes
    shown = sorted({min(stage.bandwidth) for curriculum in curricula for stage in curriculum.stages})
    square = all(curriculum.image_size[0] == curriculum.image_size[1] for curriculum in curricula)
    bandwidth_axes.set_ylabel("bandwidth (px)" if square else "bandwidth of the\nshorter side (px)")
    spread = max(shown[-1] - shown[0], 0.2 * shown[-1], 1)
    bandwidth_axes.set_ylim(shown[0] - 0.15 * spread, shown[-1] + 0.15 * spread)
    if _far_enough(shown, 0.09 * spread):
        bandwidth_axes.set_yticks(shown)
    unit, name = _unit(max(curriculum.num_slots for curriculum in curricula))
    images_axes.set_ylabel(f"images seen\n({name})" if name else "images seen")
    images_axes.set_ylim(bottom=0)
    images_axes.yaxis.set_major_locator(MaxNLocator(4))
    images_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_locator(MaxNLocator(3))
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    rate_axes.set_xlabel("share of the run's compute (%)")
    rate_axes.set_xlim(0, 100)
    changes = {100 * stage.progress for curriculum in curricula for stage in curriculum.stages[1:]}
    for axes in figure.axes:
        dress(axes)
        axes.yaxis.label.set(size=FONT_SIZE, color=INK)
        axes.xaxis.label.set(size=FONT_SIZE, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        for change in changes:
            axes.axvline(change, color=FAINT, lw=0.8, ls=":", zorder=0)
    figure.align_ylabels()


def dress(axes: Axes, font_size: float = FONT_SIZE) -> None:
    """Draw the frame faintly, and the numbers along it in ink."""
    axes.tick_params(labelsize=font_size, color=FAINT, labelcolor=INK)
    axes.spines[:].set_color(FAINT)


def turns(index: int, count: int) -> tuple[float, tuple[float, float]]:
    """Dashes of the line at `index` of `count`, which take turns where lines coincide.

    Drawn above all solid lines; over its own one the dashes do not show.
    """
    return 4.0 * index, (4.0, 4.0 * (count - 1))


def plain(value: float) -> str:
    """A number along an axis, as one reads it beside its neighbours: 0.00008 below 0.00016, not 8e-05."""
    return f"{value:,.12f}".rstrip("0").rstrip(".")


def _far_enough(values: list[int], distance: float) -> bool:
    return all(after - before >= distance for before, after in pairwise(values))


def _unit(largest: int) -> tuple[int, str]:
    for unit, name in ((1_000_000, "millions"), (1_000, "thousands")):
        if largest >= 2 * unit:
            return unit, name
    return 1, ""


def images_gained(curriculum: Curriculum) -> float:
    """Images seen over images that the same compute buys at full resolution."""
    full = sum(
        stage.num_steps * stage.batch_size * area_share(stage.bandwidth, curriculum.image_size)
        for stage in curriculum.stages
    )
    return curriculum.num_slots / full
