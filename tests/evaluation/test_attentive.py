"""The attentive probe: its pooling against timm's, its two ways of seeing images, and determinism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from probe_data import build, leaves_everything_as_it_was, with_workers, write_coloured
from timm.layers import AttentionPoolLatent

from etpp_ssl.config import UserError
from etpp_ssl.evaluation.attentive import SharedQueryPool, TokenCache, patch_tokens
from etpp_ssl.recipe import Recipe

QUICK = ["probe=attentive", "probe.epochs=20", "probe.batch_size=12", "probe.base_lr=1e-1"]
SHORT = ["probe=attentive", "probe.epochs=3", "probe.batch_size=24", "probe.micro_batch_size=7",
         "probe.base_lr=1e-1"]  # fmt: skip


@pytest.mark.parametrize(("width", "num_heads", "num_tokens"), [(12, 3, 7), (8, 1, 1), (16, 8, 20)])
def test_the_pooling_is_timms_forward_and_backward(width: int, num_heads: int, num_tokens: int) -> None:
    pool = SharedQueryPool(width, num_heads, seed=1).double()
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    timms = AttentionPoolLatent(width, out_features=0, num_heads=num_heads).double()
    timms.load_state_dict(pool.state_dict())
    tokens = torch.randn(5, num_tokens, width, dtype=torch.float64)
    gradients = {}
    for name, layer in (("ours", pool), ("timm's", timms)):
        pooled = layer(tokens)
        (pooled * torch.arange(width)).sum().backward()
        gradients[name] = [pooled.detach(), *(p.grad for p in layer.parameters())]
    for ours, theirs in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_tokens_are_the_patches_of_an_unmasked_forward(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("model.reg_tokens=2")
    encoder = recipe.build_model().encoder.eval()
    images = torch.randn(2, 3, *recipe.size)
    tokens = patch_tokens(encoder, images)
    assert tokens.shape == (2, 24, 16)
    plain = encoder.norm(encoder.blocks(encoder.norm_pre(encoder.patch_drop(
        encoder._pos_embed(encoder.patch_embed(images))))))  # fmt: skip
    assert torch.equal(tokens, plain[:, 3:])


@pytest.mark.parametrize("cache", ["true", "false"])
def test_it_beats_chance_and_leaves_a_net_with_batchnorm_as_it_was(
    cache: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    write_coloured(tmp_path)
    recipe = tiny_recipe(*QUICK, f"probe.cache={cache}", "data=folder", f"data.root={tmp_path}")
    probe, model = build(recipe)
    # Three classes.
    assert leaves_everything_as_it_was(probe.run, model)["attentive_top1"] > 80


@pytest.mark.parametrize("cache", ["true", "false"])
def test_it_is_deterministic_whatever_the_workers(cache: str, tiny_recipe: Callable[..., Recipe]) -> None:
    probe, model = build(tiny_recipe(*SHORT, f"probe.cache={cache}"))
    generator = torch.random.get_rng_state()
    heads = []
    real = probe.predicted
    probe.predicted = lambda model, head, *of: heads.append(head.state_dict()) or real(model, head, *of)
    first = probe.run(model)
    torch.manual_seed(5)
    with_workers(probe, 2)
    assert probe.run(model) == first
    assert all(torch.equal(heads[0][name], tensor) for name, tensor in heads[1].items())
    torch.random.set_rng_state(generator)


def test_the_cache_gives_the_images_asked_for(tiny_recipe: Callable[..., Recipe]) -> None:
    probe, model = build(tiny_recipe(*SHORT))
    model.eval()
    context, source = probe.context, probe.images.train
    cache = TokenCache(context, model.encoder, source, 7)
    assert cache.num_images == 64
    tokens, labels = cache.take([5, 63, 0, 5])
    images = [context.view(source.open(i), i, context.view.image_size) for i in (5, 63, 0, 5)]
    with torch.no_grad():
        expected = patch_tokens(model.encoder, context.normalise(torch.stack(images)))
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, rtol=1e-2, atol=1e-2)
    assert labels.tolist() == [source.label(i) for i in (5, 63, 0, 5)]


def test_images_of_another_process_are_not_taken(tiny_recipe: Callable[..., Recipe]) -> None:
    probe, model = build(tiny_recipe(*SHORT))
    cache = TokenCache(probe.context, model.encoder.eval(), probe.images.train, 16)
    cache._first = 40
    _, labels = cache.take([3, 41, 39, 40])
    assert labels.tolist() == [probe.images.train.label(i) for i in (1, 0)]
    assert cache.take([0, 1])[0].shape == (0, 24, 16)


def test_an_encoder_of_parallel_blocks_has_heads_too(tiny_recipe: Callable[..., Recipe]) -> None:
    probe, model = build(tiny_recipe(*SHORT, "model.name=vit_small_patch16_18x2_224"))
    assert not hasattr(model.encoder.blocks[0], "attn")
    assert 0 <= probe.run(model)["attentive_top1"] <= 100


def test_mistakes_get_a_sentence(tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    probe, model = build(tiny_recipe(*SHORT, "probe.num_heads=3"))
    with pytest.raises(UserError, match="num_heads is 3: use a divisor of the encoder's width 16"):
        probe.run(model)
    with pytest.raises(UserError, match="warmup_epochs is 1"):
        tiny_recipe("probe=attentive", "probe.epochs=1")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100))
    probe, model = build(tiny_recipe(*SHORT))
    with pytest.raises(UserError, match=r"use probe\.cache=false"):
        probe.run(model)
