"""Uneven classes in the loss: against torch's weighted cross-entropy and the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from etpp_ssl.data.augmentation import AugmentConfig, Mixup, smoothed
from etpp_ssl.data.uneven import Balance, UnevenClasses, class_shares
from etpp_ssl.tasks.classify import soft_target_cross_entropy

COUNTS = (50, 0, 2, 1, 11)
KINDS: list[Balance] = ["none", "sqrt", "uniform"]


def test_shares_are_numbers_of_images_their_roots_or_all_the_same() -> None:
    assert class_shares(COUNTS, "none") == list(COUNTS)
    assert class_shares(COUNTS, "uniform") == [1, 0, 1, 1, 1]
    roots = class_shares(COUNTS, "sqrt")
    assert [root / roots[3] for root in roots] == pytest.approx([math.sqrt(n) for n in COUNTS], rel=1e-6)


@pytest.mark.parametrize("balance", KINDS)
@pytest.mark.parametrize("weights", KINDS)
def test_weights_are_one_on_average_over_what_is_drawn(balance: Balance, weights: Balance) -> None:
    uneven = UnevenClasses(COUNTS, balance, weights, 0.1)
    assert float(uneven.drawn_K.sum()) == pytest.approx(1)
    assert float((uneven.drawn_K * uneven.weights_K).sum()) == pytest.approx(1)
    assert float(uneven.frequencies_K.sum()) == pytest.approx(1)
    assert uneven.weights_K.isfinite().all()
    assert uneven.log_prior_K.isfinite().all()
    if weights == balance == "none":
        assert uneven.weights_K.tolist() == [1.0] * 5
    if weights == "uniform":
        weighted = (uneven.drawn_K * uneven.weights_K).tolist()
        assert weighted == pytest.approx([0.25, 0, 0.25, 0.25, 0.25])


def test_without_smoothing_and_mixing_the_loss_is_torchs_weighted_cross_entropy() -> None:
    logits, labels = torch.randn(9, 5), torch.tensor([0, 0, 4, 3, 0, 2, 4, 0, 0])
    weights_K = UnevenClasses(COUNTS, "none", "sqrt", 0.0).weights_K.float()
    _, targets = Mixup(0, 0, 0.0, 5, 1, weights_K)(torch.zeros(9, 3, 4, 4), labels, 0)
    expected = F.cross_entropy(logits, labels, weights_K, reduction="none").mean()
    torch.testing.assert_close(soft_target_cross_entropy(logits, targets), expected)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_of_mixed_images_each_part_has_the_weight_of_its_own_class(mixup: float, cutmix: float) -> None:
    logits, labels = torch.randn(7, 5), torch.tensor([0, 4, 3, 0, 2, 4, 0])
    weights_K = UnevenClasses(COUNTS, "none", "uniform", 0.1).weights_K.float()
    mix = Mixup(mixup, cutmix, 0.1, 5, 1, weights_K)
    _, targets = mix(torch.zeros(7, 3, 8, 6), labels, 41)
    share = mix.draw(41, 8, 6).weight
    assert 0 < share < 1
    own, partners = (
        weights_K[which] * F.cross_entropy(logits, which, label_smoothing=0.1, reduction="none")
        for which in (labels, labels.flip(0))
    )
    expected = (share * own + (1 - share) * partners).mean()
    torch.testing.assert_close(soft_target_cross_entropy(logits, targets), expected)


def test_the_frequencies_are_the_mean_of_the_targets() -> None:
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS))
    for weights in KINDS:
        uneven = AugmentConfig(class_weights=weights).uneven(COUNTS)
        targets = smoothed(labels, 5, 0.1) * uneven.weights_K[labels, None]
        torch.testing.assert_close(uneven.frequencies_K, targets.mean(0).double(), rtol=1e-5, atol=0)
