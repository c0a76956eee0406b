"""CSWin Transformer (Dong et al., CVPR 2022), at any size with one set of parameters.

Importing this file makes `cswin_tiny`, `cswin_small` and `cswin_base` known to timm. Parameters are named
as in the published checkpoints, which therefore load as they are.

Stripes follow the input: stages 1 and 2 have stripes of 1 and 2 tokens, stages 3 and 4 of B/32 (7 at 224, as
published; EfficientTrain++, Table 7). On a rectangular input each axis has its own: horizontal stripes are
H/32 tokens high, vertical ones W/32 wide. So stage 3 always has two stripes of each kind, and stage 4 attends
over its whole map. The one position information, LePE, is a depthwise convolution and has no size.

Legend: B batch, C channels, H, W pixels, h, w the stage's grid, s, t height and width of a stripe, N = h w
tokens, D width, E width of one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.model.zoo.pyramid import STRIDES, Pyramid, build, default_cfg, drop_path_rates

STRIPE_WIDTHS = (1, 2, None, None)
"""Of each stage, in tokens; None is B/32, the side of the last stage's map."""

default_cfgs = generate_default_cfgs(
    {
        name: default_cfg(first_conv="stage1_conv_embed.0")
        for name in ("cswin_tiny", "cswin_small", "cswin_base")
    }
)


