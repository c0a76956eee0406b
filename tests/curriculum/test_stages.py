"""Stages: the published tables, their budget, and a schedule that has no memory."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum, ReplaySpec, Stage, StageSpec, stage_batch
from etpp_ssl.curriculum.efficienttrain import Constant, ConstantConfig, EfficientTrain, EfficientTrainConfig

RUN = {"num_images": 5000, "batch_size": 64, "budget_epochs": 10.0}
"""A small run, for what does not depend on the run's length."""

PUBLISHED = {
    "general": [(96, 0.2), (160, 0.4), (224, 0.4)],
    "deit": [(96, 0.2), (160, 0.4), (192, 0.2), (224, 0.2)],
    "convnext": [(160, 0.6), (224, 0.4)],
}


def bandwidths(curriculum: Curriculum) -> list[tuple[int, int]]:
    return [stage.bandwidth for stage in curriculum.stages]


def walk(curriculum: Curriculum) -> list[Stage]:
    return [curriculum.stage_at(step) for step in range(curriculum.num_steps)]


def relative_cost(stage: Stage, size: tuple[int, int]) -> float:
    return stage.bandwidth[0] * stage.bandwidth[1] / (size[0] * size[1])


@pytest.mark.parametrize("table", PUBLISHED)
def test_the_published_tables_come_out_exactly_at_224_and_16(table: Any) -> None:
    curriculum = EfficientTrain(table, image_size=224, multiple=16, **RUN)
    assert bandwidths(curriculum) == [(b, b) for b, _ in PUBLISHED[table]]
    shares = [stage.share for stage in curriculum.stages]
    assert shares == pytest.approx([share for _, share in PUBLISHED[table]])
    assert EfficientTrainConfig(table=table).roundings((224, 224), (16, 16)) == []


@pytest.mark.parametrize(
    ("table", "size", "multiple", "expected"),
    [
        ("general", (224, 224), 14, [(98, 98), (154, 154), (224, 224)]),
        ("general", (448, 448), 16, [(192, 192), (320, 320), (448, 448)]),
        ("general", (224, 224), 32, [(96, 96), (160, 160), (224, 224)]),
        ("general", (32, 32), 4, [(12, 12), (24, 24), (32, 32)]),
        ("general", (192, 256), (16, 32), [(80, 96), (144, 192), (192, 256)]),
        ("deit", (112, 336), (8, 16), [(48, 144), (80, 240), (96, 288), (112, 336)]),
        ("deit", (32, 32), 8, [(16, 16), (24, 24), (32, 32)]),
    ],
)
def test_tables_scale_to_other_sizes_in_whole_patches(
    table: Any, size: tuple[int, int], multiple: Any, expected: list[tuple[int, int]]
) -> None:
    curriculum = EfficientTrain(table, image_size=size, multiple=multiple, **RUN)
    assert bandwidths(curriculum) == expected


def test_stages_that_round_to_the_same_bandwidth_become_one_with_both_shares() -> None:
    curriculum = EfficientTrain("deit", image_size=32, multiple=8, **RUN)
    assert bandwidths(curriculum) == [(16, 16), (24, 24), (32, 32)]
    assert [stage.share for stage in curriculum.stages] == pytest.approx([0.2, 0.6, 0.2])


@pytest.mark.parametrize("table", PUBLISHED)
def test_every_image_size_has_its_table_and_ends_at_the_full_image(table: Any) -> None:
    # Sizes such as 232 are one rounding beyond themselves once divided by 224 and multiplied again.
    for size in range(32, 1025, 8):
        config = EfficientTrainConfig(table=table)
        build = {"image_size": (size, 2 * size), "multiple": (8, 8), **RUN}
        assert config.build(**build).stages[-1].bandwidth == (size, 2 * size)
        assert not any(f"to {size}x" in text for text in config.roundings((size, 2 * size), (8, 8)))


def test_roundings_tell_each_bandwidth_that_is_not_whole_patches() -> None:
    config = EfficientTrainConfig(table="general")
    assert config.roundings((224, 224), (14, 14)) == [
        "bandwidth 96x96 is rounded to 98 (whole patches of 14)",
        "bandwidth 160x160 is rounded to 154 (whole patches of 14)",
    ]
    assert ConstantConfig().roundings((224, 224), (14, 14)) == []


