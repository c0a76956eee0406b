"""Checks whether the smaller copies that files have of themselves (overviews, pyramids) are averages.

One that was made by taking every second pixel, which is GDAL's default, aliases: a network that sees it early
on learns what is not in the images. A smaller copy is one of averages if its pixels are much nearer to the
mean of the pixels that they stand for than those are themselves.

Legend: H, W pixels of the full resolution, h, w of the copy, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice

import numpy as np

from etpp_ssl.data.formats.base import Picture, Region, UnreadableImage, reads_parts
from etpp_ssl.randomness import keyed_random

NUM_PARTS = 8
"""Parts of files that are compared, of as many files where there are."""
SIDE = 128
"""Pixels of a part at full resolution, per axis."""
FACTORS = (2, 4, 8)
"""Copies are asked for that have so many times fewer pixels per axis."""
MOST_ERROR = 1 / 3
"""Distance of a copy from the mean, over that of the pixels themselves. On white noise GDAL's average has 0,
its antialiased cubic and Lanczos kernels have less than a quarter, and every second pixel has 1."""


def overviews_are_averages(open_one: Callable[[int], Picture], num_files: int, seed: int) -> bool | None:
    """Whether crops can be read from overviews, by a keyed sample.

    Args:
        open_one: from a file's number to its picture, whose regions may come from its overviews.
        num_files: numbers are below it.
        seed: key of the sample.

    Returns:
        False if those of one file are not averages; None where there are none, or none that show anything.
    """
    told, opened = None, dict[int, Picture]()
    for number, file in enumerate(islice(cycle(_drawn(num_files, seed)), NUM_PARTS)):
        try:
            picture = opened.get(file) or open_one(file)
            # Others have been read whole, and have no overviews.
            if not reads_parts(picture):
                continue
            opened[file] = picture
            width, height = (min(SIDE, side) for side in picture.size)
            draw = keyed_random(seed, "overviews", file, number)
            left, top = draw.randint(0, picture.size[0] - width), draw.randint(0, picture.size[1] - height)
            box, full = (left, top, left + width, top + height), None
            for factor in FACTORS:
                copy = picture.region(box, (max(1, width // factor), max(1, height // factor)))
                if copy.box[2] - copy.box[0] >= width:
                    continue
                full = full or picture.region(box, (width, height))
                error, spread = _distances(full, copy, box, exact=False)
                if error > MOST_ERROR**2 * spread:
                    error, spread = _distances(full, copy, box, exact=True)
                if error > MOST_ERROR**2 * spread:
                    return False
                told = True if spread > 0 else told
        except UnreadableImage:
            continue
    return told


def _drawn(num_files: int, seed: int) -> list[int]:
    return sorted(keyed_random(seed, "overviews").sample(range(num_files), min(NUM_PARTS, num_files)))


def _distances(
    full: Region, copy: Region, box: tuple[int, int, int, int], exact: bool
) -> tuple[float, float]:
    """Squared distances from the means of what a copy's pixels stand for: the copy's, and those pixels' own.

    Only of pixels of the copy that lie in the region with all that they stand for, and have data.

    Args:
        full, copy: the same part of a picture.
        box: that part, in pixels of the full resolution.
        exact: whether a pixel of the copy stands for a whole number of pixels per axis, as others than GDAL
            make them; then a side that this number does not divide is cut or filled up.
    """
    down = _means(box[1], box[3], copy.box[1], copy.box[3], copy.pixels.shape[0], exact)
    across = _means(box[0], box[2], copy.box[0], copy.box[2], copy.pixels.shape[1], exact)

    def means(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.einsum("hH,HWC,wW->hwC", down, values, across, optimize=True)
        return found

    counts = np.ones(copy.pixels.shape[:2], bool) if copy.valid is None else copy.valid.copy()
    counts &= (down.sum(axis=1)[:, None] > 1 - 1e-6) & (across.sum(axis=1)[None] > 1 - 1e-6)
    # From one of the pixels: flat parts have no distances, not even rounding errors.
    values = full.pixels.astype(np.float64) - full.pixels[0, 0]
    if full.valid is not None:
        counts &= means(full.valid[:, :, None].astype(np.float64))[:, :, 0] > 1 - 1e-6
    mean = means(values)
    error = (copy.pixels - full.pixels[0, 0].astype(np.float64) - mean)[counts] ** 2
    spread = np.maximum(means(values**2) - mean**2, 0)[counts]
    return float(error.sum()), float(spread.sum())


def _means(
    start: int, end: int, copy_start: float, copy_end: float, num_copied: int, exact: bool
) -> np.ndarray:
    """float64 (copied, pixels): the share of each pixel in the mean that a pixel of the copy stands for.

    Args:
        start, end: of the pixels, in those of the full resolution.
        copy_start, copy_end: of the same part, in pixels of the copy's region.
        num_copied: pixels of the copy's region.
        exact: see `_distances`.
    """
    scale = (end - start) / (copy_end - copy_start)
    # The number of the region's first pixel in the whole copy.
    first = round(start / scale - copy_start)
    edges = (first + np.arange(num_copied + 1)) * (round(scale) if exact else scale) - start
    pixels = np.arange(end - start)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    shares: np.ndarray = np.clip(overlap, 0, None) / (edges[1] - edges[0])
    return shares
