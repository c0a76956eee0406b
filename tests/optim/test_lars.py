"""LARS against its formula, against timm's where the two agree, and through a checkpoint."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.optim import Lars as TimmLars
from torch import Tensor, nn

from etpp_ssl.optim.lars import Lars
from etpp_ssl.train.checkpoint import load_optimizer_tensors, optimizer_tensors


def small_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (11,), generator=generator)
    net.zero_grad()
    nn.functional.cross_entropy(net(inputs), targets).backward()


def plain_step(
    weights: list[list[float]], grads: list[list[float]], velocity: list[list[float]], dims: list[int],
    *, lr: float, momentum: float, weight_decay: float, trust: float,
) -> None:  # fmt: skip
    """The update written out on lists of numbers."""
    for w, g, v, dim in zip(weights, grads, velocity, dims, strict=True):
        u = list(g)
        if dim > 1:
            u = [a + weight_decay * b for a, b in zip(g, w, strict=True)]
            w_norm, u_norm = math.hypot(*w), math.hypot(*u)
            if w_norm > 0 and u_norm > 0:
                u = [a * trust * w_norm / u_norm for a in u]
        for i, change in enumerate(u):
            v[i] = momentum * v[i] + change
            w[i] -= lr * v[i]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_equals_the_formula_over_twenty_steps(weight_decay: float) -> None:
    net = small_net()
    parameters = list(net.parameters())
    optimizer = Lars(parameters, momentum=0.8, weight_decay=weight_decay, trust_coefficient=0.01)
    weights = [parameter.flatten().tolist() for parameter in parameters]
    velocity = [[0.0] * len(w) for w in weights]
    for step in range(20):
        gradients(net, step)
        lr = 0.5 + 0.1 * step
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        assert all(torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=True))
        plain_step(
            weights, [g.flatten().tolist() for g in before], velocity, [p.ndim for p in parameters],
            lr=lr, momentum=0.8, weight_decay=weight_decay, trust=0.01,
        )  # fmt: skip
        for parameter, expected in zip(parameters, weights, strict=True):
            found = parameter.detach().flatten()
            torch.testing.assert_close(found, torch.tensor(expected).to(found), rtol=1e-6, atol=1e-9)


def test_without_decay_it_is_timms_with_only_the_matrices_always_adapted() -> None:
    net, other = small_net(), small_net()
    optimizer = Lars(net.parameters(), lr=0.7)
    matrices = [p for p in other.parameters() if p.ndim > 1]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "always_adapt": False}]
    timm = TimmLars(groups, lr=0.7, momentum=0.9, eps=0.0)
    start = [p.detach().clone() for p in net.parameters()]
    for step in range(20):
        gradients(net, step)
        gradients(other, step)
        optimizer.step()
        timm.step()
    for mine, theirs, old in zip(net.parameters(), other.parameters(), start, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
        assert not torch.equal(mine, old)


def test_where_a_norm_is_zero_the_step_is_plain() -> None:
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = Lars([weight], lr=2.0)
    weight.grad = torch.full_like(weight, 0.25)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full_like(weight, -0.5))
    still = nn.Parameter(torch.ones(2, 3))
    still.grad = torch.zeros(2, 3)
    Lars([still], lr=2.0).step()
    assert torch.equal(still.detach(), torch.ones(2, 3))


def test_its_state_survives_a_checkpoint_bitwise() -> None:
    def go(net: nn.Module, optimizer: Lars, steps: range) -> list[Tensor]:
        for step in steps:
            gradients(net, step)
            optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    whole = small_net()
    expected = go(whole, Lars(whole.parameters(), lr=0.7), range(9))
    cut = small_net()
    first = Lars(cut.parameters(), lr=0.7)
    go(cut, first, range(4))
    resumed = copy.deepcopy(cut)
    second = Lars(resumed.parameters(), lr=0.7)
    load_optimizer_tensors(resumed, second, optimizer_tensors(cut, first))
    found = go(resumed, second, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