def test_ones_own_stages_take_the_tables_place() -> None:
    stages = [
        StageSpec(bandwidth=96, share=0.25),
        StageSpec(bandwidth=(128, 224), share=0.25),
        StageSpec(bandwidth=192, share=0.5),
    ]
    curriculum = EfficientTrain(stages=stages, image_size=(192, 256), multiple=16, **RUN)
    # One number is the shorter side's; the longer one follows the aspect ratio.
    assert bandwidths(curriculum) == [(96, 128), (128, 224), (192, 256)]


SIZES: list[tuple[tuple[int, int], Any]] = [
    ((224, 224), 16),
    ((224, 224), 14),
    ((96, 160), 8),
    ((196, 98), 14),
    ((232, 56), (8, 4)),
]


@st.composite
def runs(draw: st.DrawFn) -> tuple[Curriculum, dict[str, Any]]:
    """Any table, size, data set, batch and budget, of a length that a test can walk."""
    size, multiple = draw(st.sampled_from(SIZES))
    run = {
        "num_images": draw(st.integers(1, 5000)),
        "batch_size": draw(st.integers(1, 700)),
        "budget_epochs": draw(st.floats(0.01, 30)),
    }
    assume(run["num_images"] * run["budget_epochs"] / run["batch_size"] < 1000)
    table = draw(st.sampled_from([*PUBLISHED, "constant"]))
    if table == "constant":
        return Constant(image_size=size, **run), run
    return EfficientTrain(table, image_size=size, multiple=multiple, **run), run


@given(runs())
@settings(deadline=None, max_examples=60)
def test_stages_cover_every_step_and_every_sample_once_and_end_at_the_full_image(
    drawn: tuple[Curriculum, dict[str, Any]],
) -> None:
    curriculum, run = drawn
    next_sample = index = 0
    for step, stage in enumerate(walk(curriculum)):
        assert stage.step == step
        assert stage.first_step <= step < stage.first_step + stage.num_steps
        assert stage.samples == range(next_sample, next_sample + run["batch_size"])
        assert stage.index - index in (0, 1)
        next_sample, index = stage.samples.stop, stage.index
    assert next_sample == curriculum.num_samples
    assert index == len(curriculum.stages) - 1
    assert curriculum.stages[-1].bandwidth == curriculum.image_size
    assert sum(stage.num_steps for stage in curriculum.stages) == curriculum.num_steps
    assert sum(stage.share for stage in curriculum.stages) == pytest.approx(1)


@given(runs())
@settings(deadline=None, max_examples=60)
def test_each_stage_and_the_whole_run_spend_their_compute(
    drawn: tuple[Curriculum, dict[str, Any]],
) -> None:
    curriculum, run = drawn
    budget = run["budget_epochs"] * run["num_images"]
    full_images = 0.0
    for stage in curriculum.stages:
        cost = relative_cost(stage, curriculum.image_size)
        full_images += stage.num_steps * run["batch_size"] * cost
    assert curriculum.equivalent_epochs == pytest.approx(full_images / run["num_images"])

    # A budget below two steps per stage cannot be met: every stage has at least one step.
    assume(all(stage.num_steps > 1 for stage in curriculum.stages))
    assert abs(full_images - budget) <= run["batch_size"] / 2 + 1e-6 * budget
    for stage in curriculum.stages:
        due = stage.share * budget / relative_cost(stage, curriculum.image_size)
        assert abs(stage.num_steps * run["batch_size"] - due) <= run["batch_size"] + 1e-6 * due


