"""A run report: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from etpp_ssl.files import replaced_file
from etpp_ssl.report import tables
from etpp_ssl.report.curves import (
    PALETTE,
    XAxis,
    colour_of,
    curve_figure,
    dashed,
    probe_figures,
    quantities,
    x_axes,
)
from etpp_ssl.report.figures import INK, stages_figure
from etpp_ssl.report.gallery import reconstructions
from etpp_ssl.report.history import History, read_histories
from etpp_ssl.report.markup import Captioned, inline_svg, render


def write_report(
    run_dirs: Sequence[str | Path], out: str | Path | None = None, *, say: Callable[[str], None] = print
) -> Path:
    """Write a report about one run, or about several side by side.

    Args:
        run_dirs: run folders, finished or not.
        out: the file to write; by default `report/index.html` in the first run's folder.
        say: told of damaged checkpoints and of the steps that take time.

    Returns:
        The file.

    Raises:
        UserError: if a folder is not a run, or the file cannot be written.
    """
    histories = read_histories(run_dirs, say)
    file = Path(out) if out is not None else Path(run_dirs[0]) / "report" / "index.html"
    text = page(histories, say)
    with replaced_file(file) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
    return file


def page(histories: Sequence[History], say: Callable[[str], None]) -> str:
    """The whole document, as HTML."""
    names = ", ".join(history.name for history in histories)
    pages = [(x_axis.title, _curves_over(histories, x_axis)) for x_axis in x_axes(histories)]
    return render(
        title=f"Report: {names}" if len(histories) <= 3 else f"Report on {len(histories)} runs",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        names=[(history.name, _line(index)) for index, history in enumerate(histories)],
        summary=tables.summary(histories),
        notes=[f"{history.name}: {note}" for history in histories for note in history.notes],
        differences=tables.differences(histories),
        curves=pages if any(drawings for _, drawings in pages) else [],
        plan=_plan(histories),
        stages=tables.stages(histories),
        reconstructions=reconstructions(histories, say),
        probes=tables.probes(histories),
        environment=tables.environment(histories),
        recipes=[(h.name, h.folder.recipe_file.read_text(encoding="utf-8")) for h in histories],
    )


def _line(index: int) -> str:
    """The line of a run in the legend, which stays in view while the figures below it are read: CSS."""
    colour = "currentColor" if PALETTE[index % len(PALETTE)] == INK else colour_of(index)
    return f"{'dashed' if dashed(index) else 'solid'} {colour}"


def _curves_over(histories: Sequence[History], x_axis: XAxis) -> list[Captioned]:
    """Loss, learning rate, bandwidth, speed, waiting for data and probes, where a run has them."""
    drawn = [
        (curve_figure(histories, quantity, x_axis), quantity.label, quantity.note)
        for quantity in quantities(histories)
    ]
    probes = probe_figures(histories, x_axis)
    drawn += [(figure, key, "probe during training") for key, figure in probes.items()]
    return [
        Captioned(inline_svg(figure, f"{x_axis.key}-{number}", f"{label} over {x_axis.label}"), label, note)
        for number, (figure, label, note) in enumerate(drawn)
        if figure is not None
    ]


def _plan(histories: Sequence[History]) -> Captioned | None:
    """How the compute is spent by the curricula that are known."""
    known = {index: history for index, history in enumerate(histories) if history.curriculum is not None}
    if not known:
        return None
    drawn = stages_figure(
        {history.name: history.curriculum for history in known.values() if history.curriculum is not None},
        {h.name: h.recipe.optim.schedule(h.recipe.batch_size) for h in known.values()},
        figsize=(6.0, 4.6),
        colours=[colour_of(index) for index in known],
        legend=False,
    )
    picture = inline_svg(drawn, "stages", "bandwidth, images seen and learning rate over compute")
    return Captioned(picture, "the plan", "over the share of each run's own compute", "wide")
