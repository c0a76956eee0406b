"""MAE's decoder, asked for the masked patches only.

The original puts mask tokens where patches were removed, restores the order and predicts every patch.
Attention does not see the order and the loss does not see visible patches, so ours appends the mask
tokens and runs the final norm and projection on them alone: the same numbers for less work.

Legend: B batch, K visible, M predicted, P prefix tokens, D encoder width, E decoder width, V values.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from etpp_ssl.config import Config, UserError
from etpp_ssl.model.blocks import BlockRunner
from etpp_ssl.model.pos_embed import SincosTables
from etpp_ssl.model.vit import init_linear


class MAEDecoderConfig(Config):
    """A small ViT over all tokens (MAE, section 3; the defaults are its ImageNet setting)."""

    name: Literal["mae"] = "mae"
    embed_dim: int = Field(default=512, ge=4, le=1 << 14)
    depth: int = Field(default=8, ge=1, le=1000)
    num_heads: int = Field(default=16, ge=1)

    @property
    def predict_ratio(self) -> float | None:
        """Every masked patch is predicted: the mask tokens attend to each other."""
        return None

    @property
    def reads_blocks(self) -> bool:
        """It reads the encoder's output after the final norm."""
        return False

    def build(
        self,
        *,
        encoder_dim: int,
        encoder_depth: int,
        num_prefix: int,
        base_grid: tuple[int, int],
        num_values: int,
    ) -> MAEDecoder:
        """The decoder for an encoder of width D, P prefix tokens and V values per patch.

        `encoder_depth` serves decoders that read every encoder block; this one does not.

        Raises:
            UserError: for a width that its heads or the sin-cos positions do not divide.
        """
        check_width(self.embed_dim, self.num_heads)
        return MAEDecoder(self, encoder_dim, num_prefix, base_grid, num_values)


class MAEDecoder(nn.Module):
    """Predict the masked patches from the visible ones.

    Args:
        config: width, depth and heads.
        encoder_dim: D.
        num_prefix: P, prefix tokens in front of the encoder's output; they carry no position.
        base_grid: patches per axis at full resolution.
        num_values: V, numbers to predict per patch.
    """

    reads_blocks = False

    def __init__(
        self,
        config: MAEDecoderConfig,
        encoder_dim: int,
        num_prefix: int,
        base_grid: tuple[int, int],
        num_values: int,
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.run = BlockRunner()
        width = config.embed_dim
        self.embed = nn.Linear(encoder_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(
                dim=width,
                num_heads=config.num_heads,
                qkv_bias=True,
                norm_layer=layer_norm,
            )
            for _ in range(config.depth)
        )
        self.norm = layer_norm(width)
        self.head = nn.Linear(width, num_values)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)
        self._positions = SincosTables(base_grid, width)

    def forward(self, tokens: Tensor, ids_keep: Tensor, ids_predict: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predict.

        Mask tokens attend to each other, so MAE's predictions are those of all masked patches together;
        asked for a subset, the others' mask tokens are not there.

        Args:
            tokens: (B, P + K, D) from the encoder, after its final norm.
            ids_keep: int64 (B, K).
            ids_predict: int64 (B, M).
            grid: patches per axis now, at any bandwidth.

        Returns:
            (B, M, V), in the order of `ids_predict`.
        """
        num_masked = ids_predict.shape[1]
        position_NE = self._positions.at(grid, tokens.device).to(self.mask_token.dtype)
        tokens = self.embed(tokens)
        visible = tokens[:, self.num_prefix :] + position_NE[ids_keep]
        masked = self.mask_token + position_NE[ids_predict]
        tokens = torch.cat([tokens[:, : self.num_prefix], visible, masked.to(visible.dtype)], dim=1)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        prediction: Tensor = self.head(self.norm(tokens[:, tokens.shape[1] - num_masked :]))
        return prediction


def check_width(embed_dim: int, num_heads: int) -> None:
    """Raise a UserError for a decoder width that its heads or the sin-cos positions do not divide."""
    if embed_dim % num_heads:
        raise UserError(
            f"model.decoder.num_heads {num_heads} does not divide model.decoder.embed_dim {embed_dim}"
        )
    if embed_dim % 4:
        raise UserError(f"model.decoder.embed_dim {embed_dim} is no multiple of 4 (sin-cos positions)")


def layer_norm(width: int, **kwargs: object) -> nn.LayerNorm:
    """MAE's LayerNorm, eps 1e-6."""
    return nn.LayerNorm(width, eps=1e-6, **kwargs)  # type: ignore[arg-type]