@given(runs(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_a_stage_can_be_asked_for_in_any_order(
    drawn: tuple[Curriculum, dict[str, Any]], order: random.Random
) -> None:
    curriculum, _ = drawn
    in_order = walk(curriculum)
    steps = list(range(curriculum.num_steps))
    order.shuffle(steps)
    assert all(curriculum.stage_at(step) == in_order[step] for step in steps)


@given(runs())
@settings(deadline=None, max_examples=60)
def test_progress_is_the_share_of_compute_spent_before_the_step(
    drawn: tuple[Curriculum, dict[str, Any]],
) -> None:
    curriculum, _ = drawn
    stages = walk(curriculum)
    costs = [relative_cost(stage, curriculum.image_size) for stage in stages]
    total, spent = sum(costs), 0.0
    assert stages[0].progress == 0
    for stage, cost in zip(stages, costs, strict=True):
        assert stage.progress == pytest.approx(spent / total, abs=1e-9)
        epochs = curriculum.equivalent_epochs_after(stage.step)
        assert epochs == pytest.approx(curriculum.equivalent_epochs * spent / total, abs=1e-9)
        spent += cost
    progress = [stage.progress for stage in stages]
    assert all(a < b for a, b in zip(progress, [*progress[1:], 1], strict=True))
    end = curriculum.equivalent_epochs_after(curriculum.num_steps)
    assert end == curriculum.equivalent_epochs


def test_a_budget_too_small_still_gives_every_stage_a_step() -> None:
    curriculum = EfficientTrain(image_size=224, num_images=10, batch_size=64, budget_epochs=0.1)
    assert [stage.num_steps for stage in curriculum.stages] == [1, 1, 1]


@pytest.mark.parametrize("step", [-1, 10**9])
def test_a_step_outside_the_run_is_an_index_error(step: int) -> None:
    curriculum = EfficientTrain(**RUN)
    with pytest.raises(IndexError, match=f"step {step} is outside a run of"):
        curriculum.stage_at(step)
    with pytest.raises(IndexError):
        curriculum.stage_at(curriculum.num_steps)


def test_a_run_of_millions_of_steps_answers_at_once_for_its_last() -> None:
    curriculum = EfficientTrain(num_images=1_281_167, batch_size=8, budget_epochs=400.0)
    last = curriculum.stage_at(curriculum.num_steps - 1)
    assert last.samples.stop == curriculum.num_samples
    assert curriculum.num_steps > 100_000_000
    assert curriculum.equivalent_epochs == pytest.approx(400)


@pytest.mark.parametrize(
    ("table", "images_per_compute"), [("general", 2.27), ("deit", 2.35), ("convnext", 1.58)]
)
def test_the_published_curricula_show_more_images_for_the_same_compute(
    table: Any, images_per_compute: float
) -> None:
    curriculum = EfficientTrain(table, num_images=1_281_167, batch_size=4096, budget_epochs=400.0)
    ratio = curriculum.num_samples / (curriculum.equivalent_epochs * 1_281_167)
    assert ratio == pytest.approx(images_per_compute, abs=0.005)


def test_the_constant_curriculum_shows_each_image_once_per_equivalent_epoch() -> None:
    curriculum = Constant(image_size=(96, 160), **RUN)
    assert bandwidths(curriculum) == [(96, 160)]
    assert abs(curriculum.num_samples - 50_000) <= 32


def own(*stages: tuple[Any, float]) -> list[StageSpec]:
    return [StageSpec(bandwidth=bandwidth, share=share) for bandwidth, share in stages]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (own((256, 0.5), (224, 0.5)), r"256x256 is larger than the image \(224\)"),
        (own(((112, 240), 0.5), (224, 0.5)), r"112x240 is larger than the image \(224\)"),
        (own((16, 0.5), (224, 0.5)), "fewer than two patches of 16 px per axis; use at least 32"),
        (own(((112, 8), 0.5), (224, 0.5)), "112x8 leaves fewer than two patches"),
        (own((160, 0.4), (96, 0.2), (224, 0.4)), "96 follows 160, but bandwidths must not shrink"),
        (
            own(((96, 160), 0.5), ((160, 96), 0.3), (224, 0.2)),
            "160x96 follows 96x160, but bandwidths must not shrink",
        ),
        (
            own(((160, 96), 0.5), ((96, 160), 0.3), (224, 0.2)),
            "96x160 follows 160x96, but bandwidths must not shrink",
        ),
        (own((96, 0.5), (160, 0.5)), "the last stage shows 160, but a run ends at .* 224"),
        (own((96, 0.5), ((224, 192), 0.5)), "the last stage shows 224x192, but"),
    ],
)
def test_stages_that_make_no_curriculum_get_a_sentence(stages: list[StageSpec], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EfficientTrain(stages=stages, image_size=224, multiple=16, **RUN)


def test_a_table_too_coarse_for_a_small_image_gets_a_sentence() -> None:
    # 96 of 224 is 10.3 of 24 pixels: one patch of 8.
    with pytest.raises(UserError, match="leaves fewer than two patches of 8 px per axis"):
        EfficientTrain(image_size=24, multiple=8, **RUN)


@pytest.mark.parametrize("shares", [(0.5, 0.4), (0.7, 0.4), (0.2, 0.2)])
def test_shares_that_do_not_add_up_to_one_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match=r"add up to \S+: they must add up to 1"):
        EfficientTrainConfig(stages=tuple(own((96, shares[0]), (224, shares[1]))))


