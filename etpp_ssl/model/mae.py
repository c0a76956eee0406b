"""The masked autoencoder: visible patches in, predictions of masked ones out.

Legend: B batch, C channels, H, W pixels, N patches, K visible, M predicted, D width, V values per patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from etpp_ssl.config import UserError, as_pair, legal_size, may_change
from etpp_ssl.model.attention import MAX_COMPILED_SHAPES, AttentionName, BlockRunner
from etpp_ssl.model.decoders import CrossDecoderConfig, Decoder, MAEDecoderConfig
from etpp_ssl.model.encoders import (
    EncoderConfig,
    build_encoder,
    encode_visible,
    encoder_args,
    encoder_of,
)
from etpp_ssl.model.mask_patterns import (
    AlignedMaskingConfig,
    BlockMaskingConfig,
    GridMaskingConfig,
    UniformMaskingConfig,
)
from etpp_ssl.model.masking import Masker, MaskRatioRamp, num_visible, removed_ids
from etpp_ssl.model.patches import grid_of

# One line here makes a new decoder or mask pattern known to recipes.
AnyDecoder = MAEDecoderConfig | CrossDecoderConfig
AnyMasking = UniformMaskingConfig | BlockMaskingConfig | AlignedMaskingConfig | GridMaskingConfig


def _ratio_kind(value: Any) -> str:
    return MaskRatioRamp.__name__ if isinstance(value, dict | MaskRatioRamp) else "float"


class Prediction(NamedTuple):
    """What the model predicts for a batch."""

    values_BMV: Tensor
    """(B, M, V): the target's values for each predicted patch."""
    ids_predicted: Tensor
    """int64 (B, M): which patches of the grid these are."""


