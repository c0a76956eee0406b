"""The parts of a run report that are tables and curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etpp_ssl.config import show_size
from etpp_ssl.report import markup
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
from etpp_ssl.report.differences import ABSENT, differences
from etpp_ssl.report.figures import INK, images_gained, stages_figure
from etpp_ssl.report.history import History, number, probe_keys
from etpp_ssl.report.stage_rows import duration, stage_rows, stage_titles
from etpp_ssl.report.svg import inline_svg


def legend(histories: Sequence[History]) -> str:
    """Names and colours of several runs; it stays in view while the figures below it are read."""
    if len(histories) < 2:
        return ""
    entries = []
    for index, history in enumerate(histories):
        line = f"{'dashed' if dashed(index) else 'solid'} {_page_colour(index)}"
        entries.append(f'<span><i style="border-top:.25rem {line}"></i>{markup.escape(history.name)}</span>')
    return f'<div class="legend">{"".join(entries)}</div>\n'


def summary(histories: Sequence[History]) -> str:
    """What each run is and how far it came."""
    table = {history.name: _summary_of(history) for history in histories}
    keys = dict.fromkeys(key for values in table.values() for key in values)
    rows = [[key, *(values.get(key, ABSENT) for values in table.values())] for key in keys]
    notes = [f"{history.name}: {note}" for history in histories for note in history.notes]
    said = "".join(markup.paragraph(note) for note in notes)
    return markup.section(
        "summary",
        "Summary",
        markup.table(["", *table], rows),
        f'<div class="notes">{said}</div>' if said else "",
    )


def _summary_of(history: History) -> dict[str, str]:
    recipe, last = history.recipe, history.rows[-1] if history.rows else {}
    total = history.curriculum.num_steps if history.curriculum is not None else None
    state = {None: "unknown", True: "finished", False: "not finished"}[history.finished]
    values = {
        "state": state if history.steps_done else "not started",
        "steps": f"{history.steps_done:,}" + (f" of {total:,}" if total is not None else ""),
        "image, patch": f"{show_size(recipe.size)}, {show_size(recipe.patch_size)} px",
        "channels": str(recipe.in_chans),
        "encoder": recipe.model.name,
        "curriculum": recipe.curriculum.name,
        "target": recipe.target.name,
        "data": recipe.data.name,
    }
    if history.curriculum is not None and len(history.curriculum.stages) > 1:
        values["images gained"] = f"{images_gained(history.curriculum):.3g} x those at full size"
    epochs, images, seconds = (number(last.get(k)) for k in ("equivalent_epochs", "images_seen", "seconds"))
    if epochs is not None:
        whole = f" of {history.curriculum.equivalent_epochs:.4g}" if history.curriculum is not None else ""
        values["compute"] = f"{epochs:.4g}{whole} equivalent epochs"
    if images is not None:
        values["images seen"] = f"{images:,.0f}"
    if seconds:
        values["training time"] = duration(seconds)
        if images is not None:
            values["images per second"] = f"{images / seconds:,.0f}"
    if "loss" in last:
        values["last training loss"] = f"{last['loss']:.4f}"
    for key in probe_keys(history.probes):
        results = [row for row in history.probes if number(row.get(key)) is not None]
        values[f"last {key}"] = f"{results[-1][key]:.4g} (step {results[-1]['step']:,})"
    if number(last.get("bad_images")):
        values["unreadable images"] = f"{last['bad_images']:,}"
    return values


def curves(histories: Sequence[History]) -> str:
    """Loss, learning rate, bandwidth, speed and waiting, over steps, compute and time."""
    pages = [(x_axis.title, _curves_over(histories, x_axis)) for x_axis in x_axes(histories)]
    if not any(content for _, content in pages):
        return markup.section("curves", "Curves", markup.paragraph("Nothing is logged yet."))
    return markup.section("curves", "Curves", markup.tabs("curves-over", pages))


def _curves_over(histories: Sequence[History], x_axis: XAxis) -> str:
    figures = []
    for quantity in quantities(histories):
        drawn = curve_figure(histories, quantity, x_axis)
        if drawn is not None:
            key, about = f"{quantity.key}-{x_axis.key}", f"{quantity.label} over {x_axis.label}"
            figures.append(markup.figure(inline_svg(drawn, key, about), quantity.label, quantity.note))
    for key, drawn in probe_figures(histories, x_axis).items():
        about = f"{key} over {x_axis.label}"
        figures.append(
            markup.figure(inline_svg(drawn, f"{key}-{x_axis.key}", about), key, "probe during training")
        )
    return f'<div class="curves">{"".join(figures)}</div>' if figures else ""


def curriculum(histories: Sequence[History]) -> str:
    """How the compute is spent: a picture of the plan, and a table of what each stage came to."""
    known = {index: history for index, history in enumerate(histories) if history.curriculum is not None}
    parts = []
    if known:
        drawn = stages_figure(
            {history.name: history.curriculum for history in known.values() if history.curriculum},
            {h.name: h.recipe.optim.schedule(h.recipe.batch_size) for h in known.values()},
            figsize=(6.0, 4.6),
            colours=[colour_of(index) for index in known],
            legend=False,
        )
        picture = inline_svg(drawn, "stages", "bandwidth, images seen and learning rate over compute")
        parts.append(markup.figure(picture, "the plan", "over the share of each run's own compute", "wide"))
    rows = [[history.name, *row] for history in histories for row in stage_rows(history)]
    if rows:
        parts.append(markup.table(["run", *stage_titles()], rows, "numbers"))
    return markup.section("curriculum", "Curriculum, compute and time", *parts)


def probes(histories: Sequence[History]) -> str:
    """Results of the probes, during training and later."""
    parts = []
    for history in histories:
        for rows, when in ((history.probes, "during training"), (history.later_probes, "by etpp probe")):
            keys = probe_keys(rows)
            if not keys:
                continue
            protocols = any(row.get("protocol") for row in rows)
            cells = [
                [_weights(row), *(_result(row.get(key)) for key in keys)]
                + ([_protocol(row.get("protocol"))] if protocols else [])
                for row in rows
            ]
            parts.append(f"<h3>{markup.escape(history.name)}, {when}</h3>")
            weights = "step" if all("step" in row for row in rows) else "weights"
            parts.append(markup.table([weights, *keys, *(["protocol"] if protocols else [])], cells))
    nothing = markup.paragraph("No probe has run.", "soft")
    return markup.section("probes", "Probes", *(parts or [nothing]))


def _weights(row: dict[str, Any]) -> str:
    """The step of the run's own weights, or what others were read from."""
    return f"{row['step']:,}" if "step" in row else str(row.get("init", ABSENT))


