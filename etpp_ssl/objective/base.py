"""What a reconstruction target must offer.

`ids_removed` are the masked patches that are predicted: all of them, or the subset that a decoder was
asked for.

Legend: B batch, C channels, M predicted patches, V values per patch.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """A target for the masked patches and the loss against it; holds no state and no parameters."""

    @property
    def num_values(self) -> int:
        """V, the numbers to predict per patch."""

    def target(self, images: Tensor, ids_removed: Tensor) -> Tensor:
        """The target of the masked patches, without gradient.

        Args:
            images: the normalised low-frequency crop, float (B, C, h p, w q).
            ids_removed: int64 (B, M).

        Returns:
            float32 (B, M, V).
        """

    def __call__(self, values_BMV: Tensor, ids_removed: Tensor, images: Tensor) -> Tensor:
        """The loss, a float32 scalar: the mean over the predicted patches of all images."""
