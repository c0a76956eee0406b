"""What a reconstruction target must offer.

`ids_removed` are the masked patches that are predicted: all of them, or the subset that a decoder was
asked for.

Legend: B batch, C channels, M predicted patches, V values per patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Objective(ABC):
    """A target for the masked patches and the loss against it; holds no state and no parameters."""

    num_values: int
    """V, the numbers to predict per patch."""

    @abstractmethod
    def target(self, images: Tensor, ids_removed: Tensor) -> Tensor:
        """The target of the masked patches, without gradient.

        Args:
            images: the normalised low-frequency crop, float (B, C, h p, w q).
            ids_removed: int64 (B, M).

        Returns:
            float32 (B, M, V).
        """

    def losses(self, values_BMV: Tensor, ids_removed: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The loss by name, float32 scalars: `loss` first, then what else is worth logging.

        Here `loss` alone: the mean squared error over the values of a patch, then over the masked
        patches of all images.
        """
        error = values_BMV.float() - self.target(images, ids_removed)
        return {"loss": error.square().mean()}

    def __call__(self, values_BMV: Tensor, ids_removed: Tensor, images: Tensor) -> Tensor:
        """The loss to minimise, a float32 scalar: the mean over the predicted patches of all images."""
        return self.losses(values_BMV, ids_removed, images)["loss"]
