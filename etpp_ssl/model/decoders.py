"""Decoders: MAE's small ViT over all tokens, and CrossMAE's, whose mask tokens read the encoder only.

Both predict the masked patches alone. The original MAE puts mask tokens where patches were removed, restores
the order and predicts every patch. Attention does not depend on the order and the loss ignores visible
patches, so `MAEDecoder` appends the mask tokens and runs the last norm and projection on them only: the same
numbers for less work.

In `CrossDecoder` a block is cross-attention and an MLP, without self-attention. The prediction of a patch
then depends on the encoder's tokens and the patch's position only, so any subset of the masked patches can be
predicted at a proportional cost (Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv
2401.14391, section 3).

Legend: B batch, K visible, M predicted, P prefix tokens, T = P + K encoder tokens (prefix tokens, then
visible patches), L encoder blocks, F decoder blocks, D encoder width, E decoder width, V values.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from etpp_ssl.config import Config, UserError
from etpp_ssl.model.attention import BlockRunner, CrossAttention
from etpp_ssl.model.encoders import init_linear
from etpp_ssl.model.pos_embed import resampled_pos_embed, sincos_on

MLP_RATIO = 4
"""Of CrossMAE's blocks."""


class Decoder(nn.Module):
    """What the decoders have in common: mask tokens with positions, the last norm and the projection.

    Args:
        config: width, depth and heads.
        encoder_dim: D.
        encoder_depth: L.
        num_prefix: P, prefix tokens in front of the encoder's output.
        base_grid: patches per axis at full resolution.
        num_values: V, numbers to predict per patch.
    """

    blocks: nn.ModuleList
    reads_blocks = False
    """Whether `forward` takes the encoder's block outputs instead of its final output."""
    places_prefix = False
    """Whether learned positions have rows for the prefix tokens."""

    def __init__(
        self,
        config: DecoderKeys,
        encoder_dim: int,
        encoder_depth: int,
        num_prefix: int,
        base_grid: tuple[int, int],
        num_values: int,
    ) -> None:
        super().__init__()
        self.run = BlockRunner()
        self.num_prefix, self.base_grid = num_prefix, base_grid
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed: nn.Parameter | None = None
        self.num_placed = num_prefix if self.places_prefix else 0
        if config.pos_embed == "learned":
            num_positions = self.num_placed + base_grid[0] * base_grid[1]
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, config.embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.add_blocks(config, encoder_dim, encoder_depth)
        self.norm = layer_norm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, num_values)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def add_blocks(self, config: Any, encoder_dim: int, encoder_depth: int) -> None:
        """Give it `blocks` and what stands in front of them."""
        raise NotImplementedError

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The positions on a grid of (h, w) patches, (N, E), of the parameters' type."""
        if self.pos_embed is not None:
            return resampled_pos_embed(self.pos_embed, grid, self.base_grid, self.num_placed)[
                0, self.num_placed :
            ]
        width, device = self.mask_token.shape[-1], self.mask_token.device
        return sincos_on(device, grid, self.base_grid, width).to(self.mask_token.dtype)


