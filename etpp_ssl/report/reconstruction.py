"""What a model makes of a masked image, as images with NaN where nothing is shown.

Legend: B batch, C channels, H, W pixels, h, w grid, p, q patch, N patches, K visible, M masked, V values
per patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.patches import gather_patches, grid_of, patchify, unpatchify
from etpp_ssl.targets.base import Objective


@dataclass(frozen=True)
class Reconstruction:
    """One image, its mask and what the model predicts of the rest."""

    images: Tensor
    """The normalised low-frequency crop, float32 (1, C, H, W)."""
    patch_size: tuple[int, int]
    ids_keep: Tensor
    """int64 (1, K), ascending."""
    ids_removed: Tensor
    """int64 (1, M): the patches predicted."""
    values_BMV: Tensor
    """The prediction, in the target's values: float32 (1, M, V)."""
    target_BMV: Tensor
    """The target, float32 (1, M, V)."""
    loss: float
    """The training loss of this image under this mask."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), patches per axis."""
        return grid_of((self.images.shape[-2], self.images.shape[-1]), self.patch_size)

    def pixels_at(self, ids: Tensor) -> Tensor:
        """The image's own pixels in some patches, (1, n, p q C) for int64 (1, n)."""
        return gather_patches(patchify(self.images, self.patch_size), ids)

    def visible(self) -> Tensor:
        """The masked input: (C, H, W), NaN where patches are removed."""
        return place(self.pixels_at(self.ids_keep), self.ids_keep, self.grid, self.patch_size)[0]

    def predicted(self, pixels_BMV: Tensor) -> Tensor:
        """Predicted pixels alone: (C, H, W), NaN elsewhere.

        Args:
            pixels_BMV: (1, M, p q C), normalised as the images are.
        """
        return place(pixels_BMV, self.ids_removed, self.grid, self.patch_size)[0]

    def pasted(self, pixels_BMV: Tensor) -> Tensor:
        """Predicted pixels around the visible ones: (C, H, W)."""
        predicted = self.predicted(pixels_BMV)
        return torch.where(predicted.isnan(), self.visible(), predicted)


def reconstruct(
    model: MaskedAutoencoder, objective: Objective, images: Tensor, ids_keep: Tensor
) -> Reconstruction:
    """Let the model predict what is masked, in float32.

    Args:
        model: in eval mode.
        objective: the run's target.
        images: the normalised low-frequency crop, float32 (1, C, H, W), whole patches.
        ids_keep: int64 (1, K), the visible patches.
    """
    with torch.inference_mode():
        values_BMV, ids_removed = model(images, ids_keep)
        loss = objective(values_BMV, ids_removed, images).item()
        target_BMV = objective.target(images, ids_removed)
    return Reconstruction(
        images, model.patch_size, ids_keep, ids_removed, values_BMV.float(), target_BMV, loss
    )


def place(patches_BKV: Tensor, ids: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Images that hold the given patches, and NaN in all others.

    Args:
        patches_BKV: float (B, K, p q C).
        ids: int64 (B, K), their places on the grid.
        grid: (h, w), patches per axis.
        patch_size: (p, q) in pixels.

    Returns:
        (B, C, h p, w q).
    """
    batch, _, num_values = patches_BKV.shape
    canvas_BNV = patches_BKV.new_full((batch, grid[0] * grid[1], num_values), float("nan"))
    canvas_BNV.scatter_(1, ids[:, :, None].expand(-1, -1, num_values), patches_BKV)
    return unpatchify(canvas_BNV, grid, patch_size)


def parse_bandwidth(text: str) -> tuple[int, int]:
    """(height, width) from `96` or `96x128`.

    Raises:
        UserError: for anything else.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"bandwidth {text!r} is neither a number of pixels nor HEIGHTxWIDTH, such as 96x128")
    return int(parts[0]), int(parts[-1])


def check_bandwidth(
    bandwidth: tuple[int, int], image_size: tuple[int, int], patch_size: tuple[int, int]
) -> None:
    """Refuse a bandwidth that is beyond the image or holds no whole number of patches.

    Raises:
        UserError: naming the bandwidth and what would be valid.
    """
    for asked, full, patch in zip(bandwidth, image_size, patch_size, strict=True):
        if asked < 1 or asked > full or asked % patch:
            raise UserError(
                f"bandwidth {show_size(bandwidth)} does not serve: each axis takes a multiple of the patch "
                f"({show_size(patch_size)}) up to the image ({show_size(image_size)})"
            )
