"""Normalised images of any number of channels as pictures for a screen.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLANK = (208, 236)
"""Grey levels, as a checkerboard, of what is not there (NaN): no grey alone would be told from
an image's own."""


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
