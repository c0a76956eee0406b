"""Pictures of images and predictions: any number of channels on a screen, and a way of drawing each target.

To draw another target, write a function like `_pixel_panels` and give it a line in `DRAWN`.

Legend: C channels, H, W pixels, h, w grid or cells, M masked patches, V values per patch, K bins, a, b cells
per patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from etpp_ssl.report.reconstruction import Reconstruction, parts_of, predicted_pixels, unnormalise
from etpp_ssl.targets.pixels import PixelsConfig, patch_statistics

GLYPH_PIXELS = 16
"""Side of a histogram cell in a picture."""
BLANK = (208, 236)
"""Grey levels of the checkerboard that stands for missing pixels (NaN), which no image looks like."""


class Panel(NamedTuple):
    """A picture and what is said about it."""

    title: str
    note: str
    picture: np.ndarray
    """uint8 (H, W, 3)."""
    magnified: bool = False
    """Whether it is drawn larger than the image already, and so not enlarged with it."""
    leaks: bool = False
    """Whether it is made with what only the removed patches know."""


class ChannelView:
    """How a run's images are shown.

    Three channels are shown as colours and one in grey, both after undoing the normalisation. Any other
    number has no natural colours: the first channels become red, green and blue, each from -2 to 2
    standard deviations of the data.

    Args:
        mean: per channel, of values in [0, 1].
        std: per channel, > 0.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        count = len(mean)
        self.natural = count in (1, 3)
        self.shown = [min(channel, count - 1) for channel in range(3)]
        if self.natural:
            self._scale, self._shift = torch.tensor(std), torch.tensor(mean)
        else:
            self._scale, self._shift = torch.full((count,), 0.25), torch.full((count,), 0.5)

    @property
    def caption(self) -> str:
        """What a reader must know about the colours; empty for three channels."""
        count = len(self._scale)
        if count == 1:
            return "one channel, shown in grey"
        if count == 3:
            return ""
        red, green, blue = (channel + 1 for channel in self.shown)
        return (
            f"false colour: red, green, blue are channels {red}, {green}, {blue} of {count}, "
            "each from -2 to 2 standard deviations"
        )

    def __call__(self, image: Tensor) -> np.ndarray:
        """uint8 (H, W, 3) of a normalised float image (C, H, W).

        What overshoots the range is clipped; NaN becomes `BLANK`.
        """
        values = image.float() * self._scale[:, None, None] + self._shift[:, None, None]
        return as_levels(values[self.shown].permute(1, 2, 0).numpy())


def as_levels(values: np.ndarray) -> np.ndarray:
    """uint8 of float (H, W, ...) in [0, 1], clipped; NaN becomes `BLANK`."""
    # Single pixels of a large picture would blur, or beat with those of the screen.
    rows, columns = np.indices(values.shape[:2]) // max(1, max(values.shape[:2]) // 32)
    blank = np.where((rows + columns) % 2, *BLANK).reshape(*values.shape[:2], *(1,) * (values.ndim - 2))
    levels = np.where(np.isnan(values), blank, np.round(255 * np.clip(values, 0, 1)))
    return levels.astype(np.uint8)


def target_panels(target: Any, shown: Reconstruction, view: ChannelView) -> list[Panel]:
    """A prediction in pictures, the one that shows it best first; none for an unknown kind of target.

    Args:
        target: the recipe's Config of the target.
        shown: an image and what was predicted.
        view: how the run's images are shown.
    """
    draw = DRAWN.get(target.name)
    return [] if draw is None else draw(target, shown, view)


def missing_picture(target: Any) -> str | None:
    """Why a target's prediction is not drawn, or None if it is."""
    if target.name in DRAWN:
        return None
    return f"no picture of the prediction: there is no way to draw target {target.name!r}"


def _pixel_panels(target: PixelsConfig, shown: Reconstruction, view: ChannelView) -> list[Panel]:
    honest = predicted_pixels(target, shown)
    assert honest is not None
    if not target.norm_pix:
        return _two_panels(shown, view, honest, "prediction", "")
    ids = shown.ids_removed
    leaking = unnormalise(shown.values_BMV, patch_statistics(shown.pixels_at(ids), shown.counts_at(ids)))
    note = "brightness and contrast estimated from visible neighbours"
    leak = "leaks the answer: brightness and contrast of the removed patches"
    return [
        *_two_panels(shown, view, honest, "prediction", note),
        *_two_panels(shown, view, leaking, "true statistics", leak, leaks=True),
    ]


def _two_panels(
    shown: Reconstruction, view: ChannelView, pixels: Tensor, title: str, note: str, leaks: bool = False
) -> list[Panel]:
    return [
        Panel(f"{title}, in place", note, view(shown.pasted(pixels)), leaks=leaks),
        Panel(f"{title}, alone", note, view(shown.predicted(pixels)), leaks=leaks),
    ]


