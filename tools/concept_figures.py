"""Pictures of the concept pages: positions, targets, what a budget buys, and keyed randomness.

Each function draws what the package computes, not a copy of its formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.cost import area_share
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.model.masking import random_masking, removed_ids
from etpp_ssl.model.patches import patchify
from etpp_ssl.model.pos_embed import patch_centres, sincos_pos_embed
from etpp_ssl.randomness import keyed_random
from etpp_ssl.report.panels import orientation_glyphs
from etpp_ssl.targets.hog import HogConfig
from etpp_ssl.targets.pixels import normalise_patches

INK = "#222222"
ORANGE, BLUE, GREEN = "#d55e00", "#0072b2", "#009e73"
WIDTH = 8.3
"""Inches; a page shows one inch as 100 pixels."""
SIZE = 10
PATCH = 16


def positions_figure(image: Tensor) -> Figure:
    """Where patches lie in a scene at bandwidths 224 and 96, and the position embedding at their centres.

    Args:
        image: float (3, 224, 224) in [0, 1].
    """
    figure = Figure(figsize=(WIDTH, 3.4), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1, 1, 1.35])
    base = image.shape[-1] // PATCH
    for axes, bandwidth, colour in ((panels[0], 224, BLUE), (panels[1], 96, ORANGE)):
        grid = bandwidth // PATCH
        crop = low_frequency_crop(image, bandwidth).clamp(0, 1).permute(1, 2, 0).numpy()
        axes.imshow(crop, extent=(-0.5, base - 0.5, base - 0.5, -0.5), interpolation="nearest", alpha=0.75)
        for line in np.arange(grid + 1) * base / grid - 0.5:
            axes.axhline(line, color="white", lw=0.7)
            axes.axvline(line, color="white", lw=0.7)
        centres = patch_centres(grid, base).numpy()
        axes.plot(*np.meshgrid(centres, centres), ".", color=colour, ms=5)
        axes.set_title(f"bandwidth {bandwidth}: {grid} x {grid} patches", fontsize=SIZE, color=colour)
        axes.set(xticks=[0, base - 1], yticks=[0, base - 1])
        axes.tick_params(labelsize=SIZE - 1)
        axes.set_xlabel("position, in patches of the base grid", fontsize=SIZE - 1, color=INK)
    curve = panels[2]
    wave = 2
    dense = sincos_pos_embed((1, 20 * base), (1, base), 64)[:, wave]
    curve.plot(patch_centres(20 * base, base), dense, color="#999999", lw=1.2)
    for bandwidth, colour, marker in ((224, BLUE, "o"), (96, ORANGE, "s")):
        grid = bandwidth // PATCH
        values = sincos_pos_embed((1, grid), (1, base), 64)[:, wave]
        curve.plot(
            patch_centres(grid, base), values, marker, color=colour, ms=6, label=f"bandwidth {bandwidth}"
        )
    curve.set_title("one wave of the position embedding", fontsize=SIZE, color=INK)
    curve.set_xlabel("position, in patches of the base grid", fontsize=SIZE - 1, color=INK)
    curve.legend(fontsize=SIZE - 1, frameon=False)
    plain(curve)
    return figure


def targets_figure(image: Tensor) -> Figure:
    """A crop, what the encoder sees of it, and the targets of the patches that it does not see.

    Args:
        image: float (3, H, W) in [0, 1].
    """
    crop = low_frequency_crop(image, 160)
    grid = crop.shape[-1] // PATCH
    ids_keep = random_masking(torch.arange(1), grid * grid, grid * grid // 4, seed=5)
    ids_removed = removed_ids(ids_keep, grid * grid)
    seen = torch.full((grid * grid, PATCH * PATCH * 3), 0.86)
    patches = patchify(crop[None], (PATCH, PATCH))
    seen[ids_keep[0]] = patches[0, ids_keep[0]]
    pixels, normed = torch.full_like(seen, 1.0), torch.full_like(seen, 1.0)
    pixels[ids_removed[0]] = patches[0, ids_removed[0]]
    normed[ids_removed[0]] = (normalise_patches(patches)[0, ids_removed[0]] / 5 + 0.5).clamp(0, 1)

    objective = HogConfig().build(patch_size=(PATCH, PATCH), in_chans=3)
    everything = torch.arange(grid * grid)[None]
    hog = objective.target((crop[None] - 0.5) / 0.25, everything)[0]
    cells = (
        hog.view(grid, grid, 2, 2, 3, 9).mean(4).permute(4, 0, 2, 1, 3).reshape(9, 2 * grid, 2 * grid).numpy()
    )
    cells[:, np.repeat(np.repeat(_is_kept(ids_keep, grid), 2, 0), 2, 1)] = np.nan

    shown = (
        ("crop to 160", as_picture(crop)),
        ("the encoder sees", unpatched(seen, grid)),
        ("pixels", unpatched(pixels, grid)),
        ("normalised pixels", unpatched(normed, grid)),
        ("HOG", np.nan_to_num(1 - orientation_glyphs(cells, 16, full=0.7), nan=1.0)),
    )
    figure = Figure(figsize=(WIDTH, 2.1), facecolor="white", layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#b0b0b0")
        axes.set_title(title, fontsize=SIZE, color=INK)
    return figure


def _is_kept(ids_keep: Tensor, grid: int) -> np.ndarray:
    kept = np.zeros(grid * grid, dtype=bool)
    kept[ids_keep[0].numpy()] = True
    return kept.reshape(grid, grid)


def unpatched(patches: Tensor, grid: int) -> np.ndarray:
    """(H, W, 3) of patches in MAE's order, (N, p p 3)."""
    squares = patches.view(grid, grid, PATCH, PATCH, 3).permute(0, 2, 1, 3, 4)
    return squares.reshape(grid * PATCH, grid * PATCH, 3).clamp(0, 1).numpy()


