"""Captioned panels on one PNG, pixel for pixel."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from etpp_ssl.report.figures import FONT_SIZE, INK
from etpp_ssl.report.targets import Panel

SIDE = 224
"""Images are enlarged, by a whole number, to about this many dots."""
DPI = 100
MARGIN, GAP, NARROWEST = 14, 18, 168
LINE, LETTER = 15, 6.9
"""Height of a line and mean width of a letter, in dots, at `FONT_SIZE` and `DPI`."""


def enlargement(size: tuple[int, int]) -> int:
    """Dots per pixel, along each axis, for an image of `size` (height, width) pixels."""
    return max(1, round(SIDE / max(size)))


def grid_figure(rows: Sequence[Sequence[Panel]], heading: str, times: int) -> Figure:
    """Panels in rows, each under its title and note, below a heading.

    Args:
        rows: of panels, shown at one scale.
        heading: wrapped to the width.
        times: dots per pixel of every panel that is not `magnified`.

    Returns:
        A figure on white, to be saved at its own resolution, where every pixel is a square of dots.
    """
    pictures = [[_enlarged(panel, times) for panel in row] for row in rows]
    slots = [[max(picture.shape[1], NARROWEST) for picture in row] for row in pictures]
    captions = [
        [_caption(panel, slot) for panel, slot in zip(row, places, strict=True)]
        for row, places in zip(rows, slots, strict=True)
    ]
    width = 2 * MARGIN + max(sum(row) + GAP * (len(row) - 1) for row in slots)
    head = textwrap.wrap(heading, int((width - 2 * MARGIN) / LETTER))
    caption_lines = [max(1 + len(notes) for _, notes in row) for row in captions]
    row_heights = [
        LINE * lines + 6 + max(picture.shape[0] for picture in row)
        for lines, row in zip(caption_lines, pictures, strict=True)
    ]
    height = 2 * MARGIN + LINE * len(head) + sum(GAP + row for row in row_heights)

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def write(text: str, left: float, top: float, weight: str = "normal") -> None:
        figure.text(left / width, 1 - top / height, text, va="top", size=FONT_SIZE, weight=weight, color=INK)

    for number, line in enumerate(head):
        write(line, MARGIN, MARGIN + LINE * number)
    top = MARGIN + LINE * len(head) + GAP
    for row, places, texts, lines, row_height in zip(
        pictures, slots, captions, caption_lines, row_heights, strict=True
    ):
        left = MARGIN
        for picture, slot, (title, notes) in zip(row, places, texts, strict=True):
            write(title, left, top, "bold")
            for number, line in enumerate(notes):
                write(line, left, top + LINE * (number + 1))
            picture_top = top + LINE * lines + 6
            figure.figimage(picture, left, height - picture_top - picture.shape[0], origin="upper")
            left += slot + GAP
        top += row_height + GAP
    return figure


def save_grid(figure: Figure, path: Path) -> None:
    """Write a figure of `grid_figure` as PNG."""
    figure.savefig(path, dpi=DPI, format="png")


def _enlarged(panel: Panel, times: int) -> np.ndarray:
    if panel.magnified:
        return panel.picture
    return panel.picture.repeat(times, axis=0).repeat(times, axis=1)


def _caption(panel: Panel, slot: int) -> tuple[str, list[str]]:
    return panel.title, textwrap.wrap(panel.note, int(slot / LETTER))
