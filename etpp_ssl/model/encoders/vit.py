"""timm's VisionTransformer: absolute positions alone. MAE, DeiT, DINO, DINOv2, CLIP and SigLIP are of it."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from etpp_ssl.model.encoders.base import MaskableEncoder


class VitEncoder(MaskableEncoder):
    """See `MaskableEncoder`."""

    kind = VisionTransformer
    other_names: ClassVar = {}
    # Otherwise timm moves the norm behind the average pooling.
    fixed_args: ClassVar = {"fc_norm": False}

    @classmethod
    def refusal(cls, net: Any) -> str | None:
        """See `MaskableEncoder.refusal`: a network without positions is refused, too."""
        if net.pos_embed is None:
            return "has no position embedding to train with"
        return super().refusal(net)

    def rotary(self, grid: tuple[int, int]) -> Tensor | None:
        """None."""
        return None
