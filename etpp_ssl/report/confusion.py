"""The files of a classifier's evaluation: its numbers, and the confusion matrix as a table and as a picture.

    evaluation.json   protocol, images, numbers, and recall of each class
    confusion.csv     images by true class (row) and predicted class (column)
    confusion.png     the same as shares of each true class

Legend: K classes; matrices have true classes as rows, predicted ones as columns.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from etpp_ssl.config import UserError
from etpp_ssl.evaluation.classification import ClassificationResult
from etpp_ssl.evaluation.measured_on import training_mark
from etpp_ssl.files import check_place, replaced, replaced_file, write_json
from etpp_ssl.report.figures import FAINT, FONT_SIZE, INK, dress
from etpp_ssl.run_folder import EVALUATION_FILE

CORNER = "true class \\ predicted class"
DPI = 200
MOST_NUMBERED = 20
"""Classes, for counts in the cells."""
MOST_NAMED = 100
"""Classes, for a name at each row and column."""
MOST_LETTERS = 24
"""Of a class name in the picture."""
WIDE, NARROW = 0.44, 0.11
"""Inches of a cell that holds a count, and of one that has a name beside it."""
SIDES = (2.6, 10.0)
"""Inches of the matrix, at least and at most."""
EMPTY = "#e0e0e0"
"""Colour of the rows of classes without images."""
SHARES = (0, 1, 5, 10, 25, 50, 75, 100)
"""Per cent, marked on the colour bar."""


def check_evaluation_place(place: Path) -> Path:
    """Check that `write_evaluation` can write there, before the work.

    Returns:
        The absolute path.

    Raises:
        UserError: if it cannot, or something else is there.
    """
    return check_place(place, None if place.suffix == ".json" else EVALUATION_FILE)


def write_evaluation(
    place: Path,
    result: ClassificationResult,
    classes: Sequence[str],
    protocol: Mapping[str, Any],
    data: Mapping[str, Any],
    collapse: str = "",
) -> None:
    """Write an evaluation, whole or not at all; an earlier one is replaced.

    Args:
        place: a folder, or the name of a `.json` file, which holds the numbers alone.
        result: of the evaluation.
        classes: names in the order of the model's outputs; outputs beyond them are called `class <number>`.
        protocol: checkpoint, weights, split and whatever else the numbers depend on; for JSON.
        data: the images; see `etpp_ssl.evaluation.measured_on`.
        collapse: a sentence on a classifier that has collapsed.

    Raises:
        UserError: if it cannot be written, or there are more classes than outputs.
    """
    confusion = result.confusion.cpu().numpy()
    names = all_names(classes, len(confusion))
    images = confusion.sum(axis=1).tolist()
    values = {
        "protocol": dict(protocol),
        "data": dict(data),
        "numbers": result.numbers(),
        **({"collapse": collapse} if collapse else {}),
        "classes": [
            {"name": name, "num_images": count, "recall": recall}
            for name, count, recall in zip(names, images, result.recall, strict=True)
        ],
    }
    if place.suffix == ".json":
        with replaced_file(place) as file:
            write_json(file, values)
        return
    images_of = f"{result.num_images:,} {training_mark(dict(data)) or 'images'}"
    title = f"top-1 {result.top1:.2f} %, macro top-1 {result.macro_top1:.2f} %, {images_of}"
    figure = confusion_figure(confusion, names, title)
    with replaced(place) as aside:
        write_json(aside / EVALUATION_FILE, values)
        write_csv(aside / "confusion.csv", confusion, names)
        figure.savefig(aside / "confusion.png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)


def all_names(classes: Sequence[str], count: int) -> list[str]:
    """A name for each of `count` outputs.

    Raises:
        UserError: if there are more classes than outputs.
    """
    if len(classes) > count:
        raise UserError(f"there are {len(classes)} class names for {count} outputs of the classifier")
    return [*classes, *(f"class {index}" for index in range(len(classes), count))]


def write_csv(file: Path, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Counts with the class names as header and as first column, in UTF-8.

    Args:
        file: to write.
        confusion: int (K, K).
        names: K.
    """
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([CORNER, *names])
        for name, row in zip(names, confusion.tolist(), strict=True):
            writer.writerow([name, *row])


