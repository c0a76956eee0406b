"""The part of a run report that shows reconstructions at several checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from etpp_ssl.config import UserError
from etpp_ssl.report import markup
from etpp_ssl.report.history import History
from etpp_ssl.report.pictures import Picture, pictures_of_run
from etpp_ssl.report.targets import Panel, missing_picture
from etpp_ssl.report.viewer import Shown, Viewer
from etpp_ssl.run_folder import Checkpoint

T = TypeVar("T")

NUM_IMAGES = 4
MOST_CHECKPOINTS = 5
MOST_SAVED = 4
"""PNGs of checkpoints that are gone, saved earlier by `etpp reconstruct`."""


def reconstructions(histories: Sequence[History], say: Callable[[str], None]) -> str:
    """A few images of each run's data, masked, and predicted by its checkpoints."""
    parts = []
    for history in histories:
        parts.append(f"<h3>{markup.escape(history.name)}</h3>")
        try:
            parts.append(_of_run(history, say))
        except UserError as error:
            parts.append(markup.paragraph(f"Not shown: {error}."))
        parts.append(_saved_earlier(history))
    return markup.section("reconstructions", "Reconstructions", *parts)


def _of_run(history: History, say: Callable[[str], None]) -> str:
    if not history.checkpoints:
        return markup.paragraph("There is no checkpoint yet.", "soft")
    recipe = history.recipe
    pictures, split = pictures_of_run(recipe, NUM_IMAGES)
    viewer = Viewer(recipe)
    chosen: list[Checkpoint] = []
    seen: list[list[Shown]] = []
    for checkpoint in spread(history.checkpoints, MOST_CHECKPOINTS):
        if not checkpoint.path.is_dir():
            say(f"{history.name}: the run has removed its checkpoint of step {checkpoint.step} meanwhile")
            continue
        say(f"{history.name}: reconstructing at step {checkpoint.step}")
        viewer.load(checkpoint)
        seen.append([viewer.look(picture) for picture in pictures])
        chosen.append(checkpoint)
    if not chosen:
        return markup.paragraph("The run has removed its checkpoints meanwhile.", "soft")
    kept = len(history.checkpoints)
    by = f"{len(chosen)} of the {kept} checkpoints" if kept > 1 else "the one checkpoint"
    sentences = [
        f"{len(pictures)} images of the {split} data at full size, with fixed masks, predicted by "
        f"{by} that the run has kept",
        *_explanation(seen[-1]),
        missing_picture(recipe.target) or "",
        viewer.view.caption,
    ]
    text = " ".join(_sentence(sentence) for sentence in sentences if sentence)
    strips = [
        _strip(picture, chosen, [shown[place] for shown in seen]) for place, picture in enumerate(pictures)
    ]
    return markup.paragraph(text) + _crops(seen[-1]) + "".join(strips)


def _explanation(seen: list[Shown]) -> list[str]:
    """What the panels' own captions are too short for."""
    notes = {
        panel.note: "outlined" if panel.leaks else "orientations" if panel.magnified else "predictions"
        for shown in seen[:1]
        for panel in shown.predictions
        if panel.note
    }
    return [f"{which}: {note}" for note, which in notes.items()]


def _crops(seen: list[Shown]) -> str:
    """The first image as each stage shows it."""
    panels = [_panel(panel, shown) for shown in seen[:1] for panel in shown.crops]
    if len(panels) < 2:
        return ""
    return f'<div class="strip">{"".join(panels)}</div>\n'


def _strip(picture: Picture, checkpoints: list[Checkpoint], seen: list[Shown]) -> str:
    """One image: whole, masked, in the best picture of each checkpoint, and in the leaking one."""
    last = seen[-1]
    panels = [_panel(last.crops[-1]._replace(note=""), last), _panel(last.masked._replace(note=""), last)]
    for checkpoint, shown in zip(checkpoints, seen, strict=True):
        for panel in shown.predictions[:1]:
            note = f"loss {shown.reconstruction.loss:.3g}"
            panels.append(_panel(panel._replace(title=f"step {checkpoint.step:,}", note=note), last))
    newest = f"step {checkpoints[-1].step:,}"
    for panel in [panel for panel in last.predictions if panel.leaks][:1]:
        title = f"{newest}, leaking"
        panels.append(_panel(panel._replace(title=title, note="true statistics"), last, "leaks"))
    # What is not made of pixels needs its target beside it: nobody sees that in the image.
    for panel in [panel for panel in last.predictions[1:] if panel.magnified]:
        panels.append(_panel(panel._replace(note=newest), last))
    name = markup.paragraph(picture.name, "soft")
    return f'{name}<div class="strip">{"".join(panels)}</div>\n'


def _panel(panel: Panel, shown: Shown, kind: str = "") -> str:
    whole = shown.crops[-1].picture.shape[1]
    share = 1.0 if panel.magnified else panel.picture.shape[1] / whole
    return markup.figure(markup.image(panel.picture, panel.title, share), panel.title, panel.note, kind)


def _saved_earlier(history: History) -> str:
    """PNGs of `etpp reconstruct` whose checkpoint is gone."""
    there = {checkpoint.step for checkpoint in history.checkpoints}
    files: dict[int, Path] = {}
    for file in sorted((history.folder.path / "report" / "reconstruction").glob("step-*.png")):
        match = re.match(r"step-(\d+)_", file.name)
        if match and int(match[1]) not in there:
            # The first image of a step stands for all: they take much more space than the panels above.
            files.setdefault(int(match[1]), file)
    if not files:
        return ""
    shown = spread(sorted(files), MOST_SAVED)
    pictures = [markup.png(files[step].read_bytes(), f"reconstruction at step {step}") for step in shown]
    return markup.details(
        f"{len(shown)} of {len(files)} earlier steps, saved by etpp reconstruct; their checkpoints are gone",
        f'<div class="saved">{"".join(pictures)}</div>',
    )


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, the first and the last among them, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
