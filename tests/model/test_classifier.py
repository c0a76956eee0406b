"""The classifier's Config: what timm is asked for, what is refused, and in what words."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import UserError
from etpp_ssl.model.classifier import Classifier, ClassifierConfig
from etpp_ssl.model.encoders import EXPLICIT_ARCHITECTURE
from etpp_ssl.model.pos_embed import resampled_pos_embed

SIZE = (32, 48)
VIT: dict[str, Any] = {"name": "vit", "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def make(in_chans: int = 3, size: tuple[int, int] = SIZE, **settings: Any) -> Classifier:
    torch.manual_seed(0)
    config = ClassifierConfig(**settings)
    return config.build(image_size=size, in_chans=in_chans, num_classes=5, seed=0)


def plain_vit(net: nn.Module, images: Tensor, pool: str) -> Tensor:
    """A ViT with its learned positions resampled to the grid, step by step."""
    tokens = F.conv2d(images, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=8)
    grid = (tokens.shape[2], tokens.shape[3])
    tokens = tokens.flatten(2).transpose(1, 2)
    positions = resampled_pos_embed(net.pos_embed, grid, (SIZE[0] // 8, SIZE[1] // 8), 1)
    tokens = torch.cat([net.cls_token.expand(len(images), -1, -1), tokens], dim=1) + positions
    for block in net.blocks:
        tokens = block(tokens)
    if pool == "token":
        return net.head(net.norm(tokens)[:, 0])
    # MAE's fine-tuning: mean over the patches, and the norm behind it.
    return net.head(net.fc_norm(tokens[:, 1:].mean(dim=1)))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("size", [SIZE, (24, 16), (48, 32), (16, 96)])
def test_a_vit_equals_its_definition_at_any_grid(pool: str, size: tuple[int, int]) -> None:
    # 48 x 32 and 16 x 96 have as many patches as the base, in another arrangement.
    model = make(**VIT, global_pool=pool).eval()
    assert isinstance(model.net.fc_norm, nn.Identity) == (pool == "token")
    assert isinstance(model.net.norm, nn.Identity) == (pool == "avg")
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(images), plain_vit(model.net, images, pool), rtol=1e-4, atol=1e-5)
    assert model.net.pos_embed.shape == (1, 1 + 4 * 6, 16)
    assert model.net.pos_embed.requires_grad
    model(images).square().sum().backward()
    assert model.net.pos_embed.grad is not None
    assert model.net.pos_embed.grad[0, 1:].any(dim=-1).all()


def test_explicit_dimensions_and_channels_reach_timm() -> None:
    config = ClassifierConfig(
        **{**VIT, "patch_size": (8, 16)}, reg_tokens=2, class_token=False, drop_path=0.1
    )
    architecture, args = config.timm_args(SIZE, 4, 7)
    assert architecture == EXPLICIT_ARCHITECTURE
    net = timm.create_model(architecture, **args)
    assert net.pos_embed.shape == (1, 4 * 3 + 2, 16)
    assert net.patch_embed.proj.weight.shape == (16, 4, 8, 16)
    assert net.head.out_features == 7
    assert net.global_pool == "avg"
    assert config.multiple(SIZE, 4) == (8, 16)


def test_named_networks_take_arguments_and_dimensions() -> None:
    config = ClassifierConfig(name="resnet18", args={"layers": [1, 1, 1, 1]}, num_classes=3)
    assert config.timm_args((64, 64), 1, 10) == (
        "resnet18",
        {"layers": [1, 1, 1, 1], "in_chans": 1, "num_classes": 3, "drop_path_rate": 0.0},
    )
    small = make(name="deit_tiny_patch16_224", patch_size=8, depth=1, global_pool="avg")
    assert len(small.net.blocks) == 1
    assert small.net.patch_embed.grid_size == (4, 6)


def test_the_drop_path_of_a_named_network_is_ours_and_not_timms_default() -> None:
    # timm's Swin has 0.1 unless told otherwise.
    args = {"depths": [1, 1], "embed_dim": 8, "num_heads": [1, 1], "window_size": 2}
    model = make(name="swin_tiny_patch4_window7_224", args=args)
    assert model.drop_path_keys.num_modules == 0


@pytest.mark.parametrize("settings", [VIT, {"name": "resnet18", "args": {"layers": [1, 1, 1, 1]}}])
def test_the_head_starts_as_asked(settings: dict[str, Any]) -> None:
    model = make(**settings, head_init_std=2e-5)
    head = model.net.get_classifier()
    assert 0.5e-5 < float(head.weight.detach().std()) < 4e-5
    assert not head.bias.any()
    rest = make(**settings).net.state_dict()
    other = {k: v for k, v in model.net.state_dict().items() if not k.startswith(("head", "fc."))}
    assert all(torch.equal(value, rest[name]) for name, value in other.items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"args": {"drop_rate": 0.1}}, "drop_rate is 0.1.*must be 0.*cannot be keyed"),
        ({"args": {"attn_drop_rate": 0.2}}, "attn_drop_rate is 0.2.*must be 0"),
        ({"args": {"drop_block_rate": 0.2}}, "drop_block_rate is 0.2.*must be 0"),
        ({"args": {"drop_path_rate": 0.2}}, "drop_path_rate is 0.2.*model.drop_path"),
        ({"args": {"img_size": 64}}, "img_size is 64.*image_size"),
        ({"args": {"dynamic_img_size": True}}, "dynamic_img_size is True.*left out"),
        ({"class_token": False, "global_pool": "token"}, "global_pool is 'token' and class_token is false"),
        ({"drop_path": 1.0}, "less than 1"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ClassifierConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "resnet5O"}, "model.name 'resnet5O' is not a timm model; close names: .*resnet50"),
        ({"name": "vit"}, "embed_dim, model.depth, model.num_heads, model.patch_size must be given"),
        ({"name": "resnet18", "depth": 3}, "model.depth is for Vision Transformers, and resnet18 is not one"),
        ({"name": "densenet121", "drop_path": 0.1}, "model.drop_path is 0.1, but densenet121 has none"),
        ({"name": "deit_tiny_patch16_224", "patch_size": 7}, "model.patch_size 7 does not divide image_size"),
        ({"name": "resnet18", "args": {"nonsense": 1}}, "resnet18 cannot be built: .*nonsense"),
        ({"name": "rexnet_100"}, "rexnet_100 draws random numbers .*set drop_rate to 0 in model.args"),
        ({"name": "tnt_b_patch16_224", "drop_path": 0.1}, "tnt_b_patch16_224 cannot run at .*whole samples"),
        (
            {"name": "vit_tiny_patch16_224", "args": {"depth": 1}},
            "model.args.depth .* is the key model.depth",
        ),
    ],
)
def test_networks_that_cannot_serve_are_refused_in_a_sentence(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        make(**settings, size=SIZE if "vit" in settings["name"] else (64, 64))


def test_dropout_that_is_switched_off_is_accepted() -> None:
    ClassifierConfig(name="rexnet_100", args={"drop_rate": 0.0}).check(
        image_size=(64, 64), in_chans=3, bandwidths=[(32, 32)]
    )


def test_a_network_of_one_size_is_refused_where_the_size_changes() -> None:
    config = ClassifierConfig(name="mixer_s32_224")
    config.check(image_size=(224, 224), in_chans=3, bandwidths=[(224, 224)])
    with pytest.raises(UserError, match=r"mixer_s32_224 cannot run at 96x160 pixels .*at full resolution it"):
        config.check(image_size=(224, 224), in_chans=3, bandwidths=[(96, 160)])


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "convnext_tiny",
        "deit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "caformer_s18",
    ],
)
def test_the_published_networks_run_at_the_published_bandwidths(name: str) -> None:
    config = ClassifierConfig(name=name, drop_path=0.1)
    step = config.multiple((224, 224), 3)
    assert step == ((16, 16) if name.startswith("deit") else (32, 32))
    config.check(image_size=(224, 224), in_chans=3, bandwidths=[(96, 96), (160, 160), (192, 192)])


def test_a_finer_swin_serves_small_images() -> None:
    args = {"depths": [2, 2], "embed_dim": 8, "num_heads": [1, 1], "window_size": 4, "patch_size": 2}
    config = ClassifierConfig(name="swin_tiny_patch4_window7_224", args=args)
    assert config.multiple((32, 32), 3) == (4, 4)
    config.check(image_size=(32, 32), in_chans=3, bandwidths=[(16, 16), (24, 28)])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    images = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for recompute in (False, True):
        model = make(**VIT, grad_checkpointing=recompute).train()
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