def confusion_figure(confusion: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """A confusion matrix whose colours are shares of each true class.

    Few classes have counts in their cells, up to a hundred have their names, more have numbers along the
    axes. The colour scale is that of square roots, and of cube roots where cells are dots, so that a share
    of one per cent is seen.

    Args:
        confusion: int (K, K).
        names: K; one that the font has no letters for is shown as `class <number>`.
        title: above it.

    Returns:
        A figure on white, to be saved with `bbox_inches="tight"`; axes are the matrix and the colour bar.
        Rows of classes without images are grey.
    """
    count = len(confusion)
    side = min(max(count * (WIDE if count <= MOST_NUMBERED else NARROW), SIDES[0]), SIDES[1])
    members = confusion.sum(axis=1, keepdims=True)
    shares = np.ma.masked_where(
        np.broadcast_to(members == 0, confusion.shape), 100 * confusion / np.maximum(members, 1)
    )
    figure = Figure(figsize=(side, side), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    shown = axes.imshow(
        shares,
        cmap=colormaps["Blues"].with_extremes(bad=EMPTY),
        norm=PowerNorm(1 / 2 if count <= MOST_NAMED else 1 / 3, vmin=0, vmax=100),
        # Cells smaller than a dot are averaged, as picking some of them would lose the others.
        interpolation="nearest" if count <= side * DPI else "antialiased",
    )
    if count <= MOST_NUMBERED:
        _write_counts(axes, confusion, shares)
    _dress(axes, names)
    axes.set_title(title, fontsize=FONT_SIZE + 1, color=INK, loc="left", pad=8)
    bar = figure.colorbar(shown, cax=figure.add_axes((1 + 0.15 / side, 0, 0.14 / side, 1)), ticks=SHARES)
    bar.set_label("share of the true class's images (%)", fontsize=FONT_SIZE, color=INK)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1, color=FAINT, labelcolor=INK)
    bar.outline.set_edgecolor(FAINT)
    return figure


def _write_counts(axes: Axes, confusion: np.ndarray, shares: np.ndarray) -> None:
    # The widest count fits into the cell.
    size = min(FONT_SIZE, 40 / max(len(str(confusion.max())), 4))
    for (row, column), count in np.ndenumerate(confusion):
        dark = shares[row, column] is not np.ma.masked and shares[row, column] > 35
        colour = "white" if dark else (INK if count else FAINT)
        axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)


def _dress(axes: Axes, names: Sequence[str]) -> None:
    """Names or numbers along both axes, and what the axes are."""
    axes.set_xlabel("predicted class", fontsize=FONT_SIZE, color=INK)
    axes.set_ylabel("true class", fontsize=FONT_SIZE, color=INK)
    dress(axes, FONT_SIZE - 1)
    axes.tick_params(length=2)
    if len(names) > MOST_NAMED:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
        return
    size = FONT_SIZE if len(names) <= MOST_NUMBERED else FONT_SIZE - 3
    places, labels = range(len(names)), _labels(names)
    # A name may hold dollar signs, which would otherwise be read as formulas.
    axes.set_xticks(places, labels, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(places, labels, fontsize=size, parse_math=False)


def _labels(names: Sequence[str]) -> list[str]:
    """Names on one line and cut, or the class's number where the font has no letters for the name."""
    known = get_font(findfont(FontProperties())).get_charmap()
    lines = [" ".join(name.split()) for name in names]
    return [
        _cut(line) if all(ord(letter) in known for letter in line) else f"class {index}"
        for index, line in enumerate(lines)
    ]


def _cut(line: str) -> str:
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 1] + "…"
