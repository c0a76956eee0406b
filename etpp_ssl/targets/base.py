"""What a reconstruction target must offer.

`ids_removed` are the masked patches that are predicted: all of them, or the subset that a decoder was
asked for.

Pixels without data never count. `valid` says which pixels do (`Masker.counted`), and is None where all do; a
target says which of its values depend on those alone (`target_with_gaps`). The loss of a patch is the mean
over its values that count, that of an image the mean over its patches that have such values, and the loss the
mean over the images. So an image has the same weight whatever is missing, in it and in others, and a batch
may be split; where all values count, this is MAE's mean over all masked patches.

Legend: B batch, C channels, M predicted patches, p, q patch height and width, V values per patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from etpp_ssl.model.patches import gather_patches, patchify


class Objective(ABC):
    """A target for the masked patches and the loss against it; holds no state and no parameters."""

    num_values: int
    """V, the numbers to predict per patch."""

    patch_size: tuple[int, int]
    """(p, q) in pixels."""

    @abstractmethod
    def target(self, images: Tensor, ids_removed: Tensor) -> Tensor:
        """The target of the masked patches, without gradient.

        Args:
            images: the normalised low-frequency crop, float (B, C, h p, w q).
            ids_removed: int64 (B, M).

        Returns:
            float32 (B, M, V).
        """

    def target_with_gaps(self, images: Tensor, ids_removed: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The target of images in which pixels have no data, and which of its values count.

        Here all values of a patch count if all of its pixels do, which is right for any target that is made
        of a patch's own pixels.

        Args:
            images, ids_removed: see `target`; the images are finite everywhere.
            valid: bool (B, 1, h p, w q), pixels that count.

        Returns:
            float32 (B, M, V), finite; bool (B, M, V).
        """
        pixels = gather_patches(patchify(valid, self.patch_size), ids_removed)
        target = self.target(images, ids_removed)
        return target, pixels.all(dim=-1, keepdim=True).expand_as(target)

    def losses(
        self, values_BMV: Tensor, ids_removed: Tensor, images: Tensor, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss by name, float32 scalars: `loss` first, then what else is worth logging.

        Here `loss` alone: the mean squared error over the values of a patch, then over the masked
        patches of all images.
        """
        if valid is None:
            error = values_BMV.float() - self.target(images, ids_removed)
            return {"loss": error.square().mean()}
        target, counts = self.target_with_gaps(images, ids_removed, valid)
        return {"loss": mean_that_counts((values_BMV.float() - target).square(), counts)}

    def __call__(
        self, values_BMV: Tensor, ids_removed: Tensor, images: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """The loss to minimise, a float32 scalar: the mean over the predicted patches of all images."""
        return self.losses(values_BMV, ids_removed, images, valid)["loss"]


def mean_that_counts(values_BMV: Tensor, counts_BMV: Tensor) -> Tensor:
    """The mean over the values of a patch that count, then over an image's patches that have any, then over
    the images, where one without such a patch adds zero."""
    num_values_BM = counts_BMV.sum(dim=-1)
    patches_BM = (values_BMV * counts_BMV).sum(dim=-1) / num_values_BM.clamp(min=1)
    num_patches_B = (num_values_BM > 0).sum(dim=-1)
    return (patches_BM.sum(dim=-1) / num_patches_B.clamp(min=1)).mean()