@pytest.mark.parametrize(("bandwidth", "share"), [(96, 0.0), (96, 1.2), (96, -0.1), (0, 0.5)])
def test_a_stage_without_compute_or_pixels_is_refused(bandwidth: int, share: float) -> None:
    with pytest.raises(ValidationError, match=r"takes a share of compute|at least one pixel"):
        StageSpec(bandwidth=bandwidth, share=share)


def test_thirds_add_up_to_one_despite_rounding() -> None:
    config = EfficientTrainConfig(stages=tuple(own((96, 1 / 3), (160, 1 / 3), (224, 1 / 3))))
    curriculum = config.build(image_size=(224, 224), multiple=(16, 16), **RUN)
    assert curriculum.equivalent_epochs == pytest.approx(10, abs=0.01)


def batches(curriculum: Curriculum) -> list[int]:
    return [stage.batch_size for stage in curriculum.stages]


def test_a_large_batch_keeps_the_pixels_per_step_about_constant() -> None:
    run = {"num_images": 1_281_167, "batch_size": 4096, "budget_epochs": 400.0}
    off = EfficientTrain(image_size=224, multiple=16, **run)
    tokens = EfficientTrain(image_size=224, multiple=16, large_batch="tokens", **run)
    assert batches(off) == [4096] * 3
    # 224^2 / 96^2 = 5.44 and 224^2 / 160^2 = 1.96 times as many, in multiples of 256.
    assert batches(tokens) == [22272, 7936, 4096]
    for stage in tokens.stages:
        assert stage.batch_size * relative_cost(stage, (224, 224)) == pytest.approx(4096, rel=0.02)
    # The budget and its shares are the same; the samples follow each other without a gap.
    assert tokens.equivalent_epochs == pytest.approx(off.equivalent_epochs, rel=1e-3)
    for a, b in zip(tokens.stages, off.stages, strict=True):
        assert a.num_steps * a.batch_size == pytest.approx(b.num_steps * b.batch_size, rel=1e-3)
    for before, after in pairwise(tokens.stages):
        assert after.first_sample == before.first_sample + before.num_steps * before.batch_size


@given(st.integers(1, 3000), st.floats(0.01, 40))
@settings(deadline=None, max_examples=200)
def test_a_stages_batch_is_near_its_factor_and_divides_well(batch_size: int, factor: float) -> None:
    found = stage_batch(batch_size, factor)
    quantum = [
        d for d in range(1, batch_size + 1) if batch_size % d == 0 and (d == 1 or 16 * d <= batch_size)
    ][-1]
    assert found % quantum == 0
    assert found >= quantum
    assert abs(found - batch_size * factor) <= quantum / 2 or found == quantum
    assert stage_batch(batch_size, 1.0) == batch_size


def test_a_stages_own_factor_goes_before_the_curriculums() -> None:
    stages = [
        StageSpec(bandwidth=96, share=0.25, batch_factor=2),
        StageSpec(bandwidth=112, share=0.25),
        StageSpec(bandwidth=224, share=0.5, batch_factor=0.5),
    ]
    run = {"image_size": 224, "multiple": 16, "num_images": 500, "batch_size": 32, "budget_epochs": 20.0}
    assert batches(EfficientTrain(stages=stages, **run)) == [64, 32, 16]
    assert batches(EfficientTrain(stages=stages, large_batch="tokens", **run)) == [64, 128, 16]


def test_stages_of_one_bandwidth_but_different_batches_stay_apart() -> None:
    stages = [StageSpec(bandwidth=224, share=0.5, batch_factor=2), StageSpec(bandwidth=224, share=0.5)]
    curriculum = EfficientTrain(stages=stages, image_size=224, multiple=16, **RUN)
    assert batches(curriculum) == [128, 64]


def test_a_batch_factor_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="batch_factor"):
        StageSpec(bandwidth=96, share=0.5, batch_factor=0)


@given(runs())
@settings(deadline=None, max_examples=20)
def test_without_a_factor_progress_has_the_bits_of_the_plain_sum(
    drawn: tuple[Curriculum, dict[str, Any]],
) -> None:
    # Learning rates, and so weights, of runs made before batches could differ must come out the same.
    curriculum, run = drawn
    height, width = curriculum.image_size
    spent, before = 0.0, []
    for stage in curriculum.stages:
        cost = run["batch_size"] * stage.bandwidth[0] * stage.bandwidth[1] / (height * width)
        before.append((spent, cost))
        spent += stage.num_steps * cost
    for stage in walk(curriculum):
        start, cost = before[stage.index]
        assert stage.progress == (start + (stage.step - stage.first_step) * cost) / spent


