"""Keyed drop-path: timm's rates and scaling, and draws that depend on the sample alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etpp_ssl.config import UserError
from etpp_ssl.model.classifier import Classifier, ClassifierConfig
from etpp_ssl.model.timm_net import KeyedDropPath, drop_path_rates, key_drop_path
from etpp_ssl.randomness import keyed_words

TINY: dict[str, Any] = {
    "name": "vit",
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "drop_path": 0.6,
}


class Branches(nn.Module):
    """Two blocks whose one drop-path serves both of their branches."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drops = nn.ModuleList([DropPath(rate), DropPath(0.0), DropPath(rate)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([drop(x) for drop in self.drops for _ in range(2)], dim=1)


def make_classifier(**changes: Any) -> Classifier:
    torch.manual_seed(0)
    config = ClassifierConfig(**{**TINY, **changes})
    return config.build(image_size=(16, 24), in_chans=3, num_classes=5, seed=7)


def batch(num: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, 8, 16, generator=generator), torch.arange(num) + 1000


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_decisions_and_scaling_are_the_definition(rate: float) -> None:
    net = Branches(rate).train()
    keys = key_drop_path(net, seed=3)
    positions = torch.arange(-2, 4000, 7)
    keys.set_sample_ids(positions)
    factors = net(torch.ones(len(positions)))
    assert keys.num_modules == 2
    # Columns: module 0 and 1 at their first call, then both at their second.
    words = keyed_words(3, "drop_path", positions, 4)
    for place, column in {0: 0, 1: 2, 4: 1, 5: 3}.items():
        kept = torch.tensor([(int(word) & (2**63 - 1)) >= rate * 2**63 for word in words[:, column]])
        torch.testing.assert_close(factors[:, place], kept / (1 - rate))
    assert torch.equal(factors[:, 2:4], torch.ones(len(positions), 2))


def test_the_keep_rate_is_right_and_modules_calls_and_seeds_are_independent() -> None:
    num, rate = 20_000, 0.3
    decisions = []
    for seed in (0, 1):
        net = Branches(rate).train()
        key_drop_path(net, seed).set_sample_ids(torch.arange(num))
        factors = net(torch.ones(num))
        decisions.append((factors[:, [0, 1, 4, 5]] > 0).double())
    dropped = torch.cat(decisions, dim=1)
    sigma = (rate * (1 - rate) / num) ** 0.5
    assert ((dropped.mean(0) - (1 - rate)).abs() < 4 * sigma).all()
    correlations = torch.corrcoef(dropped.T) - torch.eye(8)
    assert correlations.abs().max() < 4 / num**0.5
    neighbours = torch.corrcoef(torch.stack([dropped[1:, 0], dropped[:-1, 0]]))[0, 1]
    assert abs(neighbours) < 4 / num**0.5


def test_a_samples_draws_do_not_depend_on_its_batch_or_on_the_generator() -> None:
    model = make_classifier().train()
    images, positions = batch()
    whole = model(images, positions)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for rows in ([0, 1, 2], [5, 3, 4], [2]):
        torch.testing.assert_close(model(images[rows], positions[rows]), whole[rows], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(model(images, positions + 1), whole, rtol=1e-3)


def test_evaluation_drops_nothing_and_needs_no_positions() -> None:
    model, without = make_classifier().eval(), make_classifier(drop_path=0.0).eval()
    images, positions = batch()
    assert torch.equal(model(images), without(images))
    assert torch.equal(model(images, positions), without(images))


def test_training_without_positions_or_with_too_few_is_an_error() -> None:
    model = make_classifier().train()
    images, positions = batch()
    model(images, positions)
    with pytest.raises(UserError, match="pass sample_ids_B"):
        model(images)
    with pytest.raises(UserError, match="6 rows for 5 sample_ids_B"):
        model(images, positions[:5])
    make_classifier(drop_path=0.0).train()(images)


def gradients(model: Classifier, *parts: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of a sum over batches whose forward passes all come before the one backward pass."""
    logits = [model(images, positions) for images, positions in parts]
    model.zero_grad()
    torch.cat(logits).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("together", [False, True])
def test_recomputed_blocks_draw_the_same_again(together: bool) -> None:
    images, positions = batch()
    halves = [(images[:3], positions[:3]), (images[3:], positions[3:])]
    parts = halves if together else halves[:1]
    expected = gradients(make_classifier().train(), *parts)
    recomputed = gradients(make_classifier(grad_checkpointing=True).train(), *parts)
    assert expected
    torch.testing.assert_close(recomputed, expected, rtol=1e-4, atol=1e-6)


def test_a_module_that_a_block_calls_twice_is_recomputed_right() -> None:
    net = Branches(0.5).train()
    key_drop_path(net, seed=0).set_sample_ids(torch.arange(50))
    scale = torch.ones(50, requires_grad=True)
    factors = checkpoint(net, scale.exp(), use_reentrant=False)
    factors.square().sum().backward()
    plain = torch.ones(50, requires_grad=True)
    net(plain.exp()).square().sum().backward()
    assert not torch.equal(factors[:, 0], factors[:, 1])
    torch.testing.assert_close(scale.grad, plain.grad)


class Reaching(nn.Module):
    """A block that calls a part of another module, whose own forward pass it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Identity(), DropPath(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.part[1](x), self.part[1](x)])


def test_calls_are_counted_anew_whoever_makes_them() -> None:
    net = Reaching().train()
    key_drop_path(net, seed=0).set_sample_ids(torch.arange(50))
    first = net(torch.ones(50))
    assert torch.equal(net(torch.ones(50)), first)
    assert not torch.equal(first[0], first[1])


def test_a_copy_has_keys_of_its_own() -> None:
    model = make_classifier().train()
    images, positions = batch()
    expected = model(images, positions)
    twin = copy.deepcopy(model)
    twin(images[:2], positions[:2] + 50)
    drops = [m for m in twin.modules() if isinstance(m, KeyedDropPath)]
    assert drops
    assert all(drop.keys is twin.drop_path_keys for drop in drops)
    assert len(model.drop_path_keys.words(0, 6)) == 6
    assert torch.equal(twin(images, positions), expected)


def test_every_active_module_of_a_network_is_keyed_once_and_in_order() -> None:
    net = timm.create_model("xcit_nano_12_p16_224", drop_path_rate=0.1)
    before = drop_path_rates(net)
    keys = key_drop_path(net, seed=0)
    active = [m for m in net.modules() if isinstance(m, DropPath) and m.drop_prob > 0]
    assert all(type(m) is KeyedDropPath for m in active)
    assert [m.number for m in active if isinstance(m, KeyedDropPath)] == list(range(keys.num_modules))
    assert drop_path_rates(net) == before


def test_half_precision_scales_as_timm_does() -> None:
    net = Branches(0.3).train()
    key_drop_path(net, seed=0).set_sample_ids(torch.arange(40))
    factors = net(torch.ones(40, 1, dtype=torch.bfloat16))
    assert factors.dtype is torch.bfloat16
    assert set(factors[:, 0].unique().tolist()) == {0.0, float(torch.ones(1).bfloat16().div_(0.7))}
