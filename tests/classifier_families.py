"""Small members of the families of classifiers, for their contract tests: arguments of `ClassifierConfig`."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv


@register_model
def tiny_caformer(pretrained: bool = False, **kwargs: Any) -> MetaFormer:
    """timm's CAFormers fix their depths and widths."""
    wanted = {key: value for key, value in kwargs.items() if not key.startswith("pretrained")}
    wanted.pop("cache_dir", None)
    return MetaFormer(
        depths=(1, 1, 2, 1),
        dims=(8, 16, 32, 64),
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        **wanted,
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": {"name": "resnet50", "args": {"layers": [1, 1, 2, 1], "channels": [8, 8, 16, 16]}},
    "convnext": {"name": "convnext_tiny", "args": {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 32]}},
    "deit": {"name": "deit_tiny_patch16_224", "depth": 3, "embed_dim": 24},
    "dinov3": {"name": "vit_small_patch16_dinov3", "depth": 3, "embed_dim": 24, "num_heads": 2},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "args": {"depths": [2, 2, 2, 1], "embed_dim": 8, "num_heads": [1, 2, 2, 2], "window_size": 4},
    },
    "caformer": {"name": "tiny_caformer"},
    "pvt": {
        "name": "pvt_tiny",
        "args": {"depths": [1, 1, 2, 1], "embed_dims": [8, 16, 32, 32], "num_heads": [1, 1, 2, 2]},
    },
    "cswin": {
        "name": "cswin_tiny",
        "args": {"depths": [1, 1, 2, 1], "embed_dim": 16, "num_heads": [2, 2, 4, 4]},
    },
    "vit_of_explicit_dimensions": {
        "name": "vit",
        "patch_size": (16, 8),
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "global_pool": "avg",
    },
}