def as_picture(image: Tensor) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def budget_figure(curricula: dict[str, Curriculum]) -> Figure:
    """How runs with one budget divide it: compute by stage, and the images that each stage sees for it."""
    figure = Figure(figsize=(WIDTH, 2.9), facecolor="white", layout="constrained")
    compute, images = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.6])
    colours = {96: "#f2b48a", 160: "#e58a4a", 192: "#dd7220", 224: ORANGE}
    names = list(curricula)[::-1]
    for row, name in enumerate(names):
        curriculum = curricula[name]
        spent = seen = 0.0
        for stage in curriculum.stages:
            side = stage.bandwidth[0]
            count = stage.num_steps * stage.batch_size
            share = 100 * stage.share
            for axes, start, length, text in (
                (compute, spent, share, f"{share:.0f} %"),
                (images, seen, count / 1e6, f"{count / 1e6:.0f}"),
            ):
                axes.barh(row, length, left=start, height=0.62, color=colours[side], edgecolor="white")
                axes.text(
                    start + length / 2, row, text, ha="center", va="center", fontsize=SIZE - 1.5, color=INK
                )
            spent, seen = spent + share, seen + count / 1e6
    compute.set_yticks(range(len(names)), names)
    compute.set_xlabel("share of compute (%)", fontsize=SIZE - 1, color=INK)
    images.set_xlabel(
        "images seen (millions), 400 equivalent epochs of ImageNet-1K", fontsize=SIZE - 1, color=INK
    )
    for axes in (compute, images):
        plain(axes)
        axes.tick_params(left=False)
    handles = [images.barh(0, 0, color=colour) for colour in colours.values()]
    labels = [
        f"{side} px: {100 * area_share((side, side), (224, 224)):.0f} % of the cost" for side in colours
    ]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=SIZE - 1.5, frameon=False)
    return figure


def randomness_figure() -> Figure:
    """Draws of twelve samples by four runs: keyed ones are the same however the run went."""
    numbers = range(12)
    keyed = [keyed_random(0, "crop", number).random() for number in numbers]
    rows: Sequence[tuple[str, list[float]]] = (
        ("keyed: one uninterrupted run", keyed),
        ("keyed: two data workers, every other sample each", keyed),
        ("keyed: killed after sample 5, resumed", keyed),
        ("one shared generator, seeded at the start", _shared(1)),
        ("the same, with two data workers", _shared(2)),
        ("the same, killed after sample 5, resumed", _shared(1, killed=6)),
    )
    figure = Figure(figsize=(WIDTH, 2.9), facecolor="white", layout="constrained")
    axes = figure.subplots()
    values = np.array([row for _, row in rows])
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=SIZE - 1)
    axes.set_xticks(list(numbers))
    axes.tick_params(length=0, labelsize=SIZE - 1)
    axes.set_xlabel(
        "number of the sample in the run; colour: the number that was drawn for it", fontsize=SIZE - 1
    )
    for line in np.arange(0.5, 11.5):
        axes.axvline(line, color="white", lw=2)
    for line in np.arange(0.5, 5.5):
        axes.axhline(line, color="white", lw=10 if line == 2.5 else 2)
    axes.spines[:].set_visible(False)
    return figure


def _shared(num_workers: int, killed: int | None = None) -> list[float]:
    """Draws in the order in which samples come, from a generator per worker that starts at the seed."""
    workers = [keyed_random(0, "shared", worker) for worker in range(num_workers)]
    drawn = []
    for number in range(12):
        if number == killed:
            workers = [keyed_random(0, "shared", worker) for worker in range(num_workers)]
        drawn.append(workers[number % num_workers].random())
    return drawn


def plain(axes: Axes) -> None:
    """Small labels, no frame above and to the right."""
    axes.tick_params(labelsize=SIZE - 1)
    axes.spines[["top", "right"]].set_visible(False)
