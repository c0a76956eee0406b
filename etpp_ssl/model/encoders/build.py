"""Encoders by name: the Config, timm's arguments, a fresh encoder, and which networks can be one.

Legend: B batch, C channels, H, W pixels, N patches or tokens, K visible patches, P prefix tokens, D width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from etpp_ssl.config import Config, UserError, as_pair, legal_size, show_size
from etpp_ssl.messages import close_names, shown
from etpp_ssl.model.attention import PLAIN, BlockRunner
from etpp_ssl.model.encoders.base import MaskableEncoder
from etpp_ssl.model.pos_embed import sincos_pos_embed
from etpp_ssl.randomness import ShapesOnly

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
        name: a timm VisionTransformer or Eva, or "vit" with all of `dims` given.
        image_size: (H, W) in pixels at full resolution.
        patch_size: (p, q) in pixels, or None for the named model's own.
        in_chans: C.
        dims: overrides, by the keys of `VIT_DIMS`; None values are the named model's own.

    Raises:
        UserError: for a name that timm does not know or whose network cannot be masked, missing dims, or a
            patch that does not divide the image.
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

        given = with_class_tokens(given, probe.net, name)
    patch = patch_size or probe.patch_size
    for axis, word in ((0, "height"), (1, "width")):
        if image_size[axis] % patch[axis]:
            less = image_size[axis] // patch[axis] * patch[axis]
            legal = [side for side in (less, less + patch[axis]) if side]
            raise UserError(
                f"model.patch_size {show_size(patch)} does not divide the image {word} "
                f"{image_size[axis]} (image_size {show_size(image_size)}); it divides "
                f"{' and '.join(map(str, legal))}"
            )
    num_patches = image_size[0] // patch[0] * (image_size[1] // patch[1])
    if num_patches > MAX_PATCHES:
        raise UserError(
            f"model.patch_size {show_size(patch)} cuts image_size {show_size(image_size)} into "
            f"{num_patches:,} patches, more than the {MAX_PATCHES:,} that any device holds"
        )
    embed_dim = given.get("embed_dim", probe.net.embed_dim)
    num_heads = given.get("num_heads", probe.num_heads)
    if embed_dim % num_heads:
        raise UserError(f"model.num_heads {num_heads} does not divide model.embed_dim {embed_dim}")
    class_token = given.get("class_token", probe.has_class_token)
    sizes: dict[str, Any] = {
        **given,
        "img_size": list(image_size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": given.get("depth", len(probe.net.blocks)),
        "num_heads": num_heads,
        "class_token": class_token,
        "reg_tokens": given.get("reg_tokens", probe.num_registers),
        "num_classes": 0,
        "global_pool": "token" if class_token else "avg",
    }
    args = {probe.other_names.get(key, key): value for key, value in sizes.items()}
    return architecture, {**args, **probe.fixed_args}


def build_encoder(
    architecture: str,
    args: dict[str, Any],
    *,
    pos_embed: str = "sincos",
    position_grid: tuple[int, int] | None = None,
) -> Any:
    """The timm encoder, initialised as MAE's (xavier-uniform linears, tokens normal(0.02)).

    Args:
        architecture, args: from `encoder_args`.
        pos_embed: "sincos", fixed at MAE's table, or "learned"; nothing to an encoder that adds no positions.
        position_grid: patches per axis in whose units the table counts; None is the encoder's own grid.
    """
    import timm

    net: Any = timm.create_model(architecture, pretrained=False, **args)
    encoder = maskable(net)
    if isinstance(encoder, str):
        raise UserError(f"model.name {architecture} {encoder}")
    net.apply(init_linear)
    projection = net.patch_embed.proj
    # MAE initialises the projection as a linear layer.
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    for token in (net.cls_token, net.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if net.pos_embed is None:
        return net
    if pos_embed == "sincos":
        if net.embed_dim % 4:
            raise UserError(f"model.embed_dim {net.embed_dim} is not a multiple of 4 (sin-cos positions)")
        table = sincos_pos_embed(encoder.grid, position_grid or encoder.grid, net.embed_dim)
        with torch.no_grad():
            net.pos_embed.zero_()
            net.pos_embed[0, encoder.num_prefix_positions :].copy_(table)
        net.pos_embed.requires_grad_(False)
    else:
        nn.init.trunc_normal_(net.pos_embed, std=0.02)
    return net


def init_linear(module: nn.Module) -> None:
    """MAE's initialisation of a linear layer: xavier-uniform weight, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def encode_visible(
    net: Any,
    images: Tensor,
    ids_keep: Tensor | None,
    *,
    positions: Tensor | None = None,
    run: BlockRunner = PLAIN,
    block_outputs: list[Tensor] | None = None,
) -> Tensor:
    """Encode the visible patches only: the tokens that a ViT gives when it sees nothing else.

    Args:
        net: a timm network that `maskable` finds an encoder in.
        images: float (B, C, h p, w q), at any bandwidth.
        ids_keep: int64 (B, K), visible patches of the h x w grid; None shows all of them. In evaluation mode
            at full resolution these are the tokens of timm's own forward, to the last bit.
        positions: (1, P or 0 + N, D) for this grid, in the layout of `pos_embed`; None resamples
            `pos_embed` itself.
        run: how blocks are run.
        block_outputs: a list that receives the tokens in front of the first block and after each one,
            depth + 1 tensors (B, P + K, D), all before the final norm.

    Returns:
        (B, P + K, D), after the final norm; prefix tokens first, patches in the order of `ids_keep`.
    """
    encoder = encoder_of(net)
    return encoder.encode(images, ids_keep, added=positions, run=run, block_outputs=block_outputs)


