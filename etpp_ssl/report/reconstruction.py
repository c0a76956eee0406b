"""A masked image and what a model predicts of it, in the target's values and as pixels; NaN is not shown.

A target of normalised pixels says a patch's pattern, not its brightness and contrast. To undo the
normalisation with the mean and standard deviation of the removed patch itself would take both from the
answer; the honest picture estimates them from the visible patches around.

Legend: B batch, C channels, H, W pixels, h, w grid, p, q patch, K visible, M masked, V values per patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import Masker
from etpp_ssl.model.patches import gather_patches, grid_of, patchify, unpatchify
from etpp_ssl.targets.pixels import PatchStatistics, patch_statistics, values_that_count

RADIUS = 1.0
"""Standard deviation, in patches, of the Gaussian that weighs visible neighbours."""


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
    valid: Tensor | None = None
    """bool (1, 1, H, W): pixels that count; None where all do."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), patches per axis."""
        return grid_of((self.images.shape[-2], self.images.shape[-1]), self.patch_size)

    def pixels_at(self, ids: Tensor) -> Tensor:
        """The image's own pixels in some patches, (1, n, p q C) for int64 (1, n)."""
        return gather_patches(patchify(self.images, self.patch_size), ids)

    def counts_at(self, ids: Tensor) -> Tensor | None:
        """Which of `pixels_at` count, bool of its shape; None where all do."""
        if self.valid is None:
            return None
        return values_that_count(self.valid, ids, self.patch_size, self.pixels_at(ids).shape[-1])

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


def neighbour_statistics(
    visible_BKV: Tensor,
    ids_keep: Tensor,
    ids_removed: Tensor,
    grid: tuple[int, int],
    counts_BKV: Tensor | None = None,
) -> PatchStatistics:
    """Statistics of masked patches, estimated from the visible patches alone.

    The rule: a masked patch's mean is the weighted average of the visible patches' means, and its
    standard deviation that of their standard deviations. The weight of a visible patch at distance d is
    exp(-d^2 / (2 RADIUS^2)); d is Euclidean, in patches between centres on the grid. The weights of each
    masked patch are scaled to add up to 1, so one that is far from all visible patches takes the
    nearest ones.

    Args:
        visible_BKV: float (B, K, V), the visible patches' pixels.
        ids_keep: int64 (B, K), where they are.
        ids_removed: int64 (B, M), the patches to estimate.
        grid: (h, w), patches per axis.
        counts_BKV: bool (B, K, V), the visible pixels that count; None where all do.
    """
    visible = patch_statistics(visible_BKV, counts_BKV)
    distance_BMK = torch.cdist(_centres(ids_removed, grid), _centres(ids_keep, grid))
    # A softmax divides by the sum without underflow, however far the nearest patch is.
    weights_BMK = (-(distance_BMK**2) / (2 * RADIUS**2)).softmax(dim=-1)
    return PatchStatistics(weights_BMK @ visible.mean, weights_BMK @ visible.std)


def unnormalise(values_BMV: Tensor, statistics: PatchStatistics) -> Tensor:
    """The inverse of `normalise_patches` with the given statistics: float32 (B, M, V)."""
    return values_BMV.float() * statistics.std + statistics.mean


