"""Low-rank adapters: their definition, where they are put, how they start, and that they can be merged."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from classifier_families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import UserError
from etpp_ssl.model.classifier import Classifier, ClassifierConfig
from etpp_ssl.model.lora import LoraLinear, add_adapters, layers_to_adapt, merged, plain_tensors
from etpp_ssl.randomness import freshly_initialised

SIZE = (32, 48)
VIT: dict[str, Any] = {"name": "vit", "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def make(seed: int = 0, **settings: Any) -> Classifier:
    config = ClassifierConfig(**{**VIT, **settings})
    return freshly_initialised(0, lambda: config.build(image_size=SIZE, in_chans=3, num_classes=5, seed=seed))


def learned(model: Classifier) -> Classifier:
    """As after training: B is not zero."""
    generator = torch.Generator().manual_seed(2)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            nn.init.normal_(layer.lora_b, std=0.3, generator=generator)
    return model


def images() -> Tensor:
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 1, 5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_its_definition_and_learns_its_adapter_alone(
    shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, bias=bias)
    add_adapters({"layer": layer}, rank=3, alpha=4.5, seed=1)
    assert isinstance(layer, LoraLinear)
    layer.lora_b.data.normal_()
    x = torch.randn(shape)
    weight = layer.weight + 4.5 / 3 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    wanted = torch.autograd.grad(F.linear(x, weight).square().sum(), [layer.lora_a, layer.lora_b])
    layer.bias = None
    layer(x).square().sum().backward()
    torch.testing.assert_close((layer.lora_a.grad, layer.lora_b.grad), wanted, rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_the_start_is_the_unadapted_network_to_the_bit(training: bool, half: bool) -> None:
    plain, adapted = (
        make().train(training),
        make(train="lora", lora_layers="all", lora_rank=4).train(training),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert torch.equal(plain(images()), adapted(images()))
    tensors = plain_tensors(adapted)
    assert tensors.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, tensors[name]) for name, value in plain.state_dict().items())


def test_the_first_factor_follows_the_seed_and_the_layer_alone() -> None:
    def factors(seed: int) -> list[Tensor]:
        model = make(seed, train="lora")
        return [layer.lora_a.detach() for layer in model.modules() if isinstance(layer, LoraLinear)]

    first = factors(1)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, factors(1)))
    assert not any(map(torch.equal, first, factors(2)))
    assert len(first) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    # Uniform: as wide as it may be, and with that variance.
    values = torch.cat([a.flatten() for a in first]) * 16**0.5
    assert 0.95 < float(values.abs().max()) <= 1
    assert float(values.var()) == pytest.approx(1 / 3, rel=0.15)


def test_merged_weights_are_the_sum_rounded_once_and_load_in_stock_timm() -> None:
    model = learned(make(train="lora", lora_layers="all", lora_rank=3, lora_alpha=5)).eval()
    tensors = merged(model.net.state_dict(), "test")
    layer = model.net.blocks[1].mlp.fc2
    exact = layer.weight.double() + 5 / 3 * (layer.lora_b.double() @ layer.lora_a.double())
    assert torch.equal(tensors["blocks.1.mlp.fc2.weight"], exact.float())
    architecture, args = ClassifierConfig(**VIT).timm_args(SIZE, 3, 5)
    stock = timm.create_model(architecture, **args).eval()
    stock.load_state_dict(tensors)
    with torch.no_grad():
        ours, theirs = model(images()), stock(images())
    assert (ours - make().eval()(images())).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 2e-6 * ours.abs().max()


ATTENTION = {
    "deit": {"attn.qkv", "attn.proj"},
    "swin": {"attn.qkv", "attn.proj"},
    "pvt": {"attn.q", "attn.kv", "attn.proj"},
    "cswin": {"qkv", "proj"},
    "caformer": {"token_mixer.qkv", "token_mixer.proj"},
}
OTHERS = {"swin": {"downsample.reduction"}}


@pytest.mark.parametrize("family", ATTENTION)
def test_the_layers_of_the_attention_are_found_in_every_family(family: str) -> None:
    net = (
        ClassifierConfig(**FAMILIES[family]).build(image_size=(64, 64), in_chans=3, num_classes=2, seed=0).net
    )
    heads = [net.get_classifier()]

    def kinds(which: Any) -> set[str]:
        found = layers_to_adapt(net, which, heads)
        return {".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in found}

    assert kinds("attention") == ATTENTION[family]
    mlp = {"mlp.fc1", "mlp.fc2"}
    assert kinds("all") == ATTENTION[family] | mlp | OTHERS.get(family, set())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {**FAMILIES["resnet"]},
            r"resnet50 has no linear layer beside its head: norms, last_N and head can train it",
        ),
        (
            {**FAMILIES["convnext"]},
            r"convnext_tiny has no linear layers of attention; model.lora_layers=all takes its 10 others",
        ),
        (
            {"name": "beit_base_patch16_224", "args": {"depth": 1, "embed_dim": 24, "num_heads": 2}},
            r"reads the weights of blocks.0.attn.qkv itself, past an adapter: norms, last_N and head",
        ),
        (
            {**VIT, "lora_rank": 17},
            r"lora_rank is 17, but blocks.0.attn.qkv has 16 inputs and 48 outputs: .* 16",
        ),
    ],
)
def test_networks_that_adapters_do_not_suit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    config = ClassifierConfig(**settings, train="lora")
    with pytest.raises(UserError, match=sentence):
        config.build(image_size=(64, 64), in_chans=3, num_classes=2, seed=0)


@pytest.mark.parametrize(
    "broken",
    [
        {"lora_b": None},
        {"weight": None},
        {"lora_b": torch.zeros(5, 2)},
        {"lora_a": torch.zeros(3, 6)},
        {"lora_a": torch.zeros(())},
        {"lora_a": torch.zeros(0, 7), "lora_b": torch.zeros(5, 0)},
        {"lora_alpha": torch.zeros(2)},
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(broken: dict[str, Tensor | None]) -> None:
    whole = {
        "weight": torch.zeros(5, 7),
        "lora_a": torch.zeros(3, 7),
        "lora_b": torch.zeros(5, 3),
        "lora_alpha": torch.ones(()),
    }
    tensors = {f"net.fc.{name}": value for name, value in {**whole, **broken}.items() if value is not None}
    with pytest.raises(UserError, match=r"a file has an adapter 'net.fc' that does not fit its layer"):
        merged(tensors, "a file")
