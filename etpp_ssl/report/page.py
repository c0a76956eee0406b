"""A run report: one HTML file that needs nothing else, no network and no script.

Its gallery shows a few images, masked, as the run's checkpoints predict them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from markupsafe import Markup

from etpp_ssl.config import UserError
from etpp_ssl.files import check_place, replaced_file
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.report import tables
from etpp_ssl.report.figures import (
    INK,
    XAxis,
    curve_figure,
    line_of,
    probe_figures,
    quantities,
    stages_figure,
    x_axes,
)
from etpp_ssl.report.history import History, read_histories
from etpp_ssl.report.markup import Captioned, image, inline_svg, png, render
from etpp_ssl.report.panels import Panel, missing_picture
from etpp_ssl.report.results import collapses, result_tables
from etpp_ssl.report.viewer import ImagePanels, InputImage, Viewer, images_of_run
from etpp_ssl.run_folder import Checkpoint


def write_report(
    run_dirs: Sequence[str | Path], out: str | Path | None = None, *, say: Callable[[str], None] = print
) -> Path:
    """Write a report about one run, or about several side by side.

    Args:
        run_dirs: run folders, finished or not.
        out: the file to write; by default `report/index.html` in the run's folder, of several runs
            `report/comparison.html` in the first one's.
        say: told of damaged checkpoints and of the steps that take time.

    Returns:
        The file.

    Raises:
        UserError: if a folder is not a run, or the file cannot be written.
    """
    histories = read_histories(run_dirs, say)
    name = "index.html" if len(histories) == 1 else "comparison.html"
    file = Path(out) if out is not None else Path(run_dirs[0]) / "report" / name
    check_place(file)
    text = page(histories, say)
    with replaced_file(file) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
    return file


def page(histories: Sequence[History], say: Callable[[str], None]) -> str:
    """The whole document, as HTML."""
    names = ", ".join(history.name for history in histories)
    pages = [(x_axis.title, _curves_over(histories, x_axis)) for x_axis in x_axes(histories)]
    return render(
        "page.html.j2",
        title=f"Report: {names}" if len(histories) <= 3 else f"Report on {len(histories)} runs",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        names=[(history.name, _line(index)) for index, history in enumerate(histories)],
        summary=tables.summary(histories),
        notes=[
            f"{history.name}: {note}"
            for history in histories
            for note in (*map("warning: {}".format, collapses(history)), *history.notes)
        ],
        differences=tables.differences(histories),
        curves=pages if any(drawings for _, drawings in pages) else [],
        plan=_plan(histories),
        stages=tables.stages(histories),
        reconstructions=reconstructions(histories, say),
        results=result_tables(histories),
        environment=tables.environment(histories),
        recipes=[(h.name, h.folder.recipe_file.read_text(encoding="utf-8")) for h in histories],
    )


def _line(index: int) -> str:
    """The line of a run in the legend, which stays in view while the figures below it are read: CSS."""
    colour, is_dashed = line_of(index)
    return f"{'dashed' if is_dashed else 'solid'} {'currentColor' if colour == INK else colour}"


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
        {h.name: h.recipe.optim.learning_rates(h.recipe.batch_size) for h in known.values()},
        figsize=(6.0, 4.6),
        colours=[line_of(index)[0] for index in known],
        legend=False,
    )
    picture = inline_svg(drawn, "stages", "bandwidth, images seen and learning rate over compute")
    return Captioned(picture, "the plan", "over the share of each run's own compute", "wide")


T = TypeVar("T")

NUM_IMAGES = 4
MOST_CHECKPOINTS = 5
MOST_SAVED = 4
"""PNGs of checkpoints that are gone, saved earlier by `etpp reconstruct`."""


@dataclass
class RunGallery:
    """What is shown of a run."""

    name: str
    text: str = ""
    """What a reader must know about the panels; empty where there are none."""
    reason: str = ""
    """Why there are none."""
    crops: list[Captioned] = field(default_factory=list)
    """The first image as each stage shows it."""
    strips: list[tuple[str, list[Captioned]]] = field(default_factory=list)
    """The name of each image, and its panels."""
    saved: list[Markup] = field(default_factory=list)
    """Pictures that `etpp reconstruct` saved of checkpoints that are gone."""
    num_saved: int = 0
    """Steps of which there is such a picture, whether it is among `saved` or not."""


def reconstructions(histories: Sequence[History], say: Callable[[str], None]) -> list[RunGallery]:
    """A few images of each run's data, masked, and predicted by its checkpoints."""
    galleries = []
    for history in histories:
        gallery = RunGallery(history.name)
        try:
            _fill(gallery, history, say)
        except UserError as error:
            gallery.reason = f"Not shown: {error}."
        _add_saved(gallery, history)
        galleries.append(gallery)
    return galleries