class ModelConfig(EncoderConfig):
    """Encoder by timm name or by explicit dimensions, masking, and decoder."""

    name: str = "vit_base_patch16_224"
    """A timm VisionTransformer or Eva, or `vit` with `patch_size`, `embed_dim`, `depth` and `num_heads`."""
    pos_embed: Literal["sincos", "learned"] = "sincos"
    """`sincos`: MAE's fixed table. `learned`: a parameter, initialised at random. An encoder whose only
    positions are rotary, such as DINOv3's, has neither."""
    position_grid: tuple[int, int] | None = None
    """Patches per axis in whose units sin-cos positions are counted; None is the model's own grid. With
    `init` from another resolution, the grid of those weights keeps every place where they know it."""
    mask_ratio: Annotated[
        Annotated[float, Field(gt=0, lt=1), Tag("float")]
        | Annotated[MaskRatioRamp, Tag(MaskRatioRamp.__name__)],
        Discriminator(_ratio_kind),
    ] = 0.75
    """Share of the patches that is removed: a number, or `{start: ..., end: ...}`, linear over compute."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Rate of the encoder's last block in pre-training; from block to block it grows linearly from 0."""
    masking: Annotated[AnyMasking, Field(discriminator="name")] = UniformMaskingConfig()
    """Which patches are removed: `uniform`, `block`, `aligned` or `grid`."""
    grad_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, about a third more compute."""
    attention: AttentionName = may_change("auto")
    """Kernel of the self-attention in pre-training: `fused` (torch's), `unfused` (plain products), or
    `auto`, what measured faster on the device; they differ by rounding."""
    compiled: bool = may_change(False)
    """Run the blocks through `torch.compile`: a compilation for each stage, and for each number of visible
    patches where the mask ratio changes; at most 32 in a run."""
    decoder: Annotated[AnyDecoder, Field(discriminator="name")] = MAEDecoderConfig()
    """What predicts the removed patches: `mae` or `cross`."""

    @field_validator("position_grid")
    @classmethod
    def _legal_grid(cls, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if grid is None else as_pair(legal_size(grid))

    @model_validator(mode="after")
    def _keyed_draws(self) -> ModelConfig:
        if self.compiled and self.drop_path:
            raise ValueError(
                f"drop_path is {self.drop_path:g} and compiled is true; its draws are keyed by sample, which "
                f"compiled blocks cannot be: use compiled=false or drop_path=0"
            )
        return self

    @field_validator("decoder", "masking", mode="before")
    @classmethod
    def _default_name(cls, value: Any, info: ValidationInfo) -> Any:
        """The default's name where settings are given without one."""
        if isinstance(value, dict) and "name" not in value:
            return {"name": cls.model_fields[info.field_name or ""].default.name, **value}
        return value

    @property
    def final_mask_ratio(self) -> float:
        """The mask ratio at the end of the run."""
        return self.mask_ratio.end if isinstance(self.mask_ratio, MaskRatioRamp) else self.mask_ratio

    def masker(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        seed: int,
        min_valid: float = 0.0,
    ) -> Masker:
        """The masks of a run."""
        return Masker(
            self.masking,
            self.mask_ratio,
            self.decoder.predict_ratio,
            patch_size,
            seed,
            min_valid,
            base_grid=grid_of(image_size, patch_size),
        )

    def check_compiled(
        self, masker: Masker, stages: Iterable[tuple[tuple[int, int], tuple[float, float]]]
    ) -> None:
        """See that `compiled` blocks need a bounded number of compilations.

        Args:
            masker: the masks of the run.
            stages: bandwidth (H, W) in pixels, and progress at its start and end, of each stage.

        Raises:
            UserError: for too many of them.
        """
        if not self.compiled:
            return
        shapes: set[tuple[int, int]] = set()
        for bandwidth, span in stages:
            counts = [masker.counts(bandwidth, progress) for progress in span]
            first, last = sorted(count.num_keep for count in counts)
            shapes.update((counts[0].num_patches, keep) for keep in range(first, last + 1))
        if len(shapes) > MAX_COMPILED_SHAPES:
            raise UserError(
                f"model.compiled is true, and the blocks would be compiled anew for {len(shapes)} numbers of "
                f"visible patches, more than {MAX_COMPILED_SHAPES}; use model.compiled=false, or one "
                f"model.mask_ratio in place of a start and an end"
            )

    def encoder_args(self, image_size: tuple[int, int], in_chans: int) -> tuple[str, dict[str, Any]]:
        """timm's name and arguments of the encoder; see `etpp_ssl.model.encoders.encoder_args`."""
        dims = self.given_dims()
        patch = dims.pop("patch_size", None)
        return encoder_args(
            name=self.name, image_size=image_size, patch_size=patch, in_chans=in_chans, dims=dims
        )

    def resolved_patch(self, image_size: tuple[int, int], in_chans: int) -> tuple[int, int]:
        """(p, q) in pixels, whether given or the named model's own."""
        patch = self.encoder_args(image_size, in_chans)[1]["patch_size"]
        return as_pair(patch if isinstance(patch, int) else tuple(patch))

    def build(
        self, *, image_size: tuple[int, int], in_chans: int, num_values: int, seed: int = 0
    ) -> MaskedAutoencoder:
        """The model, freshly initialised from torch's global generator.

        Args:
            image_size: (H, W) at full resolution.
            in_chans: C.
            num_values: V, numbers that the target asks for per patch.
            seed: the run's seed, for the drop-path draws alone.
        """
        from etpp_ssl.model.class_tokens import pool_class_tokens

        architecture, args = self.encoder_args(image_size, in_chans)
        if self.drop_path:
            args = {**args, "drop_path_rate": self.drop_path}
        encoder = build_encoder(
            architecture, args, pos_embed=self.pos_embed, position_grid=self.position_grid
        )
        pool_class_tokens(encoder, self.class_tokens)
        return self.around(encoder, num_values, seed)

    def around(self, encoder: Any, num_values: int, seed: int = 0) -> MaskedAutoencoder:
        """The model around an encoder of its own, for V values per patch, with a new decoder; see `build`."""
        from etpp_ssl.model.timm_net import use_attention

        position_grid = self.position_grid or encoder_of(encoder).grid
        decoder = self.decoder.build(
            encoder_dim=encoder.embed_dim,
            encoder_depth=len(encoder.blocks),
            num_prefix=encoder.num_prefix_tokens,
            base_grid=position_grid,
            num_values=num_values,
        )
        model = MaskedAutoencoder(
            encoder,
            decoder,
            mask_ratio=self.final_mask_ratio,
            fixed_positions=self.pos_embed == "sincos",
            position_grid=position_grid,
            seed=seed,
        )
        use_attention(model, self.attention)
        model.run_blocks_by(BlockRunner(self.grad_checkpointing, self.compiled))
        return model


class MaskedAutoencoder(nn.Module):
    """MAE (He et al., CVPR 2022) around a timm encoder, at any bandwidth with one set of parameters.

    Args:
        encoder: a timm network at full resolution that `etpp_ssl.model.encoders.maskable` accepts.
        decoder: predicts masked patches from the encoder's tokens. One that reads the encoder's blocks
            leaves the encoder's final norm without a gradient, so that norm is frozen here.
        mask_ratio: share of the patches to remove where `forward` has to draw the mask itself.
        fixed_positions: evaluate sin-cos positions at the patch centres of other grids, instead of
            resampling the encoder's `pos_embed`.
        position_grid: patches per axis in whose units they count; None is the encoder's own grid.
        seed: the run's seed, for the draws of the encoder's drop-path.
    """

    def __init__(
        self,
        encoder: Any,
        decoder: Decoder,
        mask_ratio: float = 0.75,
        *,
        fixed_positions: bool = True,
        position_grid: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        from etpp_ssl.model.timm_net import key_drop_path

        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.fixed_positions = fixed_positions and encoder.pos_embed is not None
        self.position_grid = position_grid or encoder_of(encoder).grid
        self.run = BlockRunner()
        self.drop_path_keys = key_drop_path(encoder, seed)
        if decoder.reads_blocks:
            encoder.norm.requires_grad_(False)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(p, q) in pixels."""
        return encoder_of(self.encoder).patch_size

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """The blocks of encoder and decoder, nearly all of the parameters."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def run_blocks_by(self, run: BlockRunner) -> None:
        """Choose how the blocks of encoder and decoder are run."""
        self.run = run
        self.decoder.run = run

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass (timm's name for the switch)."""
        self.run_blocks_by(replace(self.run, grad_checkpointing=enable))

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        ids_predict: Tensor | None = None,
        sample_ids_B: Tensor | None = None,
    ) -> Prediction:
        """Predict masked patches.

        Args:
            images: float (B, C, h p, w q): a whole number of patches, at any bandwidth.
            ids_keep: int64 (B, K), the visible patches; given, the result is deterministic. None
                draws them uniformly from torch's global generator, at `mask_ratio`.
            ids_predict: int64 (B, M), the patches to predict; None predicts every masked one, in
                ascending order.
            sample_ids_B: int64 (B,), the samples' numbers in the run; needed in training with drop-path.

        Raises:
            UserError: in training with drop-path, without sample numbers.
        """
        self.drop_path_keys.set_sample_ids(sample_ids_B)
        grid = grid_of((images.shape[-2], images.shape[-1]), self.patch_size)
        num_patches = grid[0] * grid[1]
        if ids_keep is None:
            noise_BN = torch.rand(len(images), num_patches, device=images.device)
            num_keep = num_visible(num_patches, self.mask_ratio)
            ids_keep = noise_BN.argsort(dim=1)[:, :num_keep].sort(dim=1).values
        if ids_predict is None:
            ids_predict = removed_ids(ids_keep, num_patches)
        positions = None
        encoder = encoder_of(self.encoder)
        if self.fixed_positions and grid != encoder.grid:
            positions = encoder.sincos_at(grid, self.position_grid)
        block_outputs: list[Tensor] = []
        tokens = encode_visible(
            self.encoder,
            images,
            ids_keep,
            positions=positions,
            run=self.run,
            block_outputs=block_outputs if self.decoder.reads_blocks else None,
        )
        values = self.decoder(block_outputs or tokens, ids_keep, ids_predict, grid)
        if self.run.grad_checkpointing:
            self.drop_path_keys.keep_for_backward(values, sample_ids_B)
        return Prediction(values, ids_predict)
