"""Cross-entropy against probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F

from etpp_ssl.tasks.classify import soft_target_cross_entropy


def sample(count: int = 5, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(count, classes, generator=generator)
    return logits, torch.rand(count, classes, generator=generator).softmax(1)


def test_it_is_the_definition() -> None:
    logits, targets = sample()
    total = 0.0
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        total -= sum(p * (value - log_sum) for value, p in zip(row, wanted, strict=True))
    found = soft_target_cross_entropy(logits, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(total / len(logits), rel=1e-6)


def test_it_is_timms_and_torchs() -> None:
    logits, targets = sample()
    torch.testing.assert_close(
        soft_target_cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets)
    )
    labels = torch.tensor([0, 6, 3, 3, 1])
    one_hot = F.one_hot(labels, 7).float()
    torch.testing.assert_close(soft_target_cross_entropy(logits, one_hot), F.cross_entropy(logits, labels))


def test_half_precision_is_computed_in_float32() -> None:
    logits, targets = sample(classes=1000)
    half = (logits + 60).bfloat16()
    expected = soft_target_cross_entropy(half.float(), targets)
    assert torch.equal(soft_target_cross_entropy(half, targets), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_target_cross_entropy(half, targets), expected)


def test_its_gradient_is_softmax_minus_target() -> None:
    logits, targets = sample()
    logits.requires_grad_()
    soft_target_cross_entropy(logits, targets).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - targets) / len(logits))
