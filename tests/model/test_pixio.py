"""Pixio (arXiv 2512.15715): its loss, written out; its class tokens in probes, runs and exports; its keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

import etpp_ssl
from etpp_ssl.config import UserError
from etpp_ssl.evaluation.features import pooled_features
from etpp_ssl.export.timm import export
from etpp_ssl.model.class_tokens import pool_class_tokens, with_class_tokens
from etpp_ssl.model.classifier import ClassifierConfig
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import removed_ids
from etpp_ssl.model.timm_net import drop_threshold
from etpp_ssl.randomness import keyed_words
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.targets.pixels import PixelsConfig
from etpp_ssl.train.launch import finetune, pretrain

PIXIO: dict[str, Any] = {
    "name": "vit",
    "patch_size": 16,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "class_tokens": 8,
    "pos_embed": "learned",
    "masking": {"name": "aligned", "block": 4},
    "decoder": {"embed_dim": 16, "depth": 4, "num_heads": 2, "pos_embed": "learned"},
}
SIZE = (256, 256)
SAMPLES = torch.tensor([5, 2**33, 7])


def build(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = ModelConfig(**{**PIXIO, **changes}).build(image_size=SIZE, in_chans=3, num_values=768, seed=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def block(x: Tensor, weights: dict[str, Tensor], prefix: str, num_heads: int, scale: Tensor) -> Tensor:
    """A pre-norm block of a ViT; `scale` (2, B) multiplies its two branches."""

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ weights[f"{prefix}{name}.weight"].T + weights[f"{prefix}{name}.bias"]

    def norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(
            values,
            values.shape[-1:],
            weights[f"{prefix}{name}.weight"],
            weights[f"{prefix}{name}.bias"],
            1e-6,
        )

    heads = linear("attn.qkv", norm("norm1", x)).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = heads
    attended = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    x = x + scale[0][:, None, None] * linear("attn.proj", attended.transpose(1, 2).flatten(2))
    return x + scale[1][:, None, None] * linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


def pixio_loss(
    weights: dict[str, Tensor], images: Tensor, ids_keep: Tensor, heads: tuple[int, int], scales: Tensor
) -> Tensor:
    """The original's formula: mask tokens go where patches were removed, and every patch is predicted.

    Args:
        weights: a state dict of ours, by its names.
        images: (B, 3, 256, 256).
        ids_keep: int64 (B, K).
        heads: of encoder and decoder.
        scales: (L, 2, B), of the encoder's residual branches: 0 where drop-path drops, 1 / keep elsewhere.
    """
    num_images, num_class = len(images), 8
    pixels = (
        images.reshape(num_images, 3, 16, 16, 16, 16).permute(0, 2, 4, 3, 5, 1).reshape(num_images, 256, 768)
    )
    projection = weights["encoder.patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
    x = pixels @ projection.T + weights["encoder.patch_embed.proj.bias"]
    x = x + weights["encoder.pos_embed"][:, num_class:]
    x = torch.stack([row[ids] for row, ids in zip(x, ids_keep, strict=True)])
    tokens = torch.cat([weights["encoder.cls_token"], weights["encoder.reg_token"]], dim=1)
    tokens = tokens + weights["encoder.pos_embed"][:, :num_class]
    x = torch.cat([tokens.expand(num_images, -1, -1), x], dim=1)
    for layer, scale in enumerate(scales):
        x = block(x, weights, f"encoder.blocks.{layer}.", heads[0], scale)
    x = F.layer_norm(x, x.shape[-1:], weights["encoder.norm.weight"], weights["encoder.norm.bias"], 1e-6)

    x = x @ weights["decoder.embed.weight"].T + weights["decoder.embed.bias"]
    whole = weights["decoder.mask_token"].repeat(num_images, 256, 1)
    for image in range(num_images):
        whole[image, ids_keep[image]] = x[image, num_class:]
    x = torch.cat([x[:, :num_class], whole], dim=1) + weights["decoder.pos_embed"]
    for layer in range(4):
        x = block(x, weights, f"decoder.blocks.{layer}.", heads[1], torch.ones(2, num_images))
    x = F.layer_norm(x, x.shape[-1:], weights["decoder.norm.weight"], weights["decoder.norm.bias"], 1e-6)
    values = (x @ weights["decoder.head.weight"].T + weights["decoder.head.bias"])[:, num_class:]

    target = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    removed = torch.ones(num_images, 256).scatter(1, ids_keep, 0.0)
    return ((values - target).square().mean(-1) * removed).sum() / removed.sum()


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_the_loss_is_the_originals_at_256_px(drop_path: float) -> None:
    model = build(drop_path=drop_path).train()
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    masker = ModelConfig(**PIXIO).masker(image_size=SIZE, patch_size=(16, 16), seed=4)
    ids_keep, ids_predict = masker(SAMPLES, SIZE, 0.0)
    assert ids_keep.shape == (3, 64)
    values = model(images, ids_keep, ids_predict, SAMPLES).values_BMV
    objective = PixelsConfig(norm_pix=True).build(patch_size=(16, 16), in_chans=3)

    scales = torch.ones(3, 2, 3)
    if drop_path:
        # Rates grow linearly from 0: the first block never drops and draws nothing.
        words = (keyed_words(4, "drop_path", SAMPLES, 4) & (2**63 - 1)).T.unflatten(0, (2, 2))
        for layer, rate in ((1, drop_path / 2), (2, drop_path)):
            scales[layer] = (words[layer - 1] >= drop_threshold(rate)) / (1 - rate)
        assert (scales == 0).any()
    expected = pixio_loss(model.state_dict(), images, ids_keep, (3, 2), scales)
    loss = objective(values, ids_predict, images)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


def test_it_starts_as_the_original_does() -> None:
    torch.manual_seed(0)
    wide = {**PIXIO, "embed_dim": 192, "decoder": {**PIXIO["decoder"], "embed_dim": 128}}
    model = ModelConfig(**wide).build(image_size=SIZE, in_chans=3, num_values=768)
    positions = (model.encoder.pos_embed, model.decoder.pos_embed)
    assert [p.shape for p in positions] == [(1, 264, 192), (1, 264, 128)]
    assert all(p.requires_grad for p in positions)
    for drawn in (*positions, model.encoder.cls_token, model.encoder.reg_token, model.decoder.mask_token):
        assert drawn.detach().std().item() == pytest.approx(0.02, rel=0.15)
    assert model.encoder.cls_token.shape == (1, 1, 192)
    assert model.encoder.reg_token.shape == (1, 7, 192)


def test_drop_path_is_keyed_by_sample_also_where_blocks_are_recomputed() -> None:
    images = torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    ids_keep = torch.tensor([[0, 5, 7]]).expand(3, -1)
    ids_predict = removed_ids(ids_keep, 12)
    grads = []
    for checkpointing in (False, True):
        model = build(drop_path=0.5, grad_checkpointing=checkpointing).train()
        values = model(images, ids_keep, ids_predict, SAMPLES).values_BMV
        # Another forward pass in between must not change what the backward pass recomputes.
        other = model(images.flip(0), ids_keep, ids_predict, SAMPLES.flip(0)).values_BMV
        torch.testing.assert_close(other.flip(0), values)
        values.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    shuffled = model(images, ids_keep, ids_predict, SAMPLES + 1).values_BMV
    assert not torch.allclose(shuffled, values)
    with pytest.raises(UserError, match="pass sample_ids_B"):
        model(images, ids_keep)
    model.eval()
    model(images, ids_keep)


SMALL = [
    "model.depth=2",
    "budget_epochs=0.5",
    "model.class_tokens=3",
    "model.pos_embed=learned",
    "model.masking={name: aligned, block: 2, unit: scene}",
    "model.drop_path=0.3",
]


def test_a_run_pools_its_class_tokens_and_stock_timm_has_its_tokens(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    run = pretrain(tiny_recipe(*SMALL))
    encoder = run.bare_model.eval().encoder
    images = torch.randn(2, 3, *encoder.patch_embed.img_size)
    with torch.inference_mode():
        tokens = encoder.forward_features(images)
        mean = tokens[:, :3].mean(dim=1)
        assert torch.equal(pooled_features(encoder, images, "token"), mean)
        assert torch.equal(pooled_features(encoder, images), mean)
        patches = tokens[:, 3:].mean(dim=1)
        assert torch.equal(pooled_features(encoder, images, "avg"), patches)

    said: list[str] = []
    folder = export(run.folder.path, say=said.append)
    assert any("[:, :3].mean(dim=1)" in line for line in said)
    assert "[:, :3].mean(dim=1)" in (folder / "README.md").read_text()
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(stock.forward_features(images), tokens)
        assert torch.equal(stock(images), tokens[:, 0])
    for place in (run.folder.path, folder):
        opened = etpp_ssl.load(place)
        with torch.inference_mode():
            assert torch.equal(pooled_features(opened.model, images), mean)
    tuned = finetune(
        tiny_classifier(
            f"init={folder}",
            f"output={tmp_path / 'tuned'}",
            "model.class_tokens=3",
            "model.global_pool=token",
        )
    )
    for net in (tuned.bare_model.eval().net, etpp_ssl.load(tuned.folder.path).model):
        with torch.inference_mode():
            features = net.forward_features(images)
            torch.testing.assert_close(net(images), net.head(net.fc_norm(features[:, :3].mean(dim=1))))
    with pytest.raises(UserError, match=r"mean of 3 class tokens, .* model\.global_pool=avg"):
        export(tuned.folder.path, say=said.append)


def test_a_run_with_drop_path_resumes_to_the_same_bits(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    pretrain(tiny_recipe(f"output={tmp_path / 'whole'}", *SMALL))
    recipe = tiny_recipe(f"output={tmp_path / 'cut'}", "checkpoint.every_steps=3", *SMALL)
    with crash_after(4):
        pretrain(recipe)
    pretrain(recipe)
    pretrain(tiny_recipe(f"output={tmp_path / 'plain'}", *SMALL, "model.drop_path=0"))
    whole, cut, plain = (
        RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("whole", "cut", "plain")
    )
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    assert [name for name in whole if not torch.equal(whole[name], plain[name])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**PIXIO, "class_token": False}, r"class_tokens is 8, but model\.class_token is false"),
        ({"name": "vit_base_patch14_reg4_dinov2", "patch_size": 16, "class_tokens": 2}, "keeps no positions"),
    ],
)
def test_encoders_that_cannot_have_class_tokens_say_why(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**settings).encoder_args(SIZE, 3)


def test_other_networks_cannot_have_class_tokens() -> None:
    for number in (1, 8):
        with pytest.raises(
            UserError, match=f"class_tokens is {number}, but rope is a Linear, and only Vision"
        ):
            with_class_tokens({"class_tokens": number}, torch.nn.Linear(1, 1), "rope")
    with pytest.raises(UserError, match="class_tokens is 8, and the Linear has 0 prefix tokens"):
        pool_class_tokens(torch.nn.Linear(1, 1), 8)


def test_classifiers_that_cannot_have_class_tokens_say_why() -> None:
    with pytest.raises(UserError, match=r"model\.class_tokens is for Vision Transformers"):
        ClassifierConfig(name="resnet18", class_tokens=2).timm_args((64, 64), 3, 2)
    with pytest.raises(UserError, match="keeps no positions"):
        ClassifierConfig(name="vit_base_patch14_reg4_dinov2", class_tokens=2).timm_args((224, 224), 3, 2)
    args = ClassifierConfig(name="vit_tiny_patch16_224", class_tokens=4).timm_args((224, 224), 3, 2)[1]
    assert (args["class_token"], args["reg_tokens"]) == (True, 3)
    assert "class_tokens" not in args


def test_drop_path_of_compiled_blocks_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"drop_path is 0\.1 and compiled is true"):
        ModelConfig(**PIXIO, drop_path=0.1, compiled=True)
