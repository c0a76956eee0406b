"""Every optimizer by name: it learns, resumes in the same bits, and costs what is planned; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from timm.optim import get_optimizer_info, list_optimizers
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.files import save_tensors
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.optim.optimizers import ClassifierOptimConfig, OptimConfig, OptimizerConfig
from etpp_ssl.optim.registry import MUON, keys_of, refusal
from etpp_ssl.optim.schedules import set_learning_rate
from etpp_ssl.train.checkpoint import load_optimizer_tensors, optimizer_tensors

CPU = torch.device("cpu")
HERE = [
    name
    for name in list_optimizers()
    if refusal(name) is None and not isinstance(get_optimizer_info(name).opt_class, str)
]
REFUSED = [name for name in list_optimizers() if refusal(name) is not None]


def small_model(seed: int = 0) -> MaskedAutoencoder:
    settings: dict[str, Any] = {
        "name": "vit",
        "patch_size": (4, 6),
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "pos_embed": "learned",
        "decoder": {"embed_dim": 8, "depth": 1, "num_heads": 2},
    }
    torch.manual_seed(seed)
    return ModelConfig(**settings).build(image_size=(16, 30), in_chans=3, num_values=72)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Take steps whose gradients follow from their numbers."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 1e-3 * (number % 3))
        optimizer.step()


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("name", HERE)
def test_it_learns_and_resumes_from_a_file_in_the_same_bits(name: str, tmp_path: Path) -> None:
    config = OptimConfig(name=name)
    assert OptimConfig.model_validate_json(config.model_dump_json(), strict=True) == config
    net, draws = small_model(), torch.random.get_rng_state()
    optimizer = config.build(net, CPU)
    start = values(net)
    steps(net, optimizer, range(1))
    # A rate of 0 moves nothing: a budget in hours measures its speed with it.
    assert all(torch.equal(value, start[key]) for key, value in values(net).items())
    steps(net, optimizer, range(1, 4))
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, start[name])]
    assert len(moved) == len(list(net.parameters()))
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert torch.equal(draws, torch.random.get_rng_state())

    tensors = {key: value.contiguous() for key, value in optimizer_tensors(net, optimizer).items()}
    save_tensors(tensors, tmp_path / "state.safetensors")
    resumed = small_model(seed=1)
    resumed.load_state_dict(net.state_dict())
    other = config.build(resumed, CPU)
    load_optimizer_tensors(resumed, other, load_file(tmp_path / "state.safetensors"))
    types = [{k: type(v) for k, v in optimizer.state[p].items()} for p in net.parameters()]
    assert types == [{k: type(v) for k, v in other.state[p].items()} for p in resumed.parameters()]
    for one, by in ((net, optimizer), (resumed, other)):
        steps(one, by, range(4, 8))
    assert all(torch.equal(value, values(resumed)[key]) for key, value in values(net).items())


@pytest.mark.parametrize("name", HERE)
def test_what_is_planned_is_what_it_keeps(name: str) -> None:
    net, config = small_model(), OptimConfig(name=name)
    optimizer = config.build(net, CPU)
    steps(net, optimizer, range(2))
    kept = sum(
        value.numel() * value.element_size()
        for slots in optimizer.state.values()
        for value in slots.values()
        if isinstance(value, Tensor)
    )
    cost = config.cost(net.to("meta"))
    if name in ("adamp", "cadamp", "novograd", "novogradw", "sgdp", "csgdp"):
        # They read a number while they step, so theirs is an estimate from above.
        assert kept <= 1.01 * cost.state_bytes
    else:
        assert cost.state_bytes == kept
    assert (cost.flops > 0) == (name in MUON)


def test_newton_schulz_steps_are_counted() -> None:
    # Five times three products of an (n, m) matrix, n <= m: n n m, n n n and n n m multiply-adds.
    net = small_model()
    shapes = [
        sorted(parameter.shape)
        for block in net.transformer_blocks
        for parameter in block.parameters()
        if parameter.ndim == 2
    ]
    expected = sum(5 * 2 * (2 * n * n * m + n**3) for n, m in shapes)
    assert OptimConfig(name="muon").cost(net).flops == expected


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_it_is_fused_where_torch_has_it(name: str) -> None:
    assert OptimConfig(name=name).build(small_model(), CPU).defaults["fused"]


def test_defaults_are_the_optimizers_own_unless_they_are_ours() -> None:
    # timm's factory gives Muon a momentum of 0.9; its class has 0.95, as Muon's authors.
    muon = OptimConfig(name="nmuon").build(small_model(), CPU)
    assert {(g["momentum"], g["nesterov"], g["betas"], g["eps"]) for g in muon.param_groups} == {
        (0.95, True, (0.9, 0.95), 1e-7)
    }
    assert OptimConfig(name="lion").betas == (0.9, 0.99)
    assert OptimConfig(name="lion", betas=(0.8, 0.9)).betas == (0.8, 0.9)
    assert OptimConfig(name="rmsprop").momentum == 0.9
    assert OptimConfig().betas == (0.9, 0.95)
    assert ClassifierOptimConfig(name="lamb").betas == (0.9, 0.999)
    assert all(OptimConfig(name=name).clip_grad is None for name in ("lamb", "muon"))
    for name in ("lamb", "lambw", "adan"):
        assert not OptimConfig(name=name).build(small_model(), CPU).defaults.get("max_grad_norm")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_resume_or_start_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"'{name}' is refused: it "):
        OptimConfig(name=name)


@pytest.mark.parametrize("config", [OptimConfig, ClassifierOptimConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "muonn"}, "'muonn' is not an optimizer of timm; close names: muon, nmuon, adamuon"),
        ({"name": "zzz"}, "'zzz' is not an optimizer of timm; close names: adamw, muon, lion, sgd"),
        ({"name": "lion", "eps": 1e-6}, "eps is 1e-06, but lion has none; it reads betas"),
        ({"name": "lion", "betas": (0.9, 0.9, 0.9)}, r"lion has 2 of them"),
        ({"name": "adan", "betas": (0.9, 0.9)}, r"betas is \(0.9, 0.9\), but adan has 3 of them"),
        ({"fallback_lr_scale": 0.5}, "fallback_lr_scale is 0.5, but adamw has none; it reads betas and eps"),
        ({"cooldown": 0.2}, "cooldown is 0.2, but the schedule cosine has none: set schedule=wsd"),
        ({"schedule": "linear", "cooldown_shape": "linear"}, "cooldown_shape is linear, but the sched"),
        ({"schedule": "wsd", "warmup_share": 0.5, "cooldown": 0.6}, "0.5 and cooldown 0.6 are more than the"),
        ({"schedule": "wsd", "cooldown": 1.0}, "cooldown"),
    ],
)  # fmt: skip
def test_a_key_that_nobody_reads_is_refused(
    config: type[OptimizerConfig], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**settings)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimConfig(name="bnbadamw8bit", betas=(0.9, 0.99))
    monkeypatch.setattr("etpp_ssl.optim.registry.find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"optim\.name bnbadamw8bit needs the package bitsandbytes, which"):
        config.build(small_model(), CPU)
    monkeypatch.setattr("etpp_ssl.optim.registry.find_spec", lambda package: package)
    with pytest.raises(UserError, match=r"optim\.name bnbadamw8bit is for GPUs, but this run is on cpu"):
        config.build(small_model(), CPU)


def test_what_timm_calls_a_key_is_what_it_reads() -> None:
    assert {name: set(keys_of(name)) for name in ("adamw", "lion", "sgd", "muon", "adafactor")} == {
        "adamw": {"betas", "eps"},
        "lion": {"betas"},
        "sgd": {"momentum"},
        "muon": {"betas", "eps", "momentum", "fallback_lr_scale"},
        "adafactor": {"eps"},
    }
