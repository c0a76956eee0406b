"""The page of `etpp transfer`: protocols side by side, one confusion matrix, and telling images.

Legend: K classes, C channels, H, W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from etpp_ssl.evaluation.predictions import Example
from etpp_ssl.files import replaced_file
from etpp_ssl.messages import shown_text
from etpp_ssl.report.confusion import DPI, all_names, confusion_figure
from etpp_ssl.report.markup import Captioned, Table, image, png, render
from etpp_ssl.report.panels import ChannelView

NAME = "transfer.html"
LONGEST_NAME = 40
"""Of an image, under its picture."""


def write_transfer_page(
    file: Path,
    *,
    title: str,
    table: Table,
    notes: Sequence[str],
    confusion: np.ndarray,
    classes: Sequence[str],
    right: Sequence[Example],
    wrong: Sequence[Example],
    view: ChannelView,
) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        file: to write.
        title: of the page.
        table: protocols and what they come to.
        notes: sentences below it, without a full stop.
        confusion: int (K, K), rows are true classes.
        classes: names of the outputs; see `etpp_ssl.report.confusion.all_names`.
        right: images that are recognised.
        wrong: images that are mistaken.
        view: how normalised images are shown.

    Raises:
        UserError: if it cannot be written.
    """
    names = all_names(classes, len(confusion))
    count = int(confusion.sum())
    top1 = 100 * int(confusion.trace()) / count
    drawn = io.BytesIO()
    figure = confusion_figure(confusion, names, f"top-1 {top1:.2f} %, {count:,} images")
    figure.savefig(drawn, dpi=DPI // 2, bbox_inches="tight", pad_inches=0.12, format="png")
    text = render(
        "transfer.html.j2",
        title=title,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        table_of_protocols=table,
        notes=[note[0].upper() + note[1:] + "." for note in notes],
        confusion=png(drawn.getvalue(), f"confusion matrix of {len(names)} classes"),
        galleries=[
            ("Most sure, and right", [_captioned(example, names, view) for example in right]),
            ("Most sure, and wrong", [_captioned(example, names, view) for example in wrong]),
        ],
        colours=view.caption,
    )
    with replaced_file(file) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")


def _captioned(example: Example, names: Sequence[str], view: ChannelView) -> Captioned:
    """An image under what it was taken for, and what it is if that is something else."""
    title = f"{names[example.predicted]} {100 * example.confidence:.0f} %"
    truth = f"is {names[example.label]}; " if example.label != example.predicted else ""
    name = shown_text(example.name, LONGEST_NAME)
    return Captioned(image(view(example.image), f"{name}: {title}"), title, f"{truth}{name}")
