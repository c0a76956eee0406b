"""A decoder's prediction as arrays of pixels.

Legend: C channels, H, W pixels, p, q patch size, M masked patches, V values per patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import Masker
from etpp_ssl.report.reconstruction import predicted_pixels, reconstruct


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
    """What belongs to an encoder that can reconstruct."""

    model: MaskedAutoencoder
    """In eval mode."""
    target: Any
    """The Config of the target; see `etpp_ssl.targets`."""
    masker: Masker
    lanczos: bool = False
    """Whether an image is brought to a bandwidth by a Lanczos resize instead of a low-frequency crop."""

    def reconstruct(
        self, image: Tensor, seed: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Reconstructed:
        """Hide patches of an image, and predict them in float32.

        Args:
            image: the normalised low-frequency crop, float32 (C, H, W), whole patches. The model moves to its
                device.
            seed: of the mask, which is that of sample 0.
            mean, std: of the normalisation, per channel.

        Raises:
            UserError: if the model does not predict pixels, or no patch would be visible or hidden.
        """
        masker = replace(self.masker, seed=seed)
        ids = masker.everything(torch.tensor([0]), (image.shape[-2], image.shape[-1])).ids_keep
        objective = self.target.build(patch_size=self.model.patch_size, in_chans=len(mean))
        shown = reconstruct(self.model.to(image.device), objective, image[None], ids.to(image.device))
        pixels = predicted_pixels(self.target, shown)
        if pixels is None:
            raise UserError(
                f"the model predicts {self.target.name}, which is not pixels; `etpp reconstruct` draws it"
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
