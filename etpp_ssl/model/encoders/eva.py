"""timm's Eva: rotary positions, absolute ones too, or alone. DINOv3, EVA-02, Perception Encoder, Sapiens2.

Rotary positions turn queries and keys of patches; prefix tokens stay unturned, so the attention between these
and patches sees places, not only distances. Places are patch centres: DINOv3 counts them in [-1, 1] of the
image, whatever its grid; EVA-02 and the Perception Encoder in patches of the grid that they were trained at.
timm shifts, jitters and rescales them in training where a network asks for it; here nothing does.

Legend: N patches, R two times the width of a head.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, ClassVar

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from torch import Tensor, nn

from etpp_ssl.model.encoders.base import MaskableEncoder
from etpp_ssl.model.pos_embed import patch_centres


class EvaEncoder(MaskableEncoder):
    """See `MaskableEncoder`."""

    kind = Eva
    other_names: ClassVar = {"reg_tokens": "num_reg_tokens"}
    # As for a ViT. A Perception Encoder for dense tasks has no norm at all, and keeps none.
    fixed_args: ClassVar = {"use_fc_norm": False}

    @classmethod
    def refusal(cls, net: Any) -> str | None:
        """See `MaskableEncoder.refusal`: rotary positions that are learned or of three axes are, too."""
        if net.rope is None and net.pos_embed is None:
            return "has no position embedding to train with"
        if net.rope is not None and type(net.rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
            return f"has a {type(net.rope).__name__}, which is not a function of the patches' places alone"
        return super().refusal(net)

    def rotary(self, grid: tuple[int, int]) -> Tensor | None:
        """See `MaskableEncoder.rotary`; timm's own at full resolution, to the last bit."""
        rope = self.net.rope
        if rope is None:
            return None
        one: Tensor = next(rope.buffers())
        return _rotary_at(rope, grid, self.grid, one.device, one.dtype)


@lru_cache(maxsize=64)
def _rotary_at(
    rope: nn.Module, grid: tuple[int, int], base: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Sines and cosines (N, R) of a grid; device and dtype tell a module that has moved."""
    # A tensor made in inference mode could not take part in training later.
    with torch.inference_mode(False), torch.no_grad():
        plain: Any = copy.deepcopy(rope).eval()
        if grid == base or isinstance(rope, RotaryEmbeddingDinoV3):
            own: Tensor = plain.get_embed(shape=list(grid))
            return own
        return _axial_at(plain, grid, base)


def _axial_at(rope: Any, grid: tuple[int, int], base: tuple[int, int]) -> Tensor:
    """timm's axial embedding at the patch centres of another grid, in the units of the full one."""
    places = []
    for num_patches, full, trained in zip(grid, base, rope.ref_feat_shape or base, strict=True):
        centres = patch_centres(num_patches, full) + rope.grid_offset
        places.append((centres * trained / full).float().to(rope.bands.device))
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*places, indexing="ij"))
    axes = (columns, rows) if rope.grid_indexing == "xy" else (rows, columns)
    angles = torch.cat([axis[:, None] * rope.bands for axis in axes], dim=1)
    twice = torch.cat([angles, angles], dim=1) if rope.rotate_half else angles.repeat_interleave(2, dim=1)
    return torch.cat([twice.sin(), twice.cos()], dim=1)
