"""A classifier's optimizer: every parameter moves by the rate and the decay that its group carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from etpp_ssl.optim.optimizers import ClassifierOptimConfig
from etpp_ssl.optim.schedules import set_learning_rate

CPU = torch.device("cpu")
LR, WEIGHT_DECAY, EPS = 0.1, 0.3, 1e-8


def small(name: str, **args: Any) -> nn.Module:
    net: nn.Module = timm.create_model(name, num_classes=5, **args)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: small(
        "vit_tiny_patch16_224", img_size=(32, 48), depth=2, embed_dim=16, num_heads=2, global_pool="avg"
    ),
    "convnext": lambda: small("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16)),
    "resnet": lambda: small("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
}


# The first step of each optimizer, from its definition: weights w, gradients g, rate lr, decay wd.
def adamw(w: Tensor, g: Tensor, lr: float, wd: float) -> Tensor:
    return w - lr * wd * w - lr * g / (g.abs() + EPS)


def sgd(w: Tensor, g: Tensor, lr: float, wd: float) -> Tensor:
    return w - lr * 1.9 * (g + wd * w)


def lamb(w: Tensor, g: Tensor, lr: float, wd: float) -> Tensor:
    update = g / (g.abs() + EPS) + wd * w
    norms = w.norm(), update.norm()
    ratio = norms[0] / norms[1] if wd and norms[0] > 0 and norms[1] > 0 else 1.0
    return w - lr * ratio * update


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("first_step", [adamw, sgd, lamb])
@pytest.mark.parametrize("family", NETS)
def test_one_step_moves_every_parameter_by_its_own_rate(
    family: str, first_step: Callable[..., Tensor], layer_decay: float | None
) -> None:
    net = NETS[family]()
    config = ClassifierOptimConfig(
        name=first_step.__name__,  # type: ignore[arg-type]
        weight_decay=WEIGHT_DECAY,
        layer_decay=layer_decay,
    )
    optimizer = config.build(net, CPU)
    set_learning_rate(optimizer, LR)
    generator = torch.Generator().manual_seed(1)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        # Of a norm far beyond 1: nothing may clip without being asked.
        parameter.grad = 100 * torch.randn(parameter.shape, generator=generator)
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    optimizer.step()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales = set()
    for name, parameter in net.named_parameters():
        scale, decay = groups[id(parameter)]["lr_scale"], groups[id(parameter)]["weight_decay"]
        expected = first_step(before[name], gradients[name], LR * scale, decay)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(parameter, before[name]), name
        scales.add(scale)
    assert len(scales) == (1 if layer_decay is None else optimizer.param_groups[-1]["layer"] + 1)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_no_step_is_taken_before_a_rate_is_set(name: Any) -> None:
    net = NETS["vit"]()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = ClassifierOptimConfig(name=name).build(net, CPU)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_groups_without_a_scale_are_refused_a_rate() -> None:
    # A rate that silently ignores layer decay is what this guards against.
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=1.0)
    with pytest.raises(KeyError, match="lr_scale"):
        set_learning_rate(optimizer, 0.1)


def test_the_defaults_are_maes_fine_tuning_settings() -> None:
    config = ClassifierOptimConfig()
    optimizer = config.build(nn.Linear(2, 2), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert (config.weight_decay, config.clip_grad, config.ema, config.layer_decay) == (0.05, None, None, None)
    schedule = config.learning_rates(1024)
    assert schedule(config.warmup_share) == pytest.approx(2e-3)
    assert schedule(1.0) == pytest.approx(1e-6)
    assert schedule(0.0) == 0
    assert config.warmup_share == 5 / 100


def test_settings_reach_the_optimizer() -> None:
    net = nn.Linear(2, 2)
    for name in ("adamw", "lamb"):
        config = ClassifierOptimConfig(name=name, betas=(0.8, 0.95), eps=1e-6)  # type: ignore[arg-type]
        for group in config.build(net, CPU).param_groups:
            assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    for group in ClassifierOptimConfig(name="sgd", momentum=0.7).build(net, CPU).param_groups:
        assert (group["momentum"], group["nesterov"]) == (0.7, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamm"}, "'adamm' is not an optimizer of timm; close names: adam, radam, nadam"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"ema": 1.0}, "ema"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip_grad": 0.0}, "clip_grad"),
        ({"lr": 1e-3}, "lr"),
        ({"momentum": 0.8}, "momentum is 0.8, but adamw has none; it reads betas and eps"),
        ({"name": "sgd", "eps": 1e-6}, "eps is 1e-06, but sgd has none; it reads momentum"),
        ({"name": "sgd", "betas": (0.8, 0.9)}, r"betas is \(0.8, 0.9\), but sgd has none"),
        ({"ema_warmup": True}, "ema_warmup is true, but ema is null"),
    ],
)
def test_a_setting_that_is_out_of_range_or_read_by_nobody_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ClassifierOptimConfig(**settings)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_a_resolved_recipe_reads_back(name: Any) -> None:
    config = ClassifierOptimConfig(name=name, ema=0.99, ema_warmup=True, layer_decay=0.65)
    assert ClassifierOptimConfig(**config.model_dump()) == config
