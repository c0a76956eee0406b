"""A budget in hours as steps: the time is filled, the past stays, progress is unbroken."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from etpp_ssl.curriculum.base import Curriculum, Portion, ReplaySpec
from etpp_ssl.curriculum.hours import TimePlan, first_plan, replan, shortest_seconds

SIZE = (32, 48)
BANDWIDTHS = [(16, 24), (24, 32), (32, 40), SIZE]


@st.composite
def measured(draw: st.DrawFn) -> tuple[Curriculum, dict[str, Any]]:
    """Any curriculum of up to four stages with the speed of each, and a budget of up to 2000 steps."""
    num_stages = draw(st.integers(1, 4))
    raw = draw(st.lists(st.floats(0.05, 1), min_size=num_stages, max_size=num_stages))
    batches = draw(st.lists(st.integers(1, 64), min_size=num_stages, max_size=num_stages))
    replayed = draw(st.lists(st.booleans(), min_size=num_stages, max_size=num_stages))
    portions = [
        # One image a step is loaded then, which divides every batch.
        Portion(bandwidth, share / sum(raw), batch, ReplaySpec(times=batch, buffer=3) if replay else None)
        for bandwidth, share, batch, replay in zip(
            BANDWIDTHS[-num_stages:], raw, batches, replayed, strict=True
        )
    ]
    curriculum = Curriculum(
        portions, image_size=SIZE, num_images=draw(st.integers(1, 500)), budget_epochs=100.0
    )
    pace = draw(st.lists(st.floats(0.01, 10), min_size=num_stages, max_size=num_stages))
    elapsed, reserve = draw(st.floats(0, 100)), draw(st.floats(0, 100))
    seconds = draw(st.floats(1, 20)) * shortest_seconds(curriculum, pace)
    assume(seconds / min(pace) < 2000)
    hours = (seconds + elapsed + reserve) / 3600
    return curriculum, {"hours": hours, "pace": pace, "elapsed": elapsed, "reserve": reserve}


def predicted_seconds(plan: TimePlan, first_step: int = 0) -> float:
    """What the plan's segments from `first_step` on take at its pace."""
    return sum(
        plan.pace[segment.stage] * segment.num_steps
        for segment in plan.segments
        if segment.first_step >= first_step
    )


def assert_whole(run: Curriculum, stages: int) -> None:
    """Every step has its stage, every sample comes once, progress rises from 0, the end is full size."""
    found = [run.stage_at(step) for step in range(run.num_steps)]
    next_sample = 0
    for step, stage in enumerate(found):
        assert stage.step == step
        assert stage.first_step <= step < stage.first_step + stage.num_steps
        assert stage.samples.start == next_sample
        next_sample = stage.samples.stop
    assert next_sample == run.num_samples
    assert found[0].progress == 0
    progress = [stage.progress for stage in found]
    assert all(a < b for a, b in zip(progress, [*progress[1:], 1.0], strict=True))
    assert [stage.index for stage in found] == sorted(stage.index for stage in found)
    assert {stage.index for stage in found} == set(range(stages))
    assert found[-1].bandwidth == SIZE


@given(measured())
@settings(deadline=None, max_examples=60)
def test_the_first_plan_fills_the_time_and_covers_every_step(
    drawn: tuple[Curriculum, dict[str, Any]],
) -> None:
    curriculum, budget = drawn
    plan = first_plan(curriculum, **budget)
    run = curriculum.laid_out(plan.segments)
    assert_whole(run, len(curriculum.portions))
    assume(all(segment.num_steps > 1 for segment in plan.segments))
    total = predicted_seconds(plan) + plan.elapsed + plan.reserve
    assert abs(total - 3600 * plan.hours) <= plan.pace[-1] / 2 + 1e-6
    # Compute is shared out as the curriculum says, up to half a step at either end of a stage.
    seconds = 3600 * plan.hours - plan.elapsed - plan.reserve
    pairs = list(zip(run.portions, run.step_costs, plan.pace, strict=True))
    compute = seconds / sum(portion.share * pace / cost for portion, cost, pace in pairs)
    before = 0.0
    for stage, (portion, cost, pace) in zip(run.stages, pairs, strict=True):
        off = stage.num_steps * pace - portion.share * compute / cost * pace
        assert abs(off) <= (before + pace) / 2 + 1e-6
        before = pace


