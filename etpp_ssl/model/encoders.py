"""The encoder: an unmodified timm VisionTransformer, which pre-training runs on visible patches at any grid.

Features and exports use timm's own forward. `encode_visible` is its fast equivalent for pre-training: it
gathers the visible patches before the patch projection. The test compares the two.

Legend: B batch, C channels, H, W pixels, N patches or tokens, K visible patches, P prefix tokens, D width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import Config, UserError, as_pair, legal_size, show_size
from etpp_ssl.messages import close_names, shown
from etpp_ssl.model.attention import PLAIN, BlockRunner
from etpp_ssl.model.patches import gather_patches, grid_of
from etpp_ssl.model.pos_embed import resampled_pos_embed, sincos_on, sincos_pos_embed
from etpp_ssl.randomness import ShapesOnly

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

EXPLICIT_NAME = "vit"
EXPLICIT_ARCHITECTURE = "vit_base_patch16_224"
"""timm's name for a ViT of explicit dimensions, which its arguments give."""
VIT_DIMS = (
    *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"),
    *("class_token", "class_tokens", "reg_tokens"),
)
MAX_PATCHES = 1 << 18
"""512 x 512; attention needs memory for the square of their number."""


class EncoderConfig(Config):
    """A Vision Transformer by timm name or by explicit dimensions."""

    name: str = "vit_base_patch16_224"
    """A timm model, or `vit` with explicit dimensions."""
    patch_size: int | tuple[int, int] | None = None
    """Pixels; None is the named model's own."""
    embed_dim: int | None = Field(default=None, ge=4, le=1 << 14)
    """Width of the tokens; for `vit`, or in place of the named model's own."""
    depth: int | None = Field(default=None, ge=1, le=1000)
    """Number of blocks; for `vit`, or in place of the named model's own."""
    num_heads: int | None = Field(default=None, ge=1)
    """Heads per block, a divisor of `embed_dim`; for `vit`, or in place of the named model's own."""
    mlp_ratio: float | None = Field(default=None, gt=0, le=100)
    """Width of a block's MLP over `embed_dim`; None is the named model's own, for `vit` 4."""
    class_token: bool | None = None
    """Whether there is a cls token; None is the named model's own, for `vit` true."""
    class_tokens: int | None = Field(default=None, ge=1, le=1024)
    """Number of class tokens, each with a position of its own; `token` pooling takes their mean (Pixio has
    8). None is the named model's one or none. In timm's tensors all but the first are registers."""
    reg_tokens: int | None = Field(default=None, ge=0, le=1024)
    """Number of register tokens; None is the named model's own, for `vit` 0."""

    @field_validator("patch_size")
    @classmethod
    def _legal_patch(cls, size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        return None if size is None else legal_size(size)

    def given_dims(self) -> dict[str, Any]:
        """The dimensions that are given, by key; `patch_size` as (p, q)."""
        given = {key: getattr(self, key) for key in VIT_DIMS if getattr(self, key) is not None}
        return given | ({"patch_size": as_pair(given["patch_size"])} if "patch_size" in given else {})


def unused_weights(name: str, init: str | None) -> list[str]:
    """A warning where a model's name asks for pre-trained weights (timm's tag) and a run loads none."""
    if init is not None or "." not in name:
        return []
    return [
        f"warning: model.name {name} names pre-trained weights, but without init none are loaded: the model "
        f"starts from random values; download them and give init=FILE, or leave the part after the dot out"
    ]


def encoder_args(
    *,
    name: str,
    image_size: tuple[int, int],
    patch_size: tuple[int, int] | None,
    in_chans: int,
    dims: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    """timm's architecture name and the keyword arguments that build the encoder.

    Exports write them, too, so that timm rebuilds the same network: no classifier, the final norm on every
    token (MAE's decoder reads all of them), cls token or average pooling.

    Args:
        name: a timm VisionTransformer, or "vit" with all of `dims` given.
        image_size: (H, W) in pixels at full resolution.
        patch_size: (p, q) in pixels, or None for the named model's own.
        in_chans: C.
        dims: overrides, by the keys of `VIT_DIMS`; None values are the named model's own.

    Raises:
        UserError: for a name that timm does not know or that is not a plain VisionTransformer, missing
            dims, or a patch that does not divide the image.
    """
    architecture = EXPLICIT_ARCHITECTURE if name == EXPLICIT_NAME else name
    given = {key: value for key, value in dims.items() if value is not None}
    if name == EXPLICIT_NAME:
        missing = [key for key in ("embed_dim", "depth", "num_heads") if key not in given]
        if missing or patch_size is None:
            keys = ", ".join(f"model.{key}" for key in [*missing, *(["patch_size"] * (not patch_size))])
            raise UserError(f"model.name is vit (explicit dimensions): {keys} must be given")
    probe = _named_model(architecture)
    if "class_tokens" in given:
        from etpp_ssl.model.class_tokens import with_class_tokens

        given = with_class_tokens(given, probe, name)
    patch = patch_size or as_pair(tuple(probe.patch_embed.patch_size))
    for axis, word in ((0, "height"), (1, "width")):
        if image_size[axis] % patch[axis]:
            raise UserError(
                f"model.patch_size {show_size(patch)} does not divide the image {word} "
                f"{image_size[axis]} (image_size {show_size(image_size)})"
            )
    num_patches = image_size[0] // patch[0] * (image_size[1] // patch[1])
    if num_patches > MAX_PATCHES:
        raise UserError(
            f"model.patch_size {show_size(patch)} cuts image_size {show_size(image_size)} into "
            f"{num_patches:,} patches, more than the {MAX_PATCHES:,} that any device holds"
        )
    embed_dim = given.get("embed_dim", probe.embed_dim)
    num_heads = given.get("num_heads", attention_heads(probe))
    if embed_dim % num_heads:
        raise UserError(f"model.num_heads {num_heads} does not divide model.embed_dim {embed_dim}")
    class_token = given.get("class_token", probe.has_class_token)
    args: dict[str, Any] = {
        **given,
        "img_size": list(image_size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": given.get("depth", len(probe.blocks)),
        "num_heads": num_heads,
        "class_token": class_token,
        "reg_tokens": given.get("reg_tokens", probe.num_reg_tokens),
        "num_classes": 0,
        "global_pool": "token" if class_token else "avg",
        # Otherwise timm moves the norm after the average pooling, away from the tokens.
        "fc_norm": False,
    }
    return architecture, args


def build_encoder(
    architecture: str,
    args: dict[str, Any],
    *,
    pos_embed: str = "sincos",
    position_grid: tuple[int, int] | None = None,
) -> VisionTransformer:
    """The timm encoder, initialised as MAE's (xavier-uniform linears, tokens normal(0.02)).

    Args:
        architecture, args: from `encoder_args`.
        pos_embed: "sincos", fixed at MAE's table, or "learned".
        position_grid: patches per axis in whose units the table counts; None is the encoder's own grid.
    """
    import timm

    encoder: VisionTransformer = timm.create_model(architecture, pretrained=False, **args)
    encoder.apply(init_linear)
    projection = encoder.patch_embed.proj
    # MAE initialises the projection as a linear layer.
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if encoder.pos_embed is None:
        raise UserError(f"model.name {architecture} has no absolute position embedding to train with")
    if pos_embed == "sincos":
        if encoder.embed_dim % 4:
            raise UserError(f"model.embed_dim {encoder.embed_dim} is not a multiple of 4 (sin-cos positions)")
        grid = tuple(encoder.patch_embed.grid_size)
        table = sincos_pos_embed(grid, position_grid or grid, encoder.embed_dim)
        prefix = num_prefix_positions(encoder)
        with torch.no_grad():
            encoder.pos_embed.zero_()
            encoder.pos_embed[0, prefix:].copy_(table)
        encoder.pos_embed.requires_grad_(False)
    else:
        nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
    return encoder


def init_linear(module: nn.Module) -> None:
    """MAE's initialisation of a linear layer: xavier-uniform weight, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def num_prefix_positions(encoder: VisionTransformer) -> int:
    """Rows of timm's `pos_embed` that belong to prefix tokens."""
    return 0 if encoder.no_embed_class else int(encoder.num_prefix_tokens)


def fixed_positions_at(
    encoder: VisionTransformer, grid: tuple[int, int], position_grid: tuple[int, int] | None = None
) -> Tensor:
    """The sin-cos table for a grid in the layout of `pos_embed`, (1, P or 0 + N, D), on its device.

    It counts in patches of `position_grid`; None is the encoder's own grid.
    """
    base = position_grid or tuple(encoder.patch_embed.grid_size)
    table = sincos_on(encoder.pos_embed.device, grid, base, encoder.embed_dim).to(encoder.pos_embed.dtype)
    prefix = num_prefix_positions(encoder)
    return torch.cat([encoder.pos_embed.detach()[:, :prefix], table[None]], dim=1)


def encode_visible(
    encoder: VisionTransformer,
    images: Tensor,
    ids_keep: Tensor,
    *,
    positions: Tensor | None = None,
    run: BlockRunner = PLAIN,
    block_outputs: list[Tensor] | None = None,
) -> Tensor:
    """Encode the visible patches only: the tokens that a ViT gives when it sees nothing else.

    Args:
        encoder: a plain timm VisionTransformer.
        images: float (B, C, h p, w q), at any bandwidth.
        ids_keep: int64 (B, K), visible patches of the h x w grid.
        positions: (1, P or 0 + N, D) for this grid, in the layout of `pos_embed`; None resamples
            `pos_embed` itself.
        run: how blocks are run.
        block_outputs: a list that receives the tokens in front of the first block and after each one,
            depth + 1 tensors (B, P + K, D), all before the final norm.

    Returns:
        (B, P + K, D), after the final norm; prefix tokens first, patches in the order of `ids_keep`.
    """
    projection = encoder.patch_embed.proj
    patch: tuple[int, int] = tuple(encoder.patch_embed.patch_size)
    grid = grid_of((images.shape[-2], images.shape[-1]), patch)
    patches_BNV = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch[0], q=patch[1])
    visible_BKV = gather_patches(patches_BNV, ids_keep)
    tokens = F.linear(visible_BKV, projection.weight.flatten(1), projection.bias)
    tokens = encoder.patch_embed.norm(tokens)

    prefix = num_prefix_positions(encoder)
    if positions is None:
        base: tuple[int, int] = tuple(encoder.patch_embed.grid_size)
        positions = resampled_pos_embed(encoder.pos_embed, grid, base, prefix)
    tokens = tokens + positions[0, prefix:][ids_keep]
    if encoder.num_prefix_tokens:
        special = [t for t in (encoder.cls_token, encoder.reg_token) if t is not None]
        prefix_tokens = torch.cat(special, dim=1)
        if prefix:
            prefix_tokens = prefix_tokens + positions[:, :prefix]
        tokens = torch.cat([prefix_tokens.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
    tokens = encoder.norm_pre(tokens)
    for block in encoder.blocks:
        if block_outputs is not None:
            block_outputs.append(tokens)
        tokens = run(block, tokens)
    if block_outputs is not None:
        block_outputs.append(tokens)
    normed: Tensor = encoder.norm(tokens)
    return normed


def attention_heads(encoder: VisionTransformer) -> int:
    """Heads of each attention layer."""
    # Parallel blocks keep it elsewhere than in `attn`.
    return next(int(m.num_heads) for m in encoder.blocks.modules() if hasattr(m, "num_heads"))


@lru_cache(maxsize=8)
def _named_model(name: str) -> VisionTransformer:
    """The named timm model on the meta device, if it is one that can be masked."""
    import timm

    base = name.split(".")[0]
    found = _plain_vit(name) if timm.is_model(base) else "is not a timm model"
    if isinstance(found, str):
        hint = close_names(
            base,
            timm.list_models("*vit*"),
            lambda other: not isinstance(_plain_vit(other), str),
            otherwise="vit_small_patch16_224, vit_base_patch16_224",
        )
        raise UserError(f"model.name {shown(name)} {found}{hint}")
    return found


def _plain_vit(name: str) -> VisionTransformer | str:
    """timm's model on the meta device, or why it cannot be masked."""
    import timm
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    try:
        with ShapesOnly():
            model = timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"cannot be built: {error}"
    if type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed:
        return model
    kind = type(model).__name__
    if type(model) is VisionTransformer:
        kind += f" on a {type(model.patch_embed).__name__}"
    return f"is a {kind}, not a plain Vision Transformer"
