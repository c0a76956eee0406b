"""The original's model, from a clone of facebookresearch/mae, on current libraries.

What the current timm and numpy need for it is done here, around it: `qk_scale` is swallowed, `np.float` is
restored. The clone is read only; its licence (CC BY-NC 4.0) is not ours, and nothing of it is part of this
repository.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from etpp_ssl.recipe import Recipe


def is_clone(path: Path) -> bool:
    """Whether a folder holds the original's code."""
    return (path / "models_mae.py").is_file()


def original_model(recipe: Recipe, size: tuple[int, int], clone: Path) -> nn.Module:
    """`MaskedAutoencoderViT` of a clone with a recipe's dimensions, for images of one size.

    Args:
        recipe: says the encoder's and the decoder's dimensions; normalised pixel targets.
        size: (H, W) of the images, in pixels.
        clone: the folder of the clone.

    Raises:
        ValueError: for images or patches that are not square, which the original does not take.
    """
    if size[0] != size[1] or recipe.patch_size[0] != recipe.patch_size[1]:
        raise ValueError("the original takes square images and patches only")
    _, encoder = recipe.model.encoder_args(recipe.size, recipe.in_chans)
    decoder = recipe.model.decoder
    model: nn.Module = import_original(clone).MaskedAutoencoderViT(
        img_size=size[0],
        patch_size=recipe.patch_size[0],
        in_chans=recipe.in_chans,
        embed_dim=encoder["embed_dim"],
        depth=encoder["depth"],
        num_heads=encoder["num_heads"],
        decoder_embed_dim=decoder.embed_dim,
        decoder_depth=decoder.depth,
        decoder_num_heads=decoder.num_heads,
        mlp_ratio=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    return model


def import_original(clone: Path) -> Any:
    """`models_mae` of a clone."""
    import numpy as np

    class Block(timm_vit.Block):
        def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    published = timm_vit.Block
    sys.path.insert(0, str(clone))
    try:
        np.float = float  # type: ignore[attr-defined]
        timm_vit.Block = Block  # type: ignore[misc]
        import models_mae  # type: ignore[import-not-found]
    finally:
        timm_vit.Block = published  # type: ignore[misc]
        sys.path.remove(str(clone))
    return models_mae
