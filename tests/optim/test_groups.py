"""Weight-decay groups: every trained parameter once, each with the decay that its rule says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.optim.groups import parameter_groups
from etpp_ssl.optim.optimizers import ClassifierOptimConfig, OptimConfig
from etpp_ssl.optim.schedules import set_learning_rate

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


def test_muon_takes_the_matrices_of_the_blocks_and_leaves_all_else_to_adamw() -> None:
    model = make_model("learned")
    config = OptimConfig(name="nmuon", fallback_lr_scale=0.5, weight_decay=0.1)
    optimizer = config.build(model, torch.device("cpu"))
    set_learning_rate(optimizer, 1e-2)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, p in model.named_parameters() if id(p) in found} == names
    in_blocks = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    for name, parameter in model.named_parameters():
        group, hidden = found[id(parameter)], ".blocks." in name and name.endswith(in_blocks)
        assert group["use_fallback"] is (not hidden), name
        assert group["lr"] == pytest.approx(1e-2 if hidden else 5e-3), name
        # The names with `n` have Nesterov momentum, in the fallback's second moment, too.
        assert group["nesterov"], name
    for name in ("encoder.pos_embed", "encoder.patch_embed.proj.weight", "decoder.head.weight", *TOKENS):
        assert found[id(dict(model.named_parameters())[name])]["use_fallback"], name


def test_muon_in_fine_tuning_has_layer_decay_and_leaves_the_head_to_adamw() -> None:
    import timm

    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=3, num_classes=4
    )
    config = ClassifierOptimConfig(name="muon", layer_decay=0.5)
    optimizer = config.build(net, torch.device("cpu"))
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(net.named_parameters())
    expected = {"head.weight": (True, 1.0), "blocks.1.mlp.fc1.weight": (False, 0.5),
                "blocks.0.attn.qkv.weight": (False, 0.25), "blocks.0.attn.qkv.bias": (True, 0.25),
                "patch_embed.proj.weight": (True, 0.125)}  # fmt: skip
    for name, (fallback, scale) in expected.items():
        group = found[id(parameters[name])]
        assert (group["use_fallback"], group["lr_scale"]) == (fallback, scale), name


def test_muon_without_a_matrix_is_refused() -> None:
    model = make_model()
    for block in model.transformer_blocks:
        for parameter in block.parameters():
            parameter.requires_grad_(parameter.ndim < 2)
    with pytest.raises(UserError, match="muon, which is for weight matrices, but no trained parameter"):
        OptimConfig(name="muon").build(model, torch.device("cpu"))