def _result(value: object) -> str:
    known = number(value)
    return ABSENT if known is None else f"{known:.5g}"


def _protocol(values: object) -> str:
    if not isinstance(values, dict):
        return ABSENT
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def recipe_differences(histories: Sequence[History]) -> str:
    """Keys that differ between the recipes of several runs; nothing for one run."""
    if len(histories) < 2:
        return ""
    found = differences([history.recipe for history in histories])
    rows = [[d.key + (" (no effect on the result)" if d.neutral else ""), *d.values] for d in found]
    head = ["key", *(history.name for history in histories)]
    same = markup.paragraph("The recipes are the same in every key but the run folder.")
    return markup.section(
        "differences", "Differences between the recipes", markup.table(head, rows) if rows else same
    )


def recipes(histories: Sequence[History]) -> str:
    """Every recipe in full, folded away."""
    parts = []
    for history in histories:
        text = history.folder.recipe_file.read_text(encoding="utf-8")
        parts.append(markup.details(f"recipe of {history.name}", f"<pre>{markup.escape(text)}</pre>"))
    return markup.section("recipe", "Recipe" if len(histories) == 1 else "Recipes", *parts)


def environment(histories: Sequence[History]) -> str:
    """Versions, threads, processes and device, of each run's newest checkpoint."""
    keys = dict.fromkeys(key for history in histories for key in history.environment)
    if not keys:
        nothing = markup.paragraph("It is recorded with the first checkpoint.", "soft")
        return markup.section("environment", "Environment", nothing)
    rows = [[key, *(history.environment.get(key, ABSENT) for history in histories)] for key in keys]
    return markup.section(
        "environment", "Environment", markup.table(["", *(h.name for h in histories)], rows)
    )


def _page_colour(index: int) -> str:
    return "currentColor" if PALETTE[index % len(PALETTE)] == INK else colour_of(index)