def _fill(gallery: RunGallery, history: History, say: Callable[[str], None]) -> None:
    if isinstance(history.recipe, FinetuneRecipe):
        gallery.reason = "A classifier predicts classes, not pixels."
        return
    if not history.checkpoints:
        gallery.reason = "There is no checkpoint yet."
        return
    images, split = images_of_run(history.folder, NUM_IMAGES)
    viewer = Viewer.of_run(history.folder)
    chosen: list[Checkpoint] = []
    seen: list[list[ImagePanels]] = []
    for checkpoint in spread(history.checkpoints, MOST_CHECKPOINTS):
        if not checkpoint.path.is_dir():
            say(f"{history.name}: the run has removed its checkpoint of step {checkpoint.step} meanwhile")
            continue
        say(f"{history.name}: reconstructing at step {checkpoint.step}")
        viewer.load(checkpoint)
        seen.append([viewer.look(image) for image in images])
        chosen.append(checkpoint)
    if not chosen:
        gallery.reason = "The run has removed its checkpoints meanwhile."
        return
    kept = len(history.checkpoints)
    by = f"{len(chosen)} of the {kept} checkpoints" if kept > 1 else "the one checkpoint"
    sentences = [
        f"{len(images)} images of the {split} data at full size, with fixed masks, predicted by "
        f"{by} that the run has kept",
        *_explanation(seen[-1][0]),
        missing_picture(viewer.target) or "",
        viewer.channels.caption,
    ]
    gallery.text = " ".join(_sentence(sentence) for sentence in sentences if sentence)
    gallery.crops = [_captioned(panel, seen[-1][0]) for panel in seen[-1][0].crops]
    gallery.strips = [_strip(image, chosen, [panels[i] for panels in seen]) for i, image in enumerate(images)]


def _explanation(shown: ImagePanels) -> list[str]:
    """What the panels' own captions are too short for."""
    notes = {
        panel.note: "outlined" if panel.leaks else "orientations" if panel.magnified else "predictions"
        for panel in shown.predictions
        if panel.note
    }
    return [f"{which}: {note}" for note, which in notes.items()]


def _strip(
    shown: InputImage, checkpoints: list[Checkpoint], seen: list[ImagePanels]
) -> tuple[str, list[Captioned]]:
    """One image: whole, masked, in the best picture of each checkpoint, and in the one that leaks."""
    last = seen[-1]
    panels = [last.crops[-1]._replace(note=""), last.masked._replace(note="")]
    for checkpoint, there in zip(checkpoints, seen, strict=True):
        note = f"loss {there.reconstruction.loss:.3g}"
        title = f"step {checkpoint.step:,}"
        panels += [panel._replace(title=title, note=note) for panel in there.predictions[:1]]
    drawn = [_captioned(panel, last) for panel in panels]
    newest = f"step {checkpoints[-1].step:,}"
    for panel in [panel for panel in last.predictions if panel.leaks][:1]:
        drawn.append(
            _captioned(panel._replace(title=f"{newest}, leaking", note="true statistics"), last, "leaks")
        )
    # What is not made of pixels needs its target beside it, which nobody sees in the image.
    drawn += [_captioned(p._replace(note=newest), last) for p in last.predictions[1:] if p.magnified]
    return shown.name, drawn


def _captioned(panel: Panel, shown: ImagePanels, kind: str = "") -> Captioned:
    whole = shown.crops[-1].picture.shape[1]
    share = 1.0 if panel.magnified else panel.picture.shape[1] / whole
    return Captioned(image(panel.picture, panel.title, share), panel.title, panel.note, kind)


def _add_saved(gallery: RunGallery, history: History) -> None:
    """Add PNGs of `etpp reconstruct` whose checkpoint is gone."""
    there = {checkpoint.step for checkpoint in history.checkpoints}
    files: dict[int, Path] = {}
    for file in sorted((history.folder.path / "report" / "reconstruction").glob("step-*.png")):
        match = re.match(r"step-(\d+)_", file.name)
        if match and int(match[1]) not in there:
            # The first image of a step stands for all: they take much more space than the panels above.
            files.setdefault(int(match[1]), file)
    gallery.num_saved = len(files)
    gallery.saved = [
        png(files[step].read_bytes(), f"reconstruction at step {step}")
        for step in spread(sorted(files), MOST_SAVED)
    ]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, the first and the last among them, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
