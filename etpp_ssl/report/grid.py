"""`etpp reconstruct`: one PNG per image, with captioned panels pixel for pixel."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from etpp_ssl.config import UserError, show_size
from etpp_ssl.data.sources.base import images_of
from etpp_ssl.data.views import EvalView
from etpp_ssl.files import check_place, replaced_file
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.report.figures import FONT_SIZE, INK
from etpp_ssl.report.panels import Panel, missing_picture
from etpp_ssl.report.reconstruction import check_bandwidth
from etpp_ssl.report.viewer import ImagePanels, InputImage, Viewer, images_of_files, images_of_run
from etpp_ssl.run_folder import Checkpoint, RunFolder

SIDE = 224
"""Images are enlarged, by a whole number, to about this many dots."""
DPI = 100
MARGIN, GAP, NARROWEST = 14, 18, 168
LINE, LETTER, BOLD_LETTER = 15, 6.9, 8.0
"""Height of a line and mean width of a letter, in dots, at `FONT_SIZE` and `DPI`."""


def write_grids(
    run_dir: str | Path,
    images: Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    seed: int | None = None,
    bandwidth: tuple[int, int] | None = None,
    step: int | None = None,
    count: int = 8,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write one PNG per image: its crops, the masked input, and the prediction in every way of drawing it.

    Args:
        run_dir: a run with a checkpoint.
        images: files and folders; none takes a keyed draw of the run's evaluation images, or of its
            training images where there are no others.
        out: folder of the PNGs; by default `RUN/report/reconstruction`.
        seed: of the masks; by default the run's.
        bandwidth: (height, width) of the masked input in pixels; by default the full image.
        step: of the checkpoint; by default the newest.
        count: images taken of each folder, or of the run's data.
        say: told of damaged checkpoints, of the data used and of targets without a picture.

    Returns:
        The files, in the order of the images.

    Raises:
        UserError: for a folder that is not a run or cannot be written to, or a checkpoint, an image or a
            bandwidth that cannot be used.
    """
    run = RunFolder(run_dir)
    recipe = run.any_recipe()
    if isinstance(recipe, FinetuneRecipe):
        raise UserError(
            f"run {str(run.path)!r} is of a classifier, which predicts classes, not pixels; reconstruct "
            "takes runs of etpp pretrain"
        )
    folder = Path(out) if out is not None else run.path / "report" / "reconstruction"
    checkpoint = choose_checkpoint(run, step, say)
    if bandwidth is not None:
        check_bandwidth(bandwidth, recipe.size, recipe.patch_size)
    if images:
        mask_seed = recipe.seed if seed is None else seed
        view = EvalView(recipe.size, recipe.data.crop_pct, recipe.data.channel_sampling, mask_seed)
        reading = recipe.data.reading(recipe.in_chans)
        inputs = images_of_files(
            [Path(image) for image in images], count, view=view, reading=reading, say=say
        )
    else:
        inputs, split = images_of_run(run, count)
        say(f"{images_of(len(inputs))} of the {split} data")
    check_place(folder / "picture.png")
    viewer = Viewer.of_run(run, seed)
    viewer.load(checkpoint)
    reason = missing_picture(viewer.target)
    if reason is not None:
        say(reason)
    title = f"{run.path.absolute().name}, step {checkpoint.step:,}"
    written = []
    for image in inputs:
        shown = viewer.look(image, bandwidth)
        rows = [shown.crops, [shown.masked, *shown.predictions]]
        figure = grid_figure(rows, _heading(viewer, image, shown, title), enlargement(recipe.size))
        written.append(folder / _file_name(image, checkpoint.step, bandwidth))
        with replaced_file(written[-1]) as aside:
            figure.savefig(aside, dpi=DPI, format="png")
    return written


def choose_checkpoint(run: RunFolder, step: int | None, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint of a step, or the newest whole one for None.

    Raises:
        UserError: if there is none, it is damaged, or the run has none of that step.
    """
    if step is None:
        return run.trained(say)
    there = run.checkpoints()
    for checkpoint in there:
        if checkpoint.step == step:
            fault = checkpoint.fault()
            if fault is not None:
                raise UserError(f"checkpoint {str(checkpoint.path)!r} is damaged: {fault}")
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in reversed(there))
    raise UserError(
        f"run {str(run.path)!r} has no checkpoint of step {step}; "
        + (f"there are {steps}" if steps else "it has none yet")
    )


def _heading(viewer: Viewer, image: InputImage, shown: ImagePanels, run: str) -> str:
    parts = [
        f"{run}: {image.name}",
        f"mask seed {viewer.masker.seed}",
        f"loss on this image {shown.reconstruction.loss:.4g}",
        viewer.channels.caption,
        missing_picture(viewer.target) or "",
    ]
    return "; ".join(part for part in parts if part)


def _file_name(image: InputImage, step: int, bandwidth: tuple[int, int] | None) -> str:
    stem = re.sub(r"[^\w.-]+", "-", Path(image.name).stem, flags=re.ASCII)[:40]
    at = "" if bandwidth is None else f"_at-{show_size(bandwidth)}"
    return f"step-{step:08d}{at}_{image.number:06d}_{stem}.png"


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
    caption_lines = [max(len(titles) + len(notes) for titles, notes in row) for row in captions]
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
        for picture, slot, (titles, notes) in zip(row, places, texts, strict=True):
            for number, line in enumerate((*titles, *notes)):
                write(line, left, top + LINE * number, "bold" if number < len(titles) else "normal")
            picture_top = top + LINE * lines + 6
            figure.figimage(picture, left, height - picture_top - picture.shape[0], origin="upper")
            left += slot + GAP
        top += row_height + GAP
    return figure


def _enlarged(panel: Panel, times: int) -> np.ndarray:
    if panel.magnified:
        return panel.picture
    return panel.picture.repeat(times, axis=0).repeat(times, axis=1)


def _caption(panel: Panel, slot: int) -> tuple[list[str], list[str]]:
    """The lines of its title and of its note."""
    return (
        textwrap.wrap(panel.title, int(slot / BOLD_LETTER)),
        textwrap.wrap(panel.note, int(slot / LETTER)),
    )
