"""Mixup and CutMix: timm's batch mode, at a key, for odd batches too."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup
from torch import Tensor

from etpp_ssl.data.augmentation import Mixup, cut_box, smoothed
from etpp_ssl.randomness import keyed_numpy

SEED = 11
CLASSES = 7


def batch(count: int = 6, size: tuple[int, int] = (9, 14)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, *size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def mixer(mixup: float = 0.8, cutmix: float = 1.0, smoothing: float = 0.1, seed: int = SEED) -> Mixup:
    return Mixup(mixup, cutmix, smoothing, CLASSES, seed)


def timms(
    mixup: float, cutmix: float, smoothing: float, position: int, images: Tensor, labels: Tensor
) -> Any:
    """timm's Mixup, which draws from numpy's global generator: here it draws from the keyed one."""
    keyed = keyed_numpy(SEED, "mixup", position)
    # timm compares its first draw with `prob`, which is 1: we make no such draw.
    uniform = chain([0.0], iter(keyed.random, None))
    draws = SimpleNamespace(
        rand=lambda: next(uniform),
        beta=keyed.beta,
        randint=lambda low, high, size: keyed.integers(low, high),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_mixup, "np", SimpleNamespace(random=draws, sqrt=np.sqrt, clip=np.clip))
        return timm_mixup.Mixup(
            mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=CLASSES
        )(images.clone(), labels)


@pytest.mark.parametrize("size", [(9, 14), (16, 16), (1, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_it_is_timms(mixup: float, cutmix: float, smoothing: float, size: tuple[int, int]) -> None:
    images, labels = batch(size=size)
    ours = mixer(mixup, cutmix, smoothing)
    boxes = 0
    for position in range(40):
        found, targets = ours(images, labels, position)
        expected, expected_targets = timms(mixup, cutmix, smoothing, position, images, labels)
        assert torch.equal(found, expected)
        torch.testing.assert_close(targets, expected_targets, rtol=0, atol=1e-7)
        boxes += ours.draw(position, *size).box is not None
    assert boxes == (0 if not cutmix else 40 if not mixup else boxes)
    assert mixup == 0 or cutmix == 0 or 10 < boxes < 30


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", [(0.8, 0.0), (0.0, 1.0)])
def test_each_image_has_its_mirror_image_in_the_batch_as_partner(
    count: int, kind: tuple[float, float]
) -> None:
    images, labels = batch(count)
    ours = mixer(*kind)
    for position in range(10):
        mix = ours.draw(position, *images.shape[2:])
        found, targets = ours(images, labels, position)
        kept = torch.full(images.shape[2:], mix.weight)
        if mix.box is not None:
            top, bottom, left, right = mix.box
            kept.fill_(1.0)[top:bottom, left:right] = 0.0
            assert kept.mean() == pytest.approx(mix.weight)
        plain = smoothed(labels, CLASSES, 0.1)
        for row in range(count):
            partner = count - 1 - row
            torch.testing.assert_close(found[row], images[row] * kept + images[partner] * (1 - kept))
            mean = plain[row] * mix.weight + plain[partner] * (1 - mix.weight)
            torch.testing.assert_close(targets[row], mean)
            assert targets[row].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_both_only_the_labels_are_smoothed(smoothing: float) -> None:
    images, labels = batch(5)
    found, targets = mixer(0.0, 0.0, smoothing)(images, labels, 3)
    assert torch.equal(found, images)
    one_hot = torch.nn.functional.one_hot(labels, CLASSES)
    torch.testing.assert_close(targets, one_hot * (1 - smoothing) + smoothing / CLASSES)
    assert targets.dtype == torch.float32


def test_what_was_given_is_left_alone() -> None:
    images, labels = batch()
    before = images.clone(), labels.clone()
    for position in range(20):
        mixer()(images, labels, position)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_a_mix_is_a_function_of_seed_and_first_sample_id() -> None:
    wanted = [mixer().draw(position, 900, 1400) for position in range(50)]
    np.random.seed(0)
    torch.manual_seed(0)
    assert [mixer().draw(position, 900, 1400) for position in reversed(range(50))] == wanted[::-1]
    assert len(set(wanted)) == 50
    assert all(mixer(seed=12).draw(position, 900, 1400) != wanted[position] for position in range(50))


def test_weights_follow_the_beta_distribution() -> None:
    for alpha in (0.8, 2.0):
        weights = np.array([mixer(alpha, 0.0).draw(position, 9, 14).weight for position in range(3000)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(weights.mean() - 0.5) < 4 * (variance / 3000) ** 0.5
        assert weights.var() == pytest.approx(variance, rel=0.1)


def test_a_box_at_the_border_counts_for_what_lies_inside() -> None:
    inside = cut_box(0.75, 10, 10, 20, 20)
    assert inside.box == (5, 15, 5, 15)
    assert inside.weight == 0.75
    corner = cut_box(0.75, 0, 19, 20, 20)
    assert corner.box == (0, 5, 14, 20)
    assert corner.weight == 1 - 30 / 400
    assert cut_box(1.0, 3, 3, 20, 20).weight == 1
    assert cut_box(0.0, 10, 10, 20, 20) == (0.0, (0, 20, 0, 20))