def test_no_stages_at_all_is_refused() -> None:
    with pytest.raises(ValidationError, match="stages"):
        EfficientTrainConfig(stages=())


PAPER_REPLAY = (ReplaySpec(times=4, buffer=1920), ReplaySpec(times=2, buffer=256), None)


def test_replay_loads_fewer_images_for_the_same_steps_and_compute() -> None:
    plain = walk(EfficientTrain(image_size=224, **RUN))
    curriculum = EfficientTrain(image_size=224, replay=PAPER_REPLAY, **RUN)
    next_sample = next_slot = 0
    for stage, other in zip(walk(curriculum), plain, strict=True):
        assert (stage.bandwidth, stage.batch_size, stage.progress) == (
            other.bandwidth,
            other.batch_size,
            other.progress,
        )
        assert stage.slots == other.slots == other.samples == range(next_slot, next_slot + 64)
        assert stage.times == (4, 2, 1)[stage.index]
        assert stage.samples == range(next_sample, next_sample + 64 // stage.times)
        next_sample, next_slot = stage.samples.stop, stage.slots.stop
    assert (next_sample, next_slot) == (curriculum.num_samples, curriculum.num_slots)


def test_the_buffer_holds_the_last_mini_batches_of_its_own_stage() -> None:
    curriculum = EfficientTrain(
        stages=[
            StageSpec(bandwidth=96, share=0.5, replay=ReplaySpec(times=2, buffer=3)),
            StageSpec(bandwidth=160, share=0.3, replay=ReplaySpec(times=1, buffer=3)),
            StageSpec(bandwidth=224, share=0.2, replay=ReplaySpec(times=4, buffer=10**6)),
        ],
        **RUN,
    )
    short, none, long = curriculum.stages
    assert (short.buffer_steps, none.buffer_steps, long.buffer_steps) == (3, 0, long.num_steps)
    held = [curriculum.stage_at(step).oldest_step for step in range(curriculum.num_steps)]
    assert held[:6] == [0, 0, 0, 1, 2, 3]
    assert held[none.first_step : long.first_step] == list(range(none.first_step, long.first_step))
    assert held[long.first_step :] == [long.first_step] * long.num_steps


def test_equal_neighbours_with_another_replay_stay_apart() -> None:
    replay = ReplaySpec(times=2, buffer=3)
    # 160 and 192 of 32 pixels are both 24 in patches of 8.
    for third, count in ((replay, 3), (None, 4)):
        curriculum = EfficientTrain(
            "deit", replay=[None, replay, third, None], image_size=32, multiple=8, **RUN
        )
        assert [stage.replay for stage in curriculum.stages] == [None, replay, third, None][:2] + (
            [None] if third else [third, None]
        )
        assert len(curriculum.stages) == count


def test_times_that_do_not_divide_the_batch_get_a_sentence() -> None:
    for curriculum in (
        lambda: EfficientTrain(replay=[None, ReplaySpec(times=3, buffer=1), None], **RUN),
        lambda: Constant(image_size=32, replay=ReplaySpec(times=3, buffer=1), **RUN),
    ):
        with pytest.raises(UserError, match=r"replay\.times 3, which does not divide its batch of 64"):
            curriculum()


def test_the_replay_of_a_config_reaches_its_stages() -> None:
    sizes = {"image_size": (224, 224), "multiple": (16, 16)}
    table = EfficientTrainConfig(replay=PAPER_REPLAY).build(**sizes, **RUN)
    assert tuple(stage.replay for stage in table.stages) == PAPER_REPLAY
    constant = ConstantConfig(replay=PAPER_REPLAY[0]).build(**sizes, **RUN)
    assert [stage.replay for stage in constant.stages] == [PAPER_REPLAY[0]]


def test_a_replay_that_does_not_fit_its_curriculum_is_refused() -> None:
    with pytest.raises(ValidationError, match="replay has 3 entries, but table 'deit' has 4 stages"):
        EfficientTrainConfig(table="deit", replay=PAPER_REPLAY)
    with pytest.raises(ValidationError, match="give each of stages its own replay"):
        EfficientTrainConfig(stages=tuple(own((224, 1.0))), replay=(None,))