def histogram_panels(shown: Reconstruction, unpack: Callable[[Tensor], Tensor]) -> list[Panel]:
    """Orientation glyphs of prediction and target, in the masked patches.

    Args:
        shown: an image and what was predicted.
        unpack: from values (1, M, V) to histograms per cell (1, M, K, a, b), a mean over the channels
            for instance; bins as `orientation_glyphs` has them.
    """
    note = "strokes run along edges; brighter is heavier"
    return [
        Panel("prediction, orientations", note, _glyphs(shown, unpack(shown.values_BMV)), True),
        Panel("target, orientations", note, _glyphs(shown, unpack(shown.target_BMV)), True),
    ]


def _glyphs(shown: Reconstruction, cells: Tensor) -> np.ndarray:
    (h, w), (bins, a, b) = shown.grid, cells.shape[2:]
    canvas = np.full((h * w, bins, a, b), np.nan, dtype=np.float32)
    canvas[shown.ids_removed[0].numpy()] = cells[0].float().numpy()
    histograms = rearrange(canvas, "(h w) k a b -> k (h a) (w b)", h=h, w=w)
    grey = as_levels(orientation_glyphs(histograms, GLYPH_PIXELS))
    return grey[:, :, None].repeat(3, axis=2)


def _hog_panels(target: Any, shown: Reconstruction, view: ChannelView) -> list[Panel]:
    """Of `hog`, whose values are in the order (cell row, cell column, C, K)."""
    channels = shown.images.shape[1]
    objective = target.build(patch_size=shown.patch_size, in_chans=channels)
    a, b = objective.cells_per_patch

    def mean_over_channels(values: Tensor) -> Tensor:
        return reduce(values, "n m (a b c k) -> n m k a b", "mean", a=a, b=b, c=channels)

    return histogram_panels(shown, mean_over_channels)


def _combined_panels(target: Any, shown: Reconstruction, view: ChannelView) -> list[Panel]:
    return [panel for part, own in parts_of(target, shown) for panel in target_panels(part, own, view)]


def orientation_glyphs(histograms: np.ndarray, cell_pixels: int = 16, full: float = 1.0) -> np.ndarray:
    """A stroke per bin and cell, along the edge that the bin stands for; the heavier, the brighter.

    Bin k of K holds gradients whose angle atan2(gx, gy), taken without sign, lies in
    [k pi / K, (k + 1) pi / K) (MaskFeat). An edge runs across its gradient, and so does the stroke.

    Args:
        histograms: float (K, h, w); values below 0, which a prediction may have, count as 0. NaN marks a
            cell that is not there.
        cell_pixels: side of a cell's square in the picture, at least 5.
        full: the value that is drawn at full brightness; histograms of L2 norm 1 reach 1.

    Returns:
        float32 (h cell_pixels, w cell_pixels) in [0, 1]; cells that are not there are NaN.
    """
    num_bins, height, width = histograms.shape
    missing = np.isnan(histograms).any(axis=0)
    weights = np.clip(np.where(missing, 0.0, histograms), 0.0, None)
    strokes = np.stack([_stroke(_edge_angle(k, num_bins), cell_pixels) for k in range(num_bins)])
    lit = np.zeros((height, width, cell_pixels, cell_pixels), dtype=np.float32)
    for weight, stroke in zip(np.minimum(weights / full, 1), strokes, strict=True):
        # Where strokes cross, the heavier one is seen.
        lit = np.maximum(lit, weight[:, :, None, None].astype(np.float32) * stroke)
    lit[missing] = np.nan
    return lit.transpose(0, 2, 1, 3).reshape(height * cell_pixels, width * cell_pixels)


def _edge_angle(index: int, num_bins: int) -> float:
    """Direction of the edges in the middle of a bin: radians from the x axis towards y, downwards."""
    # The bin's angle t is measured from the y axis: its gradient is (sin t, cos t), its edge (cos t, -sin t).
    return -(index + 0.5) * math.pi / num_bins


def _stroke(angle: float, side: int) -> np.ndarray:
    """A line through the middle of a square, one pixel wide with soft flanks: float32 (side, side)."""
    centre = np.arange(side, dtype=np.float32) + 0.5 - side / 2
    x, y = centre[None, :], centre[:, None]
    off = np.abs(-math.sin(angle) * x + math.cos(angle) * y)
    along = np.abs(math.cos(angle) * x + math.sin(angle) * y)
    # A margin keeps the strokes of neighbouring cells apart.
    return (np.clip(1.25 - off, 0, 1) * np.clip(side / 2 - 0.5 - along, 0, 1)).astype(np.float32)


DRAWN: dict[str, Callable[[Any, Reconstruction, ChannelView], list[Panel]]] = {
    "pixels": _pixel_panels,
    "hog": _hog_panels,
    "combined": _combined_panels,
}
"""By the literal `name` of a target's Config."""