class MAEDecoder(Decoder):
    """Predict the masked patches from the visible ones. Prefix tokens carry learned positions only."""

    places_prefix = True

    def add_blocks(self, config: MAEDecoderConfig, encoder_dim: int, encoder_depth: int) -> None:
        """A small ViT's blocks behind a projection of the encoder's output."""
        from timm.models.vision_transformer import Block

        self.embed = nn.Linear(encoder_dim, config.embed_dim)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, qkv_bias=True, norm_layer=layer_norm)
            for _ in range(config.depth)
        )

    def forward(self, tokens: Tensor, ids_keep: Tensor, ids_predict: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict.

        Mask tokens attend to each other, so MAE's own predictions need all masked patches in `ids_predict`;
        for a subset, the other mask tokens are absent.

        Args:
            tokens: (B, P + K, D) from the encoder, after its final norm.
            ids_keep: int64 (B, K).
            ids_predict: int64 (B, M).
            grid: patches per axis now, at any bandwidth.

        Returns:
            (B, M, V), in the order of `ids_predict`.
        """
        num_masked = ids_predict.shape[1]
        position_NE = self.positions(grid)
        tokens = self.embed(tokens)
        visible = tokens[:, self.num_prefix :] + position_NE[ids_keep]
        masked = self.mask_token + position_NE[ids_predict]
        prefix = tokens[:, : self.num_prefix]
        if self.pos_embed is not None:
            prefix = prefix + self.pos_embed[:, : self.num_prefix]
        tokens = torch.cat([prefix, visible, masked.to(visible.dtype)], dim=1)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        prediction: Tensor = self.head(self.norm(tokens[:, tokens.shape[1] - num_masked :]))
        return prediction


class CrossDecoder(Decoder):
    """Predict patches from the encoder's tokens, each patch on its own.

    Keys and values get no position here: the encoder's tokens carry theirs.
    """

    def add_blocks(self, config: CrossDecoderConfig, encoder_dim: int, encoder_depth: int) -> None:
        """Blocks of cross-attention, and what each of them reads."""
        self.reads_blocks = config.reads_blocks
        self.mixture = BlockMixture(encoder_dim, encoder_depth, config.depth) if self.reads_blocks else None
        self.blocks = nn.ModuleList(
            CrossBlock(config.embed_dim, encoder_dim, config.num_heads) for _ in range(config.depth)
        )

    def forward(
        self,
        tokens: Tensor | list[Tensor],
        ids_keep: Tensor,
        ids_predict: Tensor,
        grid: tuple[int, int],
    ) -> Tensor:
        """Predict.

        Args:
            tokens: (B, T, D), the encoder's output; for a decoder that reads its blocks the L + 1 tensors
                (B, T, D) of `encode_visible(block_outputs=...)`.
            ids_keep: int64 (B, K); the prediction does not depend on it beyond `tokens`.
            ids_predict: int64 (B, M), any patches of the grid.
            grid: patches per axis now, at any bandwidth.

        Returns:
            (B, M, V), in the order of `ids_predict`.
        """
        if isinstance(tokens, Tensor):
            assert self.mixture is None, "this decoder reads the encoder's blocks"
            memories = [tokens] * len(self.blocks)
        else:
            assert self.mixture is not None, "this decoder reads the encoder's output"
            memories = self.mixture(tokens)
        queries = self.mask_token + self.positions(grid)[ids_predict]
        for block, memory in zip(self.blocks, memories, strict=True):
            queries = self.run(block, queries, memory)
        prediction: Tensor = self.head(self.norm(queries))
        return prediction


class BlockMixture(nn.Module):
    """What each decoder block reads: a learned weighted sum of all encoder blocks' outputs, normalised.

    The weights start as normal(0) with variance 1 / (L + 1), as CrossMAE's; they need not be positive or sum
    to 1.
    """

    def __init__(self, encoder_dim: int, encoder_depth: int, decoder_depth: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(decoder_depth, encoder_depth + 1))
        nn.init.normal_(self.weight, std=(encoder_depth + 1) ** -0.5)
        self.norms = nn.ModuleList(layer_norm(encoder_dim) for _ in range(decoder_depth))

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:
        """From L + 1 tensors (B, T, D) to F of them, one per decoder block."""
        # One product for all decoder blocks reads the encoder's outputs once, not F times.
        stacked = torch.stack(outputs).flatten(1)
        mixed_FBTD = (self.weight @ stacked).unflatten(1, outputs[0].shape)
        return [norm(mixed) for norm, mixed in zip(self.norms, mixed_FBTD, strict=True)]


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, width: int, encoder_dim: int, num_heads: int) -> None:
        from timm.layers import Mlp

        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = CrossAttention(width, encoder_dim, num_heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width, MLP_RATIO * width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, M, E) and (B, T, D) to (B, M, E)."""
        queries = queries + self.attn(self.norm1(queries), memory)
        result: Tensor = queries + self.mlp(self.norm2(queries))
        return result


def layer_norm(width: int, **kwargs: object) -> nn.LayerNorm:
    """MAE's LayerNorm, eps 1e-6."""
    return nn.LayerNorm(width, eps=1e-6, **kwargs)  # type: ignore[arg-type]


class DecoderKeys(Config):
    """The keys that all decoders have."""

    kind: ClassVar[type[Decoder]]
    """The module."""
    name: str
    embed_dim: int = Field(default=512, ge=4, le=1 << 14)
    """Width of the decoder's tokens, a multiple of 4."""
    depth: int = Field(default=8, ge=1, le=1000)
    """Number of blocks."""
    num_heads: int = Field(default=16, ge=1)
    """Heads per block, a divisor of `embed_dim`."""
    pos_embed: Literal["sincos", "learned"] = "sincos"
    """`sincos`: MAE's fixed table. `learned`: a parameter, initialised at random (Pixio)."""

    @property
    def reads_blocks(self) -> bool:
        """Whether it reads the encoder's blocks instead of its output after the final norm."""
        return False

    def build(
        self,
        *,
        encoder_dim: int,
        encoder_depth: int,
        num_prefix: int,
        base_grid: tuple[int, int],
        num_values: int,
    ) -> Decoder:
        """The decoder, freshly initialised; see `Decoder` for the arguments.

        Raises:
            UserError: for a width that its heads or the sin-cos positions do not divide.
        """
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"model.decoder.num_heads {self.num_heads} does not divide "
                f"model.decoder.embed_dim {self.embed_dim}"
            )
        if self.pos_embed == "sincos" and self.embed_dim % 4:
            raise UserError(
                f"model.decoder.embed_dim {self.embed_dim} is not a multiple of 4 (sin-cos positions)"
            )
        return self.kind(self, encoder_dim, encoder_depth, num_prefix, base_grid, num_values)


class MAEDecoderConfig(DecoderKeys):
    """A small ViT over all tokens (MAE, section 3; the defaults are its ImageNet setting)."""

    kind: ClassVar[type[Decoder]] = MAEDecoder
    name: Literal["mae"] = "mae"

    @property
    def predict_ratio(self) -> float | None:
        """Every masked patch is predicted: the mask tokens attend to each other."""
        return None


class CrossDecoderConfig(DecoderKeys):
    """Cross-attention from mask tokens to the encoder (CrossMAE; the defaults are its ImageNet setting)."""

    kind: ClassVar[type[Decoder]] = CrossDecoder
    name: Literal["cross"] = "cross"
    depth: int = Field(default=12, ge=1, le=1000)
    """Number of blocks."""
    reads: Literal["blocks", "output"] = "blocks"
    """`blocks`: every decoder block reads its own learned weighted sum of the encoder's patch embedding
    and block outputs, through its own LayerNorm; the encoder's final norm then has no part in training.
    `output`: all read the encoder's output after its final norm, as MAE's decoder does."""
    predict_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of ALL patches (not of the masked ones) that is predicted, a keyed random subset of the masked
    ones; at most the mask ratio. None predicts every masked patch."""

    @property
    def reads_blocks(self) -> bool:
        """Whether it reads the encoder's blocks instead of its output after the final norm."""
        return self.reads == "blocks"