def _centres(ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row and column of patches, float32 (B, n, 2)."""
    return torch.stack([ids // grid[1], ids % grid[1]], dim=-1).float()


def predicted_pixels(target: Any, shown: Reconstruction) -> Tensor | None:
    """The pixels that a prediction says, with honest statistics where they are normalised.

    Args:
        target: the Config of the target.
        shown: an image and what was predicted of it.

    Returns:
        float32 (1, M, p q C), normalised as the images are; of a combined target those of its pixels part.
        None where nothing predicts pixels.
    """
    if target.name == "combined":
        found = (predicted_pixels(part, own) for part, own in parts_of(target, shown))
        return next((pixels for pixels in found if pixels is not None), None)
    if target.name != "pixels":
        return None
    if not target.norm_pix:
        return shown.values_BMV
    visible, counts = shown.pixels_at(shown.ids_keep), shown.counts_at(shown.ids_keep)
    honest = neighbour_statistics(visible, shown.ids_keep, shown.ids_removed, shown.grid, counts)
    return unnormalise(shown.values_BMV, honest)


def parts_of(target: Any, shown: Reconstruction) -> list[tuple[Any, Reconstruction]]:
    """The parts of a combined target, each with the reconstruction in its own values."""
    channels = shown.images.shape[1]
    lengths = [part.build(patch_size=shown.patch_size, in_chans=channels).num_values for part in target.parts]
    values, targets = shown.values_BMV.split(lengths, dim=-1), shown.target_BMV.split(lengths, dim=-1)
    return [
        (part, replace(shown, values_BMV=own, target_BMV=wanted))
        for part, own, wanted in zip(target.parts, values, targets, strict=True)
    ]


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


class Reconstructed(NamedTuple):
    """An image, what the model was shown of it, and what it made of that; values in [0, 1]."""

    image: np.ndarray
    """float32 (H, W, C): the image at the bandwidth."""
    masked: np.ndarray
    """The same, mid-grey where patches were hidden."""
    reconstruction: np.ndarray
    """The same, the model's prediction where patches were hidden. Of a target that is normalised per patch
    (`norm_pix`), brightness and contrast are estimated from the visible patches nearby."""
    hidden: np.ndarray
    """bool (H, W): where patches were hidden."""
    loss: float
    """The training loss of this image under this mask."""

    def __repr__(self) -> str:
        height, width, _ = self.image.shape
        share = self.hidden.mean()
        return f"Reconstructed({height}x{width} px, {share:.0%} hidden, loss {self.loss:.4g})"


@dataclass(frozen=True)
class Decoding:
    """What it takes to reconstruct images."""

    model: MaskedAutoencoder
    """In eval mode."""
    target: Any
    """The Config of the target; see `etpp_ssl.targets`."""
    masker: Masker
    lanczos: bool = False
    """Whether an image is brought to a bandwidth by a Lanczos resize instead of a low-frequency crop."""

    def predict(self, images: Tensor, number: int, has_data: Tensor | None = None) -> Reconstruction:
        """Hide patches of an image, and predict them in float32.

        Args:
            images: the normalised low-frequency crop, float32 (1, C, H, W), whole patches. The model moves to
                its device.
            number: of the sample whose mask is taken.
            has_data: bool (1, 1, H, W), pixels with data; None where all have.

        Raises:
            UserError: if no patch would be visible or hidden.
        """
        model, device = self.model.to(images.device), images.device
        size = (images.shape[-2], images.shape[-1])
        valid = None if has_data is None else self.masker.counted(has_data)
        ids_keep = self.masker.everything(torch.tensor([number], device=device), size, valid).ids_keep
        objective = self.target.build(patch_size=model.patch_size, in_chans=images.shape[1])
        with torch.inference_mode():
            values_BMV, ids_removed = model(images, ids_keep)
            loss = objective(values_BMV, ids_removed, images, valid).item()
            if valid is None:
                target_BMV = objective.target(images, ids_removed)
            else:
                target_BMV, _ = objective.target_with_gaps(images, ids_removed, valid)
        return Reconstruction(
            images, model.patch_size, ids_keep, ids_removed, values_BMV.float(), target_BMV, loss, valid
        )

    def reconstruct(
        self,
        image: Tensor,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        has_data: Tensor | None = None,
    ) -> Reconstructed:
        """The pictures of `predict`.

        Args:
            image: the normalised low-frequency crop, float32 (C, H, W), whole patches.
            seed: of the mask, which is that of sample 0.
            mean, std: of the normalisation, per channel.
            has_data: see `predict`.

        Raises:
            UserError: if the model does not predict pixels, or no patch would be visible or hidden.
        """
        shown = replace(self, masker=replace(self.masker, seed=seed)).predict(image[None], 0, has_data)
        pixels = predicted_pixels(self.target, shown)
        if pixels is None:
            raise UserError(
                f"the model predicts {self.target.name}, which is not pixels: only those are given as arrays"
            )
        scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))

        def levels(normalised: Tensor) -> np.ndarray:
            values = (normalised.cpu() * scale + shift).clamp(0, 1)
            array: np.ndarray = values.permute(1, 2, 0).contiguous().numpy()
            return array

        visible = levels(shown.visible())
        hidden = np.isnan(visible).any(axis=2)
        return Reconstructed(
            image=levels(image),
            masked=np.where(hidden[:, :, None], np.float32(0.5), visible),
            reconstruction=levels(shown.pasted(pixels)),
            hidden=hidden,
            loss=shown.loss,
        )
