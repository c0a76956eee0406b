"""MAE's initialisation: xavier-uniform linears, small tokens, fixed positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.model.encoders import build
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig


def make_model(seed: int = 0, **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "name": "vit",
        "patch_size": (4, 6),
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 4,
        "reg_tokens": 40,
        "decoder": {"embed_dim": 48, "depth": 2, "num_heads": 4},
    }
    config = ModelConfig(**{**settings, **changes})
    return config.build(image_size=(16, 30), in_chans=5, num_values=120)


def assert_xavier_uniform(weight: Tensor, name: str) -> None:
    """`weight` as (outputs, inputs): uniform within sqrt(6 / (inputs + outputs))."""
    bound = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5
    assert weight.abs().max() <= bound, name
    assert weight.abs().max() > 0.98 * bound, name
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_linear_layers_are_xavier_uniform_with_zero_bias() -> None:
    model = make_model()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # Four per block, and the decoder's embedding and head.
    assert len(linears) == 4 * 4 + 2
    for name, linear in linears.items():
        assert_xavier_uniform(linear.weight, name)
        assert not linear.bias.any(), name


def test_the_patch_projection_is_initialised_as_the_linear_layer_that_it_is() -> None:
    projection = make_model().encoder.patch_embed.proj
    assert projection.weight.shape == (64, 5, 4, 6)
    assert_xavier_uniform(projection.weight.flatten(1), "patch_embed.proj")
    assert not projection.bias.any()


def test_norms_are_the_identity() -> None:
    for name, module in make_model().named_modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert not module.bias.any(), name


def test_tokens_are_normal_with_deviation_0_02() -> None:
    model = make_model()
    registers = model.encoder.reg_token
    assert registers.std().item() == pytest.approx(0.02, rel=0.06)
    for token in (model.encoder.cls_token, model.decoder.mask_token):
        assert 0.01 < token.std().item() < 0.03
        assert token.abs().max() < 0.1


def test_sincos_positions_are_frozen_and_zero_for_the_prefix() -> None:
    encoder = make_model().encoder
    assert not encoder.pos_embed.requires_grad
    assert encoder.pos_embed.shape == (1, 1 + 40 + 4 * 5, 64)
    assert not encoder.pos_embed[:, :41].any()
    # Every patch has a position of its own, of the norm that sin-cos gives.
    patches = encoder.pos_embed[0, 41:]
    assert len(patches.unique(dim=0)) == 20
    torch.testing.assert_close(patches.square().sum(-1), torch.full((20,), 32.0))
    frozen = [name for name, p in make_model().named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.pos_embed"]


def test_learned_positions_are_trained_from_small_noise() -> None:
    model = make_model(pos_embed="learned")
    assert model.encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_absolute_positions_gets_a_sentence() -> None:
    with pytest.raises(UserError, match="has no position embedding to train with"):
        build.build_encoder("vit_tiny_patch16_224", {"pos_embed": "none", "depth": 1})


def test_the_weights_follow_from_the_seed_whether_or_not_timm_was_asked_before() -> None:
    build._named_model.cache_clear()
    cold, warm, other = make_model(), make_model(), make_model(seed=1)
    for (name, first), second in zip(cold.named_parameters(), warm.parameters(), strict=True):
        assert torch.equal(first, second), name
    assert not torch.equal(cold.decoder.head.weight, other.decoder.head.weight)
