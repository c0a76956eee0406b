"""Pictures of a prediction, one way of drawing for each kind of target.

To draw another target, write a function like `_pixel_panels` and give it a line in `DRAWN`.

Legend: C channels, H, W pixels, M masked patches, V values per patch, K bins, a, b cells per patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange, reduce
from torch import Tensor

from etpp_ssl.report.channels import ChannelView, as_levels
from etpp_ssl.report.glyphs import orientation_glyphs
from etpp_ssl.report.reconstruction import Reconstruction
from etpp_ssl.report.unnormalise import neighbour_statistics, patch_statistics, unnormalise
from etpp_ssl.targets.pixels import PixelsConfig

GLYPH_PIXELS = 16
"""Side of a histogram cell in a picture."""


class Panel(NamedTuple):
    """A picture and what is said about it."""

    title: str
    note: str
    picture: np.ndarray
    """uint8 (H, W, 3)."""
    magnified: bool = False
    """Drawn larger than the image already: not to be enlarged with it."""
    leaks: bool = False
    """Made with what only the removed patches know."""


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
    if not target.norm_pix:
        return _two_panels(shown, view, shown.values_BMV, "prediction", "")
    visible = shown.pixels_at(shown.ids_keep)
    honest = neighbour_statistics(visible, shown.ids_keep, shown.ids_removed, shown.grid)
    leaking = patch_statistics(shown.pixels_at(shown.ids_removed))
    return [
        *_two_panels(
            shown,
            view,
            unnormalise(shown.values_BMV, honest),
            "prediction",
            "brightness and contrast estimated from visible neighbours",
        ),
        *_two_panels(
            shown,
            view,
            unnormalise(shown.values_BMV, leaking),
            "true statistics",
            "leaks the answer: brightness and contrast of the removed patches",
            leaks=True,
        ),
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
    """Of `combined`, whose parts' values stand one after the other."""
    channels = shown.images.shape[1]
    lengths = [part.build(patch_size=shown.patch_size, in_chans=channels).num_values for part in target.parts]
    values, targets = shown.values_BMV.split(lengths, dim=-1), shown.target_BMV.split(lengths, dim=-1)
    panels = [
        target_panels(part, replace(shown, values_BMV=own, target_BMV=wanted), view)
        for part, own, wanted in zip(target.parts, values, targets, strict=True)
    ]
    return [panel for part in panels for panel in part]


DRAWN: dict[str, Callable[[Any, Reconstruction, ChannelView], list[Panel]]] = {
    "pixels": _pixel_panels,
    "hog": _hog_panels,
    "combined": _combined_panels,
}
"""By the literal `name` of a target's Config."""
