"""What every family of classifiers must do under a curriculum; a new one is a line in classifier_families."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from classifier_families import FAMILIES
from torch import Tensor, nn

from etpp_ssl.model.classifier import Classifier, ClassifierConfig
from etpp_ssl.model.timm_net import drop_path_rates

BASE = (128, 128)
BANDWIDTHS = [(64, 64), (96, 96), (96, 160), (128, 64)]
CLASSES, SEED, RATE = 5, 3, 0.4


BLOCK_CLASSES = (
    "Bottleneck",
    "ConvNeXtBlock",
    "Block",
    "EvaBlock",
    "SwinTransformerBlock",
    "MetaFormerBlock",
    "CSWinBlock",
)
"""timm's, below any of our own that take their place."""
each_family = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str) -> ClassifierConfig:
    return ClassifierConfig(**FAMILIES[family], drop_path=RATE)


@cache
def build(family: str) -> Classifier:
    torch.manual_seed(0)
    return config_of(family).build(image_size=BASE, in_chans=3, num_classes=CLASSES, seed=SEED)


def stock(family: str) -> nn.Module:
    architecture, args = config_of(family).timm_args(BASE, 3, CLASSES)
    assert not [key for key in args if "dynamic" in key or "strict" in key]
    torch.manual_seed(0)
    net: nn.Module = timm.create_model(architecture, **args)
    return net


def shaken(family: str) -> Classifier:
    """With no parameter at the special value of its initialisation, such as a zero that hides others."""
    torch.manual_seed(0)
    model = config_of(family).build(image_size=BASE, in_chans=3, num_classes=CLASSES, seed=SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def images_at(size: tuple[int, int], num: int = 4) -> Tensor:
    return torch.randn(num, 3, *size, generator=torch.Generator().manual_seed(size[0] + size[1]))


@each_family
def test_parameters_are_stock_timms_and_so_is_the_result_at_base_size(family: str) -> None:
    ours, theirs = build(family).net.eval(), stock(family).eval()
    expected = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    with torch.no_grad():
        images = images_at(BASE)
        assert torch.equal(build(family).eval()(images), theirs(images))
        assert torch.equal(ours(images), theirs(images))


@each_family
@pytest.mark.parametrize("size", BANDWIDTHS)
@torch.no_grad()
def test_it_runs_at_other_sizes_which_leave_nothing_behind(family: str, size: tuple[int, int]) -> None:
    model = build(family).eval()
    logits = model(images_at(size))
    assert logits.shape == (4, CLASSES)
    assert logits.isfinite().all()
    before = model(images_at(BASE))
    model(images_at(size))
    assert torch.equal(model(images_at(BASE)), before)


@each_family
def test_the_gradient_reaches_every_parameter_at_a_small_bandwidth(family: str) -> None:
    model = shaken(family).train()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    # Enough samples that none of the blocks is dropped for all of them.
    logits = model(images_at((64, 96), num=24), torch.arange(24))
    (logits * torch.linspace(-1, 2, CLASSES)).sum().backward()
    dry = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dry
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


@each_family
@torch.no_grad()
def test_training_is_a_function_of_the_positions(family: str) -> None:
    model, images = shaken(family).train(), images_at((64, 64))
    positions = torch.arange(4) + 17
    first = model(images, positions)
    torch.rand(3)
    assert torch.equal(model(images, positions), first)
    assert not torch.equal(model(images, positions + 4), first)


@each_family
def test_drop_path_grows_linearly_over_the_blocks(family: str) -> None:
    net = build(family).net
    blocks = [
        name
        for name, module in net.named_modules()
        if any(base.__name__ in BLOCK_CLASSES for base in type(module).__mro__)
    ]
    rates = drop_path_rates(net)
    for index, block in enumerate(blocks):
        # timm has no module at all where the rate is zero.
        found = [rate for name, rate in rates.items() if name.startswith(f"{block}.")] or [0.0]
        expected = RATE * index / (len(blocks) - 1)
        assert found == pytest.approx([expected] * len(found), rel=1e-6)
    assert len(blocks) == sum(depths_of(family))
    assert build(family).drop_path_keys.num_modules == sum(rate > 0 for rate in rates.values()) > 0


def depths_of(family: str) -> list[int]:
    asked = FAMILIES[family]
    depths = [value for key, value in asked.get("args", {}).items() if key in ("depths", "layers")]
    if depths:
        return list(depths[0])
    return [asked["depth"]] if "depth" in asked else [1, 1, 2, 1]


@each_family
def test_the_check_before_a_run_passes(family: str) -> None:
    config = config_of(family)
    step = config.multiple(BASE, 3)
    assert step == {"deit": (16, 16), "dinov3": (16, 16), "vit_of_explicit_dimensions": (16, 8)}.get(
        family, (32, 32)
    )
    config.check(image_size=BASE, in_chans=3, bandwidths=BANDWIDTHS)


@each_family
def test_a_check_draws_nothing_from_the_generator(family: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config_of(family).check(image_size=BASE, in_chans=3, bandwidths=BANDWIDTHS[:1])
    assert torch.equal(torch.get_rng_state(), state)