class StripeAttention(nn.Module):
    """Attention within stripes, plus locally-enhanced positions (LePE, section 3.3).

    LePE is a depthwise 3 x 3 convolution of the values within each stripe: zeros stand around the stripe, not
    around the map.

    Args:
        dim: E.
        num_heads: of this branch.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.get_v = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, qkv: Tensor, stripe: tuple[int, int]) -> Tensor:
        """Mix the tokens of each stripe.

        Args:
            qkv: (3, B, h, w, E), queries, keys and values.
            stripe: (s, t) in tokens; s divides h and t divides w.

        Returns:
            (B, h, w, E).
        """
        (h, w), (s, t) = qkv.shape[2:4], stripe
        cut = rearrange(qkv, "three b (i s) (j t) e -> three (b i j) s t e", s=s, t=t)
        q, k, v = rearrange(cut, "three n s t (heads d) -> three n heads (s t) d", heads=self.num_heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        lepe = self.get_v(rearrange(cut[2], "n s t e -> n e s t"))
        mixed = rearrange(mixed, "n heads (s t) d -> n (heads d) s t", s=s) + lepe
        joined: Tensor = rearrange(mixed, "(b i j) e s t -> b (i s) (j t) e", i=h // s, j=w // t)
        return joined


class CSWinBlock(nn.Module):
    """A pre-norm transformer block around cross-shaped window attention.

    Half of the heads attend within vertical stripes, half within horizontal ones (section 3.2).

    Args:
        dim: D.
        num_heads: of both halves together.
        stage: 0 to 3. Blocks of the last one attend over the whole map, with all heads.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: probability to drop a branch, per sample.
    """

    def __init__(self, dim: int, num_heads: int, stage: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.stripe_width, self.stride = STRIPE_WIDTHS[stage], STRIDES[stage]
        num_branches = 1 if self.stride == STRIDES[-1] else 2
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attns = nn.ModuleList(
            StripeAttention(dim // num_branches, num_heads // num_branches) for _ in range(num_branches)
        )
        self.proj = nn.Linear(dim, dim)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) to the same."""
        x = x + self.drop_path1(self.proj(self._attend(self.norm1(x))))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def stripes(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """(s, t) of each branch on a map of h x w tokens: vertical, then horizontal; or the map itself."""
        h, w = grid
        if len(self.attns) == 1:
            return [(h, w)]
        return [(h, self._width(w)), (self._width(h), w)]

    def _width(self, side: int) -> int:
        return self.stripe_width or side * self.stride // STRIDES[-1]

    def _attend(self, x: Tensor) -> Tensor:
        parts = rearrange(
            self.qkv(x), "b h w (three branch e) -> branch three b h w e", three=3, branch=len(self.attns)
        )
        stripes = self.stripes((x.shape[1], x.shape[2]))
        mixed = [attn(qkv, stripe) for attn, qkv, stripe in zip(self.attns, parts, stripes, strict=True)]
        return torch.cat(mixed, dim=-1)


class Merge(nn.Module):
    """The way into the next stage: an overlapping convolution that halves the map, then a norm."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) to (B, h/2, w/2, D_out)."""
        halved = self.conv(rearrange(x, "b h w d -> b d h w"))
        tokens: Tensor = self.norm(rearrange(halved, "b d h w -> b h w d"))
        return tokens


class CSWinTransformer(Pyramid):
    """CSWin. The head reads the mean of the last stage's tokens; no parameter depends on the image's size.

    Args:
        img_size, in_chans, num_classes, global_pool: as for `Pyramid`; the pool is "avg".
        embed_dim: D of the first stage; each further stage doubles it.
        depths, num_heads: of the four stages.
        mlp_ratio: hidden width of the MLPs over D.
        drop_path_rate: of the last block; it grows linearly from 0.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dims = [embed_dim * 2**stage for stage in range(4)]
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dims=dims,
            stage_names=[f"stage{stage}" for stage in (1, 2, 3, 4)],
        )
        # In the published names the norm is the third of the stem's modules.
        self.stage1_conv_embed = nn.ModuleDict(
            {
                "0": nn.Conv2d(in_chans, embed_dim, kernel_size=7, stride=4, padding=2),
                "2": nn.LayerNorm(embed_dim),
            }
        )
        rates = drop_path_rates(drop_path_rate, depths)
        for i, dim in enumerate(dims):
            if i > 0:
                self.add_module(f"merge{i}", Merge(dims[i - 1], dim))
            blocks = (CSWinBlock(dim, num_heads[i], i, mlp_ratio, rate) for rate in rates[i])
            self.add_module(f"stage{i + 1}", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(self.num_features)
        self.head = self._new_head()
        self.init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """float (B, C, H, W) to normed tokens, (B, N, D): the last stage's map, row by row."""
        self.check_size((x.shape[-2], x.shape[-1]))
        x = rearrange(self.stage1_conv_embed["0"](x), "b d h w -> b h w d")
        x = self.stage1_conv_embed["2"](x)
        for stage in (1, 2, 3, 4):
            if stage > 1:
                x = self.get_submodule(f"merge{stage - 1}")(x)
            x = self.run_blocks(f"stage{stage}", x)
        normed: Tensor = self.norm(x.flatten(1, 2))
        return normed

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layers, for layer decay: a merging convolution belongs to the first block behind it."""
        merges = [(rf"^merge{i}", (i + 1,) if coarse else (i + 1, 0)) for i in (1, 2, 3)]
        blocks = (r"^stage(\d+)\." if coarse else r"^stage(\d+)\.(\d+)", None)
        return {"stem": r"^stage1_conv_embed", "blocks": [*merges, blocks, (r"^norm", (99999,))]}


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """CSWin-T: 22.3 M parameters, 4.3 G multiply-adds at 224 pixels."""
    args = {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)}
    return build(CSWinTransformer, "cswin_tiny", pretrained, **{**args, **kwargs})


@register_model
def cswin_small(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """CSWin-S: 34.6 M parameters, 6.8 G multiply-adds at 224 pixels.

    The paper says 6.9; its published code, counted alike, has 6.80 as this has.
    """
    args = {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)}
    return build(CSWinTransformer, "cswin_small", pretrained, **{**args, **kwargs})


@register_model
def cswin_base(pretrained: bool = False, **kwargs: Any) -> Pyramid:
    """CSWin-B: 77.4 M parameters, 15.0 G multiply-adds at 224 pixels."""
    args = {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}
    return build(CSWinTransformer, "cswin_base", pretrained, **{**args, **kwargs})
