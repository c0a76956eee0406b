"""The learning rate: linear warm-up, one half-cosine over compute, unbroken at stage changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from etpp_ssl.curriculum.efficienttrain import EfficientTrain
from etpp_ssl.optim.optimizers import OptimConfig
from etpp_ssl.optim.schedules import Schedule


@given(
    st.floats(1e-6, 1.0),
    st.floats(0, 1e-6),
    st.floats(0, 0.99),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=200)
def test_it_is_a_line_and_then_half_a_cosine(
    peak: float, minimum: float, warmup: float, progress: float
) -> None:
    # Both pieces by interpolation of tables: 0 to peak over the warm-up, then along cos(0 .. pi).
    angle = np.interp(progress, [warmup, 1], [0, math.pi])
    expected = minimum + (peak - minimum) * (1 + math.cos(angle)) / 2
    if progress < warmup:
        expected = np.interp(progress, [0, warmup], [0, peak])
    assert Schedule(peak, minimum, warmup)(progress) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_known_points() -> None:
    schedule = Schedule(peak=2.0, minimum=0.5, warmup_share=0.2)
    values = [schedule(progress) for progress in (0, 0.05, 0.1, 0.2, 0.6, 1)]
    assert values == pytest.approx([0, 0.5, 1, 2, 1.25, 0.5])
    # A quarter of the way down: cos(pi / 4).
    assert schedule(0.4) == pytest.approx(0.5 + 1.5 * (1 + 2**-0.5) / 2)


def test_without_warm_up_it_starts_at_the_peak() -> None:
    schedule = Schedule(peak=3.0, minimum=0.0, warmup_share=0.0)
    assert schedule(0.0) == 3.0
    assert schedule(0.5) == pytest.approx(1.5)
    assert schedule(1.0) == pytest.approx(0)


@pytest.mark.parametrize("warmup", [0.05, 0.2, 0.9])
def test_it_is_continuous_where_the_warm_up_ends(warmup: float) -> None:
    schedule = Schedule(peak=1.0, minimum=0.1, warmup_share=warmup)
    assert schedule(warmup) == pytest.approx(1)
    assert schedule(warmup - 1e-9) == pytest.approx(1, abs=1e-7)
    assert schedule(warmup + 1e-9) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("table", ["general", "deit", "convnext"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.2])
def test_it_never_jumps_and_never_rises_again_at_a_stage_change(table: Any, warmup: float) -> None:
    curriculum = EfficientTrain(
        table, image_size=224, multiple=16, num_images=1000, batch_size=50, budget_epochs=20.0
    )
    schedule = Schedule(peak=1.0, minimum=0.0, warmup_share=warmup)
    stages = [curriculum.stage_at(step) for step in range(curriculum.num_steps)]
    rates = [schedule(stage.progress) for stage in stages]
    steepest = max(1 / warmup if warmup else 0, math.pi / 2 / (1 - warmup))
    # The reference re-bases its cosine at every stage change, where its rate jumps up.
    for step in range(1, len(stages)):
        spent = stages[step].progress - stages[step - 1].progress
        assert abs(rates[step] - rates[step - 1]) <= steepest * spent + 1e-12
        if stages[step - 1].progress >= warmup:
            assert rates[step] <= rates[step - 1]
    assert {stage.index for stage in stages} == set(range(len(curriculum.stages)))


def test_a_settings_peak_grows_with_the_global_batch_but_its_minimum_does_not() -> None:
    config = OptimConfig(base_lr=1.5e-4, min_lr=1e-6, warmup_share=0.1)
    for batch_size, peak in ((256, 1.5e-4), (4096, 2.4e-3), (64, 3.75e-5)):
        schedule = config.learning_rates(batch_size)
        assert schedule(0.1) == pytest.approx(peak)
        assert schedule(1.0) == pytest.approx(1e-6)


def test_where_the_batch_changes_the_rate_changes_by_the_same_factor() -> None:
    curriculum = EfficientTrain(
        image_size=224, large_batch="tokens", num_images=1000, batch_size=64, budget_epochs=20.0
    )
    config = OptimConfig(warmup_share=0.05)
    for stage in curriculum.stages[1:]:
        before = curriculum.stage_at(stage.first_step - 1)
        assert before.batch_size > stage.batch_size
        per_image = [
            config.learning_rates(s.batch_size)(stage.progress) / s.batch_size for s in (before, stage)
        ]
        assert per_image[0] == pytest.approx(per_image[1])


def test_the_defaults_are_maes_pre_training_settings() -> None:
    config = OptimConfig()
    assert config.betas == (0.9, 0.95)
    assert config.weight_decay == 0.05
    assert config.clip_grad is None
    assert config.learning_rates(4096)(config.warmup_share) == pytest.approx(2.4e-3)
    assert config.learning_rates(4096)(1.0) == pytest.approx(0)


@pytest.mark.parametrize(
    "setting",
    [
        {"base_lr": 0.0},
        {"warmup_share": 1.0},
        {"warmup_share": -0.1},
        {"min_lr": -1e-6},
        {"weight_decay": -0.05},
        {"eps": 0.0},
        {"clip_grad": 0.0},
        {"lr": 1e-3},
    ],
)
def test_a_setting_outside_its_range_or_unknown_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        OptimConfig(**setting)


@given(
    st.floats(0, 0.5),
    st.just(0.0) | st.floats(1e-3, 0.5),
    st.floats(0, 1),
    st.sampled_from(["sqrt", "linear"]),
)
@settings(deadline=None, max_examples=200)
def test_wsd_is_flat_between_its_warm_up_and_its_cooldown(
    warmup: float, cooldown: float, progress: float, shape: Any
) -> None:
    schedule = Schedule(2.0, 0.5, warmup, "wsd", cooldown, shape)
    height = 1.0
    if progress < warmup:
        assert schedule(progress) == pytest.approx(2.0 * progress / warmup)
        return
    if cooldown and progress > 1 - cooldown:
        done = (progress - (1 - cooldown)) / cooldown
        height = 1 - (math.sqrt(done) if shape == "sqrt" else done)
    # Close to the start of the cooldown the root is steep.
    assert schedule(progress) == pytest.approx(0.5 + 1.5 * height, abs=1e-6 + 2e-6 * (shape == "sqrt"))


def test_known_points_of_the_other_shapes() -> None:
    line = Schedule(2.0, 0.0, 0.2, "linear")
    assert [line(progress) for progress in (0.1, 0.2, 0.6, 1)] == pytest.approx([1, 2, 1, 0])
    wsd = OptimConfig(schedule="wsd", base_lr=1.0, warmup_share=0.1).learning_rates(256)
    assert [wsd(progress) for progress in (0.05, 0.1, 0.8, 0.85, 1)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    trunk = OptimConfig(schedule="wsd", cooldown=0.0, base_lr=1.0).learning_rates(256)
    assert trunk(1.0) == 1.0
