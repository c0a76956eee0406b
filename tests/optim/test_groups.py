"""Weight-decay groups: every trained parameter once, each with the decay that its rule says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.optim.groups import parameter_groups

TOKENS = ("encoder.cls_token", "encoder.reg_token", "decoder.mask_token")


def make_model(pos_embed: str = "sincos") -> MaskedAutoencoder:
    settings: dict[str, Any] = {
        "name": "vit",
        "patch_size": (4, 6),
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "reg_tokens": 2,
        "pos_embed": pos_embed,
        "decoder": {"embed_dim": 8, "depth": 1, "num_heads": 2},
    }
    return ModelConfig(**settings).build(image_size=(16, 30), in_chans=3, num_values=72)


def decay_by_name(model: nn.Module, decay_tokens: bool) -> dict[str, float]:
    """What AdamW will really apply to each parameter."""
    groups = parameter_groups(model, weight_decay=0.05, decay_tokens=decay_tokens)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.3)
    effective = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {n: effective[id(p)] for n, p in model.named_parameters() if id(p) in effective}


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("decay_tokens", [True, False])
def test_every_trained_parameter_is_in_exactly_one_group(pos_embed: str, decay_tokens: bool) -> None:
    model = make_model(pos_embed)
    groups = parameter_groups(model, weight_decay=0.05, decay_tokens=decay_tokens)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert len(set(grouped)) == len(grouped)


@pytest.mark.parametrize("decay_tokens", [True, False])
def test_matrices_are_decayed_and_biases_and_norms_are_not(decay_tokens: bool) -> None:
    decays = decay_by_name(make_model(), decay_tokens)
    others = {name: decay for name, decay in decays.items() if name not in TOKENS}
    for name, decay in others.items():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert decay == (0.05 if is_matrix else 0.0), name
    assert others["encoder.patch_embed.proj.weight"] == 0.05
    assert others["encoder.blocks.1.attn.qkv.weight"] == 0.05
    assert others["encoder.blocks.1.attn.qkv.bias"] == 0.0
    assert others["encoder.norm.weight"] == 0.0
    assert others["decoder.blocks.0.norm2.weight"] == 0.0
    assert others["decoder.head.weight"] == 0.05


@pytest.mark.parametrize(("decay_tokens", "decay"), [(True, 0.05), (False, 0.0)])
def test_tokens_are_decayed_if_asked(decay_tokens: bool, decay: float) -> None:
    decays = decay_by_name(make_model(), decay_tokens)
    assert {name: decays[name] for name in TOKENS} == dict.fromkeys(TOKENS, decay)


def test_frozen_positions_are_in_no_group() -> None:
    for decay_tokens in (True, False):
        assert "encoder.pos_embed" not in decay_by_name(make_model("sincos"), decay_tokens)


def test_learned_positions_are_trained_without_decay() -> None:
    for decay_tokens in (True, False):
        assert decay_by_name(make_model("learned"), decay_tokens)["encoder.pos_embed"] == 0.0


def test_a_frozen_encoder_leaves_the_decoder_alone_in_the_groups() -> None:
    model = make_model()
    model.encoder.requires_grad_(False)
    assert all(name.startswith("decoder.") for name in decay_by_name(model, decay_tokens=True))


def test_the_order_of_parameters_is_the_models_own() -> None:
    # A checkpoint's optimizer state is found by its place in the groups.
    model = make_model()
    places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    for group in parameter_groups(model, weight_decay=0.05, decay_tokens=True):
        order = [places[id(parameter)] for parameter in group["params"]]
        assert order == sorted(order)


def test_decay_alone_shrinks_what_is_decayed_and_nothing_else() -> None:
    model = make_model("learned")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    decays = decay_by_name(model, decay_tokens=False)
    groups = parameter_groups(model, weight_decay=0.05, decay_tokens=False)
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5 * decays[name])
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
