"""Heads side by side: against torch's own layers, losses and optimizer, one at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from etpp_ssl.evaluation.linear_cached import (
    Heads,
    Standardise,
    accuracies,
    cross_entropy_gradient,
    train_heads,
)
from etpp_ssl.randomness import keyed_torch

SETTINGS = [(0.5, 0.0), (0.05, 0.1), (2.0, 1e-3)]
EPOCHS, BATCH, CLASSES, SEED = 3, 16, 4, 5


def data(num: int = 45, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (num,), generator=generator)
    return torch.randn(num, width, generator=generator) + labels[:, None] * torch.linspace(
        -1, 1, width
    ), labels


def trained(features: Tensor, labels: Tensor, settings: list[tuple[float, float]], seed: int = SEED) -> Heads:
    return train_heads(
        features,
        labels,
        num_classes=CLASSES,
        settings=settings,
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=seed,
    )


def plain_head(features: Tensor, labels: Tensor, base_lr: float, weight_decay: float) -> nn.Linear:
    head = nn.Linear(features.shape[1], CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    num_steps, step = EPOCHS * math.ceil(len(features) / BATCH), 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(features), generator=keyed_torch(SEED, "linear-cached", epoch))
        for rows in order.split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = base_lr * BATCH / 256 * (1 + math.cos(math.pi * step / num_steps)) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
            step += 1
    return head


def test_each_head_of_a_sweep_is_the_head_that_torch_trains_alone() -> None:
    features, labels = data()
    heads = trained(features, labels, SETTINGS)
    for number, (base_lr, weight_decay) in enumerate(SETTINGS):
        plain = plain_head(features, labels, base_lr, weight_decay)
        assert plain.weight.abs().max() > 0.01
        torch.testing.assert_close(heads.weight_DSC[:, number].T, plain.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heads.bias_SC[number], plain.bias, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heads.logits(features)[:, number], plain(features), rtol=1e-4, atol=1e-5)


def test_a_head_alone_is_its_slice_of_the_sweep() -> None:
    features, labels = data()
    heads = trained(features, labels, SETTINGS)
    for number, setting in enumerate(SETTINGS):
        alone = trained(features, labels, [setting])
        torch.testing.assert_close(alone.weight_DSC[:, 0], heads.weight_DSC[:, number], rtol=1e-5, atol=1e-7)


def test_training_is_bitwise_repeatable_and_keyed_by_the_seed() -> None:
    features, labels = data()
    first, again, other = (trained(features, labels, SETTINGS, seed) for seed in (5, 5, 6))
    assert torch.equal(first.weight_DSC, again.weight_DSC)
    assert torch.equal(first.bias_SC, again.bias_SC)
    assert not torch.equal(first.weight_DSC, other.weight_DSC)


def test_the_gradient_is_autograds() -> None:
    logits = torch.randn(7, 3, CLASSES, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.arange(7) % CLASSES
    sum(nn.functional.cross_entropy(logits[:, head], labels) for head in range(3)).backward()
    torch.testing.assert_close(cross_entropy_gradient(logits.detach(), labels), logits.grad)


def test_standardised_features_have_mean_zero_and_variance_one() -> None:
    features = torch.randn(50, 4) * torch.tensor([1.0, 100.0, 1e-2, 0.0]) + 7
    scale = Standardise.of(features)
    standard = scale(features)
    torch.testing.assert_close(standard.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard[:, :2].var(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert standard.isfinite().all()
    norm = nn.BatchNorm1d(4, affine=False, eps=1e-6)
    torch.testing.assert_close(norm(features), standard, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("top", [1, 3])
def test_accuracy_is_a_plain_count(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = data(31)
    heads = trained(features, labels, SETTINGS)
    plain = [0] * len(SETTINGS)
    for number in range(len(SETTINGS)):
        for x, label in zip(features, labels.tolist(), strict=True):
            logits = (heads.weight_DSC[:, number].T @ x + heads.bias_SC[number]).tolist()
            plain[number] += label in sorted(range(CLASSES), key=lambda c: -logits[c])[:top]
    expected = [100 * count / 31 for count in plain]
    for values in (1, 40, 1 << 20):
        monkeypatch.setattr("etpp_ssl.evaluation.linear_cached.CHUNK_VALUES", values)
        assert accuracies(heads, features, labels, top).tolist() == pytest.approx(expected)


def test_a_head_that_diverged_has_none_right() -> None:
    features, labels = data(9)
    weight = torch.zeros(6, 2, CLASSES)
    weight[:, 0] = math.nan
    bias = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, CLASSES)
    share = accuracies(Heads(weight, bias), features, labels, 1)
    assert share[0] == 0
    assert share[1] == 100 * (labels == 0).double().mean()