@given(measured(), st.data())
@settings(deadline=None, max_examples=80)
def test_a_new_plan_keeps_the_past_and_spreads_what_is_left_over_the_time_that_is_left(
    drawn: tuple[Curriculum, dict[str, Any]], data: st.DataObject
) -> None:
    curriculum, budget = drawn
    plan = first_plan(curriculum, **budget)
    for _ in range(data.draw(st.integers(1, 4))):
        old = curriculum.laid_out(plan.segments)
        if plan.step + 1 >= old.num_steps:
            break
        step = data.draw(st.integers(plan.step + 1, old.num_steps - 1))
        speed = data.draw(st.floats(0.5, 2))
        before, elapsed = plan, plan.elapsed + speed * (step - plan.step)
        plan = replan(curriculum, plan, step=step, elapsed=elapsed)
        new = curriculum.laid_out(plan.segments)
        assert_whole(new, len(curriculum.portions))
        for past in range(step):
            a, b = old.stage_at(past), new.stage_at(past)
            assert replace(a, num_steps=0) == replace(b, num_steps=0)
            assert old.equivalent_epochs_after(past) == pytest.approx(new.equivalent_epochs_after(past))
        assert new.progress_after(step) == pytest.approx(old.progress_after(step), abs=1e-12)
        assert sum(segment.share for segment in plan.segments) == pytest.approx(1)
        # All that is left was as much faster or slower as the last steps.
        stage = old.stage_at(step - 1).index
        assert plan.pace[stage] == pytest.approx((elapsed - before.elapsed) / (step - before.step))
        future = [segment for segment in plan.segments if segment.first_step >= step]
        if all(segment.num_steps > 1 for segment in future):
            total = elapsed + predicted_seconds(plan, step) + plan.reserve
            assert abs(total - 3600 * plan.hours) <= plan.pace[-1] / 2 + 1e-6


@given(measured())
@settings(deadline=None, max_examples=30)
def test_a_plan_that_time_has_run_out_for_still_ends_at_the_full_image(
    drawn: tuple[Curriculum, dict[str, Any]],
) -> None:
    curriculum, budget = drawn
    plan = first_plan(curriculum, **budget)
    late = replan(curriculum, plan, step=1, elapsed=3600 * plan.hours + 1)
    new = curriculum.laid_out(late.segments)
    assert_whole(new, len(curriculum.portions))
    assert all(segment.num_steps == 1 for segment in late.segments if segment.first_step >= 1)


@given(measured())
@settings(deadline=None, max_examples=20)
def test_a_plan_survives_json_to_the_bit(drawn: tuple[Curriculum, dict[str, Any]]) -> None:
    curriculum, budget = drawn
    plan = first_plan(curriculum, **budget)
    assert TimePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_run_as_fast_as_measured_keeps_its_plan() -> None:
    portions = [Portion((16, 24), 0.25, 8), Portion(SIZE, 0.75, 8)]
    curriculum = Curriculum(portions, image_size=SIZE, num_images=64, budget_epochs=1.0)
    plan = first_plan(curriculum, hours=1.0, pace=[1.0, 4.0], elapsed=0.0, reserve=0.0)
    # A quarter of the area in a quarter of the time: 900 seconds and 2700.
    steps = [segment.num_steps for segment in plan.segments]
    assert steps == [450, 450, 112, 113, 112, 113, 112, 57, 56]
    assert [segment.stage for segment in plan.segments] == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert [stage.num_steps for stage in curriculum.laid_out(plan.segments).stages] == [900, 675]
    assert replan(curriculum, plan, step=900, elapsed=900.0).segments == plan.segments


def test_a_slower_machine_gets_fewer_steps_for_the_same_compute_shares() -> None:
    portions = [Portion((16, 24), 0.2, 8), Portion((24, 32), 0.4, 8), Portion(SIZE, 0.4, 8)]
    curriculum = Curriculum(portions, image_size=SIZE, num_images=64, budget_epochs=1.0)
    plan = first_plan(curriculum, hours=1.0, pace=[1.0, 2.0, 4.0], elapsed=0.0, reserve=0.0)
    first = curriculum.laid_out(plan.segments).stages[0].num_steps
    new = curriculum.laid_out(replan(curriculum, plan, step=first, elapsed=2.0 * first).segments)
    assert new.stages[0].num_steps == first
    assert new.stages[1].progress == pytest.approx(0.2, abs=1e-3)
    costs = [s.num_steps * c for s, c in zip(new.stages, new.step_costs, strict=True)]
    assert costs[1] == pytest.approx(costs[2], rel=0.02)
    left = 3600 - 2.0 * first
    assert new.stages[1].num_steps * 4.0 + new.stages[2].num_steps * 8.0 == pytest.approx(left, abs=4)
