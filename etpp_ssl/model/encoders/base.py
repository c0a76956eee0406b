"""What pre-training needs of an encoder: embed patches, know positions at any grid, run blocks, pool.

The network is timm's own and stays as it is: parameters have timm's names, and features and exports use its
own forward. A `MaskableEncoder` stands beside it and runs its modules on the visible patches alone.

Legend: B batch, C channels, H, W pixels, h, w grid, N = h w patches, K visible patches, P prefix tokens,
D width, R two times the width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import as_pair
from etpp_ssl.model.patches import gather_patches, grid_of
from etpp_ssl.model.pos_embed import resampled_pos_embed, sincos_on

RunBlock = Callable[..., Tensor]
"""Runs `block(tokens, *inputs)`; see `etpp_ssl.model.attention.BlockRunner`."""


class Positions(NamedTuple):
    """Where the patches of a grid lie."""

    added: Tensor | None
    """(1, P or 0 + N, D), added to tokens in front of the blocks."""
    rotary: Tensor | None
    """float (N, R), sines and cosines that the blocks turn queries and keys of patches by."""


class MaskableEncoder(ABC):
    """A timm network as an encoder of visible patches.

    Args:
        net: of the class `kind`, at full resolution, and one that `refusal` accepts.
    """

    kind: ClassVar[type[nn.Module]]
    """timm's class; those derived from it may compute something else and are not meant."""
    other_names: ClassVar[dict[str, str]]
    """timm's names of the dimensions in a recipe, where they differ."""
    fixed_args: ClassVar[dict[str, Any]]
    """timm's arguments that keep the final norm on every token: MAE's decoder reads all of them."""

    def __init__(self, net: Any) -> None:
        self.net = net

    @classmethod
    def refusal(cls, net: Any) -> str | None:
        """Why a network of this class cannot be masked, as the end of a sentence; None if it can."""
        from timm.layers import PatchEmbed

        if type(net.patch_embed) is not PatchEmbed:
            return f"is a {type(net).__name__} on a {type(net.patch_embed).__name__}"
        return None

    @property
    def patch_size(self) -> tuple[int, int]:
        """(p, q) in pixels."""
        return as_pair(tuple(self.net.patch_embed.patch_size))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches at full resolution."""
        return as_pair(tuple(self.net.patch_embed.grid_size))

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a cls token."""
        return self.net.cls_token is not None

    @property
    def num_registers(self) -> int:
        """Register tokens behind it."""
        return 0 if self.net.reg_token is None else int(self.net.reg_token.shape[1])

    @property
    def num_prefix_positions(self) -> int:
        """Rows of `pos_embed` that belong to prefix tokens."""
        return 0 if self.net.no_embed_class else int(self.net.num_prefix_tokens)

    @property
    def num_heads(self) -> int:
        """Heads of each attention layer."""
        # Parallel blocks keep it elsewhere than in `attn`.
        return next(int(m.num_heads) for m in self.net.blocks.modules() if hasattr(m, "num_heads"))

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """The visible patches' tokens without a position: (B, C, h p, w q) to (B, K, D).

        Only those are projected. Without `ids_keep` all are, by timm's own convolution.
        """
        patch_embed = self.net.patch_embed
        if ids_keep is None:
            tokens: Tensor = patch_embed.norm(patch_embed.proj(images).flatten(2).transpose(1, 2))
            return tokens
        p, q = self.patch_size
        patches_BNV = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        visible_BKV = gather_patches(patches_BNV, ids_keep)
        weight, bias = patch_embed.proj.weight.flatten(1), patch_embed.proj.bias
        normed: Tensor = patch_embed.norm(F.linear(visible_BKV, weight, bias))
        return normed

    def positions(self, grid: tuple[int, int]) -> Positions:
        """Where the patches of a grid lie; learned positions are resampled, and take part in training."""
        added = self.net.pos_embed
        if added is not None:
            added = resampled_pos_embed(added, grid, self.grid, self.num_prefix_positions)
        return Positions(added, self.rotary(grid))

    def sincos_at(self, grid: tuple[int, int], position_grid: tuple[int, int] | None = None) -> Tensor:
        """The sin-cos table for a grid in the layout of `pos_embed`, (1, P or 0 + N, D), on its device.

        It counts in patches of `position_grid`; None is the encoder's own grid.
        """
        own = self.net.pos_embed
        table = sincos_on(own.device, grid, position_grid or self.grid, own.shape[-1]).to(own.dtype)
        return torch.cat([own.detach()[:, : self.num_prefix_positions], table[None]], dim=1)

    @abstractmethod
    def rotary(self, grid: tuple[int, int]) -> Tensor | None:
        """Rotary positions at the patch centres of a grid, (N, R); None for a network without."""

    def block_inputs(self, rotary: Tensor | None, ids_keep: Tensor | None) -> tuple[Tensor, ...]:
        """What blocks read beside the tokens: for rotary positions those of the visible patches."""
        if rotary is None:
            return ()
        # The axis of the heads.
        return (rotary if ids_keep is None else rotary[ids_keep][:, None],)

    def encode(
        self,
        images: Tensor,
        ids_keep: Tensor | None,
        *,
        added: Tensor | None,
        run: RunBlock,
        block_outputs: list[Tensor] | None,
    ) -> Tensor:
        """See `etpp_ssl.model.encoders.encode_visible`; `added` takes the place of `positions().added`."""
        net = self.net
        tokens = self.embed(images, ids_keep)
        grid = grid_of((images.shape[-2], images.shape[-1]), self.patch_size)
        rotary = self.rotary(grid) if added is not None else None
        if added is None:
            added, rotary = self.positions(grid)
        prefix = self.num_prefix_positions
        if added is not None:
            tokens = tokens + (added[:, prefix:] if ids_keep is None else added[0, prefix:][ids_keep])
        if net.num_prefix_tokens:
            special = [t for t in (net.cls_token, net.reg_token) if t is not None]
            prefix_tokens = torch.cat(special, dim=1)
            if prefix and added is not None:
                prefix_tokens = prefix_tokens + added[:, :prefix]
            tokens = torch.cat([prefix_tokens.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
        tokens = net.norm_pre(tokens)
        inputs = self.block_inputs(rotary, ids_keep)
        for block in net.blocks:
            if block_outputs is not None:
                block_outputs.append(tokens)
            tokens = run(block, tokens, *inputs)
        if block_outputs is not None:
            block_outputs.append(tokens)
        normed: Tensor = net.norm(tokens)
        return normed

    def pool(self, tokens: Tensor, how: Literal["token", "avg"] | None = None) -> Tensor:
        """One vector per image of the tokens, (B, P + N, D) to (B, D); None is the network's own pooling."""
        if how is None or how == self.net.global_pool:
            own: Tensor = self.net.forward_head(tokens, pre_logits=True)
            return own
        other: Tensor = self.net.pool(tokens, pool_type=how)
        return other
