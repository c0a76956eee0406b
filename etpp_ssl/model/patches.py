"""Images to patches and back.

Legend: B batch, C channels, H, W pixels, h, w grid, p, q patch height and width, N = h w patches,
K gathered patches, V values per patch.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches in MAE's order, values (p, q, C) within a patch.

    Args:
        images: (B, C, H, W), H and W multiples of the patch size.
        patch_size: (p, q) in pixels.

    Returns:
        (B, N, p q C), row by row over the grid (MAE, `models_mae.py`).
    """
    p, q = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, N, p q C) to (B, C, H, W)."""
    (h, w), (p, q) = grid, patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)


def gather_patches(patches_BNV: Tensor, ids_BK: Tensor) -> Tensor:
    """The patches at `ids`, in their order: (B, N, V) and int64 (B, K) to (B, K, V)."""
    return patches_BNV.gather(1, ids_BK[:, :, None].expand(-1, -1, patches_BNV.shape[-1]))


def grid_of(size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Patches per axis of an image of `size` pixels; the patch size must divide it."""
    assert size[0] % patch_size[0] == 0, (size, patch_size)
    assert size[1] % patch_size[1] == 0, (size, patch_size)
    return size[0] // patch_size[0], size[1] // patch_size[1]
