"""Ratios over compute, subsets to predict, and the sentences about impossible ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from etpp_ssl.config import UserError
from etpp_ssl.model.mae import ModelConfig
from etpp_ssl.model.mask_patterns import UniformMaskingConfig
from etpp_ssl.model.masking import (
    Masker,
    MaskRatioRamp,
    num_predicted,
    num_visible,
    predicted_ids,
    random_masking,
    removed_ids,
)


def make_masker(ratio: float | MaskRatioRamp = 0.75, predict: float | None = None) -> Masker:
    return Masker(UniformMaskingConfig(), ratio, predict, (4, 4), 0)


def test_a_ramp_is_linear_over_compute_and_exact_at_its_ends() -> None:
    masker = make_masker(MaskRatioRamp(start=0.6, end=0.75))
    assert masker.mask_ratio(0.0) == 0.6
    assert masker.mask_ratio(1.0) == 0.75
    assert masker.mask_ratio(0.5) == pytest.approx(0.675)
    visible = [masker.counts((40, 80), progress / 7).num_keep for progress in range(8)]
    assert visible == [80, 76, 71, 67, 63, 59, 54, 50]
    assert make_masker(MaskRatioRamp(start=0.9, end=0.5)).mask_ratio(0.25) == pytest.approx(0.8)


def test_the_mask_of_a_step_has_the_ratio_of_its_progress() -> None:
    masker = make_masker(MaskRatioRamp(start=0.5, end=0.75))
    for progress, num_keep in ((0.0, 12), (0.5, 9), (0.99, 6)):
        ids_keep, ids_predict = masker(torch.arange(3), (16, 24), progress)
        assert ids_keep.shape == (3, num_keep)
        assert ids_predict.shape == (3, 24 - num_keep)


def test_for_evaluation_it_takes_the_last_ratio_and_predicts_every_masked_patch() -> None:
    masker = make_masker(MaskRatioRamp(start=0.5, end=0.75), predict=0.25)
    mask = masker.everything(torch.arange(3), (16, 24))
    assert torch.equal(mask.ids_keep, random_masking(torch.arange(3), 24, 6, seed=0))
    assert torch.equal(mask.ids_predict, removed_ids(mask.ids_keep, 24))


def test_the_subset_is_uniform_over_the_masked_patches_and_grows_with_its_number() -> None:
    positions = torch.arange(4000)
    ids_keep = random_masking(positions, 20, 5, seed=0)
    removed = removed_ids(ids_keep, 20)
    subset = predicted_ids(positions, removed, 6, 20, seed=0)
    hits = torch.zeros(4000, 20).scatter(1, subset, 1.0)
    masked = torch.zeros(4000, 20).scatter(1, removed, 1.0)
    assert (hits <= masked).all()
    share = hits.sum(dim=0) / masked.sum(dim=0)
    assert (share - 0.4).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 3000)
    # What is predicted says nothing about what is visible.
    larger = predicted_ids(positions, removed, 7, 20, seed=0)
    assert (torch.zeros(4000, 20).scatter(1, larger, 1.0) >= hits).all()
    assert predicted_ids(positions, removed, 15, 20, seed=0) is removed


@given(st.integers(2, 400), st.floats(0.02, 0.98))
@settings(deadline=None, max_examples=200)
def test_a_predict_ratio_equal_to_the_mask_ratio_is_every_masked_patch(num: int, ratio: float) -> None:
    try:
        num_keep = num_visible(num, ratio)
    except UserError:
        return
    assert num_predicted(num, ratio, ratio) == num - num_keep
    assert num_predicted(num, ratio, None) == num - num_keep


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 49), (0.5, 98), (0.75, 147), (0.01, 2)])
def test_the_predict_ratio_is_a_share_of_all_patches(ratio: float, count: int) -> None:
    assert num_predicted(196, 0.75, ratio) == count


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (0.01, r"predict_ratio 0\.01 leaves nothing to predict out of 24 patches; .* 0\.0417 and 0\.75"),
        (0.8, r"predict_ratio 0\.8 is larger than model\.mask_ratio 0\.75: .* use at most 0\.75"),
    ],
)
def test_a_subset_that_cannot_be_gets_a_sentence(predict: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        num_predicted(24, 0.75, predict)


def test_a_ramp_is_checked_at_both_ends_of_a_stage_before_anything_runs() -> None:
    for ratio in (MaskRatioRamp(start=0.5, end=0.99), MaskRatioRamp(start=0.99, end=0.5)):
        with pytest.raises(UserError, match="leaves no visible patch out of 24"):
            make_masker(ratio).check((16, 24), (0.0, 1.0))
        make_masker(ratio).check((16, 24), (0.4, 0.6))
    ramp = MaskRatioRamp(start=0.75, end=0.6)
    with pytest.raises(UserError, match=r"predict_ratio 0\.75 is larger than model\.mask_ratio 0\.6"):
        make_masker(ramp, predict=0.75).check((16, 24), (0.0, 1.0))
    # Between the ends, rounding must not turn an allowed ratio into an error in the middle of a run.
    masker = make_masker(MaskRatioRamp(start=0.6, end=0.75), predict=0.6)
    masker.check((16, 24), (0.0, 1.0))
    assert {masker.counts((16, 24), i / 997).num_predict for i in range(997)} == {14}
    flat = make_masker(MaskRatioRamp(start=0.7, end=0.7), predict=0.7)
    assert {flat.counts((16, 24), i / 997).num_predict for i in range(997)} == {17}


@pytest.mark.parametrize(
    "ratio", [{"start": 0.5}, {"start": 0.0, "end": 0.5}, {"start": 0.5, "end": 1.0}, [0.5, 0.7]]
)
def test_a_ratio_that_is_neither_a_number_nor_a_ramp_is_refused(ratio: object) -> None:
    with pytest.raises(ValidationError, match="mask_ratio"):
        ModelConfig.model_validate({"mask_ratio": ratio})
