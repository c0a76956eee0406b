"""The holdout: part of each class, keyed by the images' numbers."""

from __future__ import annotations

import pytest
import torch

from etpp_ssl.config import UserError
from etpp_ssl.evaluation.base import split_holdout, stratified_holdout
from etpp_ssl.evaluation.features import Features

LABELS = torch.tensor([0] * 40 + [1] * 11 + [3] * 2 + [4])
INDICES = torch.arange(len(LABELS)) * 3 + 1


def test_it_takes_a_share_of_each_class_and_never_all_of_one() -> None:
    held_out = stratified_holdout(LABELS, INDICES, 0.25, seed=0)
    assert [int(held_out[label == LABELS].sum()) for label in (0, 1, 3, 4)] == [10, 3, 1, 0]
    most = stratified_holdout(LABELS, INDICES, 0.99, seed=0)
    assert [int((~most)[label == LABELS].sum()) for label in (0, 1, 3, 4)] == [1, 1, 1, 1]


def test_it_is_a_function_of_the_seed_and_the_images_numbers_not_of_their_order() -> None:
    held_out = stratified_holdout(LABELS, INDICES, 0.25, seed=0)
    assert torch.equal(held_out, stratified_holdout(LABELS, INDICES, 0.25, seed=0))
    assert not torch.equal(held_out, stratified_holdout(LABELS, INDICES, 0.25, seed=1))
    shuffled = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    again = stratified_holdout(LABELS[shuffled], INDICES[shuffled], 0.25, seed=0)
    assert torch.equal(again, held_out[shuffled])


def test_an_unreadable_image_moves_at_most_one_other_of_its_class() -> None:
    held_out = set(INDICES[stratified_holdout(LABELS, INDICES, 0.25, seed=0)].tolist())
    for left_out in range(0, len(LABELS), 5):
        rest = torch.arange(len(LABELS)) != left_out
        again = INDICES[rest][stratified_holdout(LABELS[rest], INDICES[rest], 0.25, seed=0)].tolist()
        assert len(held_out ^ set(again)) <= 2


def test_every_image_is_as_likely_as_another() -> None:
    labels, indices = torch.zeros(10, dtype=torch.int64), torch.arange(10)
    count = sum(stratified_holdout(labels, indices, 0.3, seed=seed).int() for seed in range(400))
    # 120 expected, with a standard deviation of 9.
    assert count.sum() == 1200
    assert count.min() > 84
    assert count.max() < 156


def test_the_parts_are_the_whole_and_none_is_empty() -> None:
    training = Features(torch.randn(len(LABELS), 4), LABELS, INDICES)
    rest, holdout = split_holdout(training, 0.1, seed=2)
    assert sorted([*rest.indices.tolist(), *holdout.indices.tolist()]) == INDICES.tolist()
    for part in (rest, holdout):
        rows = (part.indices - 1) // 3
        assert torch.equal(part.labels, LABELS[rows])
        assert torch.equal(part.features, training.features[rows])
    one_each = Features(torch.randn(3, 4), torch.arange(3), torch.arange(3))
    with pytest.raises(UserError, match=r"probe\.holdout_share 0\.1 of the 3 training images holds out none"):
        split_holdout(one_each, 0.1, seed=0)