def encoder_of(net: nn.Module) -> MaskableEncoder:
    """What stands beside a network that was built as an encoder."""
    encoder = transformer_of(net)
    assert encoder is not None, type(net)
    return encoder


def transformer_of(net: nn.Module) -> MaskableEncoder | None:
    """The same for any network, one that `maskable` refuses among them; None for one of another class."""
    return next((kind(net) for kind in _kinds() if isinstance(net, kind.kind)), None)


def maskable(net: nn.Module) -> MaskableEncoder | str:
    """A network as an encoder of visible patches, or why it cannot be one, as the end of a sentence."""
    kind = next((kind for kind in _kinds() if type(net) is kind.kind), None)
    if kind is None:
        name = type(net).__name__
        reason = _REASONS.get(name)
        return f"is a {name}, not a plain Vision Transformer{f': {reason}' if reason else ''}"
    refusal = kind.refusal(net)
    return kind(net) if refusal is None else f"{refusal}, not a plain Vision Transformer"


_MERGES = "it merges patches between its stages, so only whole windows of the last one could be removed"
_REASONS = {
    "NaFlexVit": "it embeds patches with their places by itself; a vit_* of its size takes its weights",
    "Hiera": _MERGES,
    "HieraDet": _MERGES,
}


@lru_cache
def _kinds() -> tuple[type[MaskableEncoder], ...]:
    # One line here makes a new kind of encoder known. They import timm, which takes seconds.
    from etpp_ssl.model.encoders.eva import EvaEncoder
    from etpp_ssl.model.encoders.vit import VitEncoder

    return VitEncoder, EvaEncoder


def is_maskable(architecture: str) -> bool:
    """Whether a name of timm's is that of an encoder that can be masked."""
    return not isinstance(_of_name(architecture), str)


@lru_cache(maxsize=8)
def _named_model(name: str) -> MaskableEncoder:
    """The named timm model on the meta device, if it is one that can be masked."""
    import timm

    found = _of_name(name)
    if isinstance(found, str):
        hint = close_names(
            name.split(".")[0],
            timm.list_models("*vit*"),
            is_maskable,
            otherwise="vit_small_patch16_224, vit_base_patch16_224",
        )
        raise UserError(f"model.name {shown(name)} {found}{hint}")
    return found


def _of_name(name: str) -> MaskableEncoder | str:
    """timm's model on the meta device, or why it cannot be masked."""
    import timm

    if not timm.is_model(name.split(".")[0]):
        return "is not a timm model"
    try:
        with ShapesOnly():
            return maskable(timm.create_model(name, pretrained=False))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"cannot be built: {error}"
