"""The fast encoder against timm's own forward, and against gathering after the full embedding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.encoders import build_encoder, encode_visible, encoder_args, encoder_of
from etpp_ssl.model.masking import random_masking

NO_DIMS = dict.fromkeys(("embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "reg_tokens"))
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2}
PREFIXES: dict[str, dict[str, Any]] = {
    "cls": {"class_token": True, "reg_tokens": 0},
    "cls_and_registers": {"class_token": True, "reg_tokens": 3},
    "registers": {"class_token": False, "reg_tokens": 2},
    "no_prefix": {"class_token": False, "reg_tokens": 0},
}


def arguments(
    name: str = "vit",
    image_size: tuple[int, int] = (16, 24),
    patch_size: tuple[int, int] | None = (4, 4),
    in_chans: int = 3,
    **dims: Any,
) -> tuple[str, dict[str, Any]]:
    chosen = {**NO_DIMS, **(TINY if name == "vit" else {}), **dims}
    return encoder_args(
        name=name,
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        dims=chosen,
    )


def make_encoder(*args: Any, pos_embed: str = "sincos", **kwargs: Any) -> VisionTransformer:
    """An encoder in which no parameter has the special value of its initialisation."""
    torch.manual_seed(0)
    encoder = build_encoder(*arguments(*args, **kwargs), pos_embed=pos_embed)
    return shaken(encoder)


def shaken(encoder: VisionTransformer) -> VisionTransformer:
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if parameter.ndim == 1 or "token" in name else 0.02
                parameter.add_(torch.randn_like(parameter), alpha=scale)
    return encoder.eval()


def images_for(encoder: VisionTransformer, size: tuple[int, int], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    channels = encoder.patch_embed.proj.in_channels
    dtype = encoder.patch_embed.proj.weight.dtype
    return torch.randn(batch, channels, *size, generator=generator).to(dtype)


def every_id(encoder: VisionTransformer, size: tuple[int, int], batch: int = 2) -> Tensor:
    p, q = encoder.patch_embed.patch_size
    return torch.arange((size[0] // p) * (size[1] // q)).expand(batch, -1)


def assert_equals_timm(encoder: VisionTransformer, size: tuple[int, int]) -> None:
    encoder.double()
    images = images_for(encoder, size)
    with torch.no_grad():
        ours = encode_visible(encoder, images, every_id(encoder, size))
        timms = encoder.forward_features(images)
    torch.testing.assert_close(ours, timms, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
def test_all_patches_visible_gives_timms_features_with_any_prefix(prefix: str, pos_embed: str) -> None:
    assert_equals_timm(make_encoder(pos_embed=pos_embed, **PREFIXES[prefix]), (16, 24))


@pytest.mark.parametrize(
    ("patch_size", "size"),
    [
        ((4, 4), (12, 20)),
        ((8, 8), (24, 40)),
        ((14, 14), (28, 42)),
        ((16, 16), (64, 32)),
        ((4, 6), (20, 18)),
        ((3, 5), (9, 25)),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_all_patches_visible_gives_timms_features_at_any_patch_size_and_channels(
    patch_size: tuple[int, int], size: tuple[int, int], in_chans: int
) -> None:
    encoder = make_encoder(image_size=size, patch_size=patch_size, in_chans=in_chans)
    assert tuple(encoder.patch_embed.proj.weight.shape) == (16, in_chans, *patch_size)
    assert_equals_timm(encoder, size)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224.augreg_in21k",
        "vit_base_patch16_clip_224",  # a norm before the blocks, no bias in the projection
        "vit_small_patch14_reg4_dinov2",  # registers, positions of patches only, layer scale
        "vit_base_patch16_siglip_224",  # attention pooling, which the features come before
        "vit_medium_patch16_gap_240",  # average pooling
        "vit_small_patch16_18x2_224",  # parallel blocks
        "deit3_small_patch16_224",
    ],
)
def test_all_patches_visible_gives_timms_features_for_named_models(name: str) -> None:
    patch = 14 if "patch14" in name else 16
    size = (2 * patch, 3 * patch)
    encoder = make_encoder(name, size, None, embed_dim=16, depth=1, num_heads=2)
    assert tuple(encoder.patch_embed.patch_size) == (patch, patch)
    assert_equals_timm(encoder, size)


def test_all_patches_visible_gives_timms_features_with_a_norm_in_the_patch_embedding() -> None:
    encoder = make_encoder()
    encoder.patch_embed.norm = torch.nn.LayerNorm(16)
    assert_equals_timm(encoder, (16, 24))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("size", [(8, 12), (12, 12), (24, 16), (20, 28)])
def test_on_another_grid_a_learned_embedding_gives_timms_dynamic_size_features(
    prefix: str, size: tuple[int, int]
) -> None:
    # (24, 16) has the same number of patches as the base grid, turned by a quarter.
    encoder = make_encoder(pos_embed="learned", **PREFIXES[prefix])
    architecture, args = arguments(**PREFIXES[prefix])
    dynamic = timm.create_model(architecture, **args, dynamic_img_size=True).eval()
    dynamic.load_state_dict(encoder.state_dict())
    encoder.double(), dynamic.double()
    images = images_for(encoder, size)
    with torch.no_grad():
        ours = encode_visible(encoder, images, every_id(encoder, size))
        timms = dynamic.forward_features(images)
    torch.testing.assert_close(ours, timms, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("size", [(8, 12), (24, 16)])
def test_on_another_grid_frozen_positions_are_the_scene_at_the_patch_centres(
    prefix: str, size: tuple[int, int]
) -> None:
    encoder = make_encoder(**PREFIXES[prefix])
    # One wave of the table read off the base grid: angle = coordinate at the highest frequency.
    grid, base = (size[0] // 4, size[1] // 4), (4, 6)
    rows = (torch.arange(grid[0]) + 0.5) * base[0] / grid[0] - 0.5
    columns = (torch.arange(grid[1]) + 0.5) * base[1] / grid[1] - 0.5
    seen: list[Tensor] = []
    handle = encoder.norm_pre.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        encoder.patch_embed.proj.weight.zero_()
        encoder.patch_embed.proj.bias.zero_()
        encode_visible(
            encoder,
            images_for(encoder, size),
            every_id(encoder, size),
            positions=encoder_of(encoder).sincos_at(grid),
        )
    handle.remove()
    position = seen[0][0, encoder.num_prefix_tokens :].unflatten(0, grid)
    torch.testing.assert_close(position[..., 0], columns.sin().expand(grid))
    torch.testing.assert_close(position[..., 8], rows.sin()[:, None].expand(grid))


def gather_after_embedding(encoder: VisionTransformer, images: Tensor, ids_keep: Tensor) -> Tensor:
    """The readable twin: embed the full image, add positions, then drop the masked tokens."""
    tokens = encoder.patch_embed(images)
    num_prefix = encoder.num_prefix_tokens
    own_rows = 0 if encoder.no_embed_class else num_prefix
    tokens = tokens + encoder.pos_embed[:, own_rows:]
    tokens = torch.stack([row[ids] for row, ids in zip(tokens, ids_keep, strict=True)])
    prefix = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    if prefix:
        in_front = torch.cat(prefix, dim=1)
        if own_rows:
            in_front = in_front + encoder.pos_embed[:, :own_rows]
        tokens = torch.cat([in_front.repeat(len(images), 1, 1), tokens], dim=1)
    result: Tensor = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))
    return result


def gradients(encoder: VisionTransformer, output: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    named = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((output * weight.to(output.dtype)).sum(), list(named.values()))
    return dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
def test_gathering_first_equals_gathering_after_the_embedding_with_all_gradients(
    prefix: str, pos_embed: str
) -> None:
    encoder = make_encoder(pos_embed=pos_embed, **PREFIXES[prefix]).double()
    images = images_for(encoder, (16, 24), batch=3)
    ids_keep = random_masking(torch.arange(3), 24, 7, seed=0)
    fast = encode_visible(encoder, images, ids_keep)
    plain = gather_after_embedding(encoder, images, ids_keep)
    assert fast.shape == (3, encoder.num_prefix_tokens + 7, 16)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)

    fast_grads, plain_grads = gradients(encoder, fast), gradients(encoder, plain)
    assert ("pos_embed" in fast_grads) == (pos_embed == "learned")
    for name, grad in fast_grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=0, atol=1e-11, msg=name)
        assert name.endswith("qkv.bias") or grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_pe_core_base_patch16_224"])
def test_rotary_positions_of_another_grid_are_those_of_the_scene_at_its_patch_centres(name: str) -> None:
    net = make_encoder(name, (16, 24), (4, 4), pos_embed="learned", **TINY)
    encoder, rope = encoder_of(net), net.rope
    base, grid, bands = (4, 6), (3, 5), 2  # Heads are 8 wide: two bands of each axis, twice.
    found = encoder.rotary(grid)
    for n, (row, column) in enumerate(itertools.product(range(grid[0]), range(grid[1]))):
        places = []
        for index, (i, g, full) in enumerate(zip((row, column), grid, base, strict=True)):
            centre = (i + 0.5) * full / g - 0.5 + rope.grid_offset
            places.append(centre / full * rope.ref_feat_shape[index])
        if rope.grid_indexing == "xy":
            places.reverse()
        angles = [place * 10000.0 ** -(band / bands) for place in places for band in range(bands)]
        for k, angle in enumerate(angles):
            assert found[n, 2 * k : 2 * k + 2].tolist() == pytest.approx([math.sin(angle)] * 2, abs=1e-5)
            assert found[n, 8 + 2 * k].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert torch.equal(encoder.rotary(base), rope.get_embed(shape=base))


def test_dinov3s_rotary_positions_are_timms_at_any_grid_and_draw_nothing_in_training() -> None:
    net = make_encoder("vit_small_patch16_dinov3", (16, 24), (4, 4), **TINY)
    plain = net.rope.get_embed(shape=(3, 5))
    net.rope.rescale_coords, net.rope.aug_active = 2.0, True
    net.train()
    assert not torch.equal(net.rope.get_embed(shape=(3, 5)), plain)
    assert torch.equal(encoder_of(net).rotary((3, 5)), plain)


def test_tokens_come_in_the_order_of_the_ids() -> None:
    encoder = make_encoder()
    images = images_for(encoder, (16, 24))
    ids = random_masking(torch.arange(2), 24, 9, seed=0)
    with torch.no_grad():
        forward, backward = (
            encode_visible(encoder, images, ids),
            encode_visible(encoder, images, ids.flip(1)),
        )
    torch.testing.assert_close(backward[:, 1:].flip(1), forward[:, 1:])


def test_masked_pixels_have_no_influence() -> None:
    encoder = make_encoder()
    images = images_for(encoder, (16, 24), batch=1)
    ids = torch.tensor([[0, 8, 23]])
    changed = images.clone()
    changed[:, :, :4, 4:] = float("nan")
    changed[:, :, 12:, :20] = float("nan")
    with torch.no_grad():
        assert torch.equal(encode_visible(encoder, changed, ids), encode_visible(encoder, images, ids))


def test_the_encoder_is_timms_own_class_without_head_or_pooling_norm() -> None:
    for prefix, dims in PREFIXES.items():
        encoder = make_encoder(**dims)
        assert type(encoder) is VisionTransformer
        assert isinstance(encoder.head, torch.nn.Identity)
        assert isinstance(encoder.norm, torch.nn.LayerNorm)
        assert encoder.norm.eps == 1e-6
        assert isinstance(encoder.fc_norm, torch.nn.Identity)
        assert encoder.global_pool == ("token" if dims["class_token"] else "avg"), prefix


def test_given_dimensions_replace_the_named_models_own() -> None:
    named, args = arguments("vit_small_patch16_224", (32, 48), None)
    assert named == "vit_small_patch16_224"
    sizes = (args["embed_dim"], args["depth"], args["num_heads"], args["patch_size"])
    assert sizes == (384, 12, 6, 16)
    _, args = arguments("vit_small_patch16_224", (32, 48), (8, 16), depth=3, mlp_ratio=2.0)
    assert (args["depth"], args["patch_size"], args["mlp_ratio"]) == (3, [8, 16], 2.0)
    assert args["img_size"] == [32, 48]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("vit_bse_patch16_224", "vit_base_patch16_224"),
        ("vit_tiny_patch_16_224", "vit_tiny_patch16_224"),
        ("vit_base_patch16_224 ", "vit_base_patch16_224"),
    ],
)
def test_an_unknown_name_gets_close_names(name: str, close: str) -> None:
    with pytest.raises(UserError, match=rf"model\.name '{name}' is not a timm model.*{close}"):
        arguments(name, (224, 224), None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet50", "ResNet"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("vit_tiny_r_s16_p8_224", "VisionTransformer on a HybridEmbed"),
    ],
)
def test_a_model_that_is_no_plain_vit_gets_a_sentence_with_vits(name: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"'{name}' is a {kind}.*not a plain .*close names: vit_"):
        arguments(name, (224, 224), None)


def test_an_unknown_weights_tag_gets_a_sentence() -> None:
    with pytest.raises(UserError, match=r"'vit_tiny_patch16_224\.bogus' cannot be built: .*bogus"):
        arguments("vit_tiny_patch16_224.bogus", (224, 224), None)


@pytest.mark.parametrize("missing", ["embed_dim", "depth", "num_heads", "patch_size"])
def test_explicit_dimensions_must_all_be_given(missing: str) -> None:
    changed: dict[str, Any] = {missing: None}
    with pytest.raises(UserError, match=rf"model\.name is vit .*: model\.{missing} must be given"):
        arguments("vit", **changed)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        ((17, 24), (4, 4), r"patch_size 4 does not divide the image height 17 .*17x24"),
        ((16, 25), (4, 4), r"patch_size 4 does not divide the image width 25 .*16x25"),
        ((16, 24), (4, 5), r"patch_size 4x5 does not divide the image width 24"),
    ],
)
def test_a_patch_that_does_not_divide_the_image_gets_a_sentence(
    image_size: tuple[int, int], patch_size: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        arguments("vit", image_size, patch_size)


def test_heads_that_do_not_divide_the_width_get_a_sentence() -> None:
    with pytest.raises(UserError, match=r"model\.num_heads 3 does not divide model\.embed_dim 16"):
        arguments("vit", num_heads=3)
    with pytest.raises(UserError, match=r"model\.num_heads 3 does not divide model\.embed_dim 64"):
        arguments("vit_tiny_patch16_224", (32, 48), None, embed_dim=64)


def test_a_width_without_sincos_positions_gets_a_sentence_unless_they_are_learned() -> None:
    chosen = arguments("vit", embed_dim=18, num_heads=3)
    with pytest.raises(UserError, match=r"model\.embed_dim 18 is not a multiple of 4"):
        build_encoder(*chosen, pos_embed="sincos")
    assert build_encoder(*chosen, pos_embed="learned").embed_dim == 18
