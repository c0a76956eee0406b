"""Pyramid Vision Transformer, version 1 (Wang et al., ICCV 2021), at any size with one set of parameters.

Importing this file makes `pvt_tiny`, `pvt_small`, `pvt_medium` and `pvt_large` known to timm. Parameters
are named as in the published checkpoints, which therefore load as they are.

Legend: B batch, C channels, H, W pixels, h, w the stage's grid, N = h w tokens, M reduced tokens, D width,
R side of the cells that keys and values are reduced by.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.model.pos_embed import resampled_pos_embed
from etpp_ssl.model.zoo.pyramid import STRIDES, Pyramid, build, default_cfg, drop_path_rates

REDUCTIONS = (8, 4, 2, 1)
"""R of each stage: keys and values always lie on the grid of the last stage (the paper's Table 1)."""

default_cfgs = generate_default_cfgs(
    {
        # The base size gives the position embeddings their shape.
        name: default_cfg(first_conv="patch_embed1.proj", fixed_input_size=True)
        for name in ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")
    }
)


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values are made of cells of R x R tokens (section 3.3).

    Args:
        dim: D.
        num_heads: of the attention.
        reduction: R; 1 is plain attention.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.reduces = reduction > 1
        if self.reduces:
            self.sr = nn.Conv2d(dim, dim, kernel_size=reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) to the same; without a reduction also (B, N, D), in any order of the tokens."""
        source = x
        if self.reduces:
            source = self.norm(rearrange(self.sr(rearrange(x, "b h w d -> b d h w")), "b d h w -> b h w d"))
        q, kv = self.q(x).flatten(1, -2), self.kv(source).flatten(1, -2)
        q = rearrange(q, "b n (heads d) -> b heads n d", heads=self.num_heads)
        k, v = rearrange(kv, "b m (two heads d) -> two b heads m d", two=2, heads=self.num_heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        output: Tensor = self.proj(mixed).reshape(x.shape)
        return output


class Block(nn.Module):
    """A pre-norm transformer block around spatial-reduction attention.

    Args:
        dim: D.
        num_heads, reduction: of the attention.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: probability to drop a branch, per sample.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, num_heads, reduction)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """What `SpatialReductionAttention` takes, to the same shape."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class PatchEmbedding(nn.Module):
    """The entrance of a stage: a projection of patches, then a norm."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h p, w p) to (B, h, w, D)."""
        tokens: Tensor = self.norm(rearrange(self.proj(x), "b d h w -> b h w d"))
        return tokens


class PyramidVisionTransformer(Pyramid):
    """PVT v1. Each stage has learned positions; the last one has a cls token, which the head reads.

    Sizes other than `img_size` resample the positions inside the forward pass, the cls token's excepted, so
    parameters keep the shape of the base grid. (The original resamples bilinearly, without antialiasing.)

    Args:
        img_size, in_chans, num_classes, global_pool: as for `Pyramid`; the pools are "token" and "avg".
        embed_dims, depths, num_heads, mlp_ratios: of the four stages.
        drop_path_rate: of the last block; it grows linearly from 0.
    """

    pools: ClassVar[tuple[str, ...]] = ("token", "avg", "")
    num_prefix_tokens: ClassVar[int] = 1

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dims=embed_dims,
            stage_names=[f"block{stage}" for stage in (1, 2, 3, 4)],
        )
        self.grids = [(self.img_size[0] // stride, self.img_size[1] // stride) for stride in STRIDES]
        rates = drop_path_rates(drop_path_rate, depths)
        chans = in_chans
        for i, (dim, (h, w)) in enumerate(zip(embed_dims, self.grids, strict=True)):
            block = partial(Block, dim, num_heads[i], REDUCTIONS[i], mlp_ratios[i])
            num_positions = h * w + (self.num_prefix_tokens if i == 3 else 0)
            self.add_module(f"patch_embed{i + 1}", PatchEmbedding(chans, dim, 4 if i == 0 else 2))
            self.register_parameter(f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, num_positions, dim)))
            self.add_module(f"block{i + 1}", nn.ModuleList(block(rate) for rate in rates[i]))
            chans = dim
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        self.head = self._new_head()
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal(0.02) also for positions and the cls token."""
        super().init_weights()
        for token in (self.cls_token, *(getattr(self, f"pos_embed{stage}") for stage in (1, 2, 3, 4))):
            trunc_normal_(token, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        """float (B, C, H, W) to normed tokens, (B, 1 + N, D): the cls token, then the last stage's map."""
        self.check_size((x.shape[-2], x.shape[-1]))
        for stage in (1, 2, 3):
            x_BhwD = getattr(self, f"patch_embed{stage}")(x)
            grid = (x_BhwD.shape[1], x_BhwD.shape[2])
            x_BhwD = x_BhwD + self._positions(stage, grid).unflatten(1, grid)
            x = rearrange(self.run_blocks(f"block{stage}", x_BhwD), "b h w d -> b d h w")
        x_BhwD = self.get_submodule("patch_embed4")(x)
        grid = (x_BhwD.shape[1], x_BhwD.shape[2])
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x_BhwD.flatten(1, 2)], dim=1)
        normed: Tensor = self.norm(self.run_blocks("block4", tokens + self._positions(4, grid)))
        return normed

    def no_weight_decay(self) -> set[str]:
        """The cls token and, as in a ViT, the positions; the original decays those."""
        return {"cls_token", *(f"pos_embed{stage}" for stage in (1, 2, 3, 4))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layers, for layer decay: what enters with a stage belongs to the stage's first block."""
        entrance = r"^(?:patch_embed|pos_embed)(\d+)"
        blocks: list[tuple[str, tuple[int, ...] | None]] = [
            (entrance, None if coarse else (0,)),
            (r"^cls_token", (4,) if coarse else (4, 0)),
            (r"^block(\d+)" if coarse else r"^block(\d+)\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^(?:patch_embed|pos_embed)1\b", "blocks": blocks}

    def _positions(self, stage: int, grid: tuple[int, int]) -> Tensor:
        """(1, P + N, D) for the grid, P of the last stage only."""
        prefix = self.num_prefix_tokens if stage == 4 else 0
        return resampled_pos_embed(getattr(self, f"pos_embed{stage}"), grid, self.grids[stage - 1], prefix)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """PVT-Tiny: 13.2 M parameters, 1.9 G multiply-adds at 224 pixels."""
    return build(PyramidVisionTransformer, "pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """PVT-Small: 24.5 M parameters, 3.8 G multiply-adds at 224 pixels."""
    return build(PyramidVisionTransformer, "pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """PVT-Medium: 44.2 M parameters, 6.7 G multiply-adds at 224 pixels."""
    return build(PyramidVisionTransformer, "pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """PVT-Large: 61.4 M parameters, 9.8 G multiply-adds at 224 pixels."""
    return build(PyramidVisionTransformer, "pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})
