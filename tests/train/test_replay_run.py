"""Runs with a replay buffer: the same bits whatever interrupts them, memory said before and seen to."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import etpp_ssl.train.memory as memory
from etpp_ssl.config import UserError
from etpp_ssl.model.masking import Masker
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain
from etpp_ssl.train.memory import check_replay
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.plan_table import print_plan

STAGES = (
    "curriculum.stages=["
    "{bandwidth: [8, 12], share: 0.3, replay: {times: 4, buffer: 5}},"
    "{bandwidth: [12, 16], share: 0.4, replay: {times: 2, buffer: 100}},"
    "{bandwidth: [16, 24], share: 0.3}]"
)
REPLAY = ["batch_size=12", STAGES]


def results(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    run = RunFolder(folder)
    timings = {"seconds", "images_per_second", "data_wait_share"}
    rows = [{k: v for k, v in row.items() if k not in timings} for row in run.metrics()]
    newest = run.checkpoints()[0]
    return {**newest.model(), **newest.optimizer()}, rows


def assert_same(a: Path, b: Path) -> None:
    (x, x_rows), (y, y_rows) = results(a), results(b)
    assert x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert x_rows == y_rows


@pytest.mark.parametrize("micro_batch", ["null", "5"])
def test_resume_in_the_middle_of_a_replay_is_bitwise_with_any_workers(
    micro_batch: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = [*REPLAY, f"micro_batch_size={micro_batch}"]
    run = pretrain(tiny_recipe(f"output={tmp_path / 'whole'}", *settings))
    first, second, _ = (stage.first_step + stage.num_steps for stage in run.curriculum.stages)
    assert "once more" not in capfd.readouterr().err
    # Within the first replay with a buffer that is full, at its end, and within the second.
    for stop, workers in [(first - 2, 0), (first + 1, 2), (second - 1, 0)]:
        assert stop > 6
        recipe = tiny_recipe(
            f"output={tmp_path / 'cut'}",
            *settings,
            f"data.num_workers={workers}",
            "checkpoint.every_steps=2",
        )
        with crash_after(stop):
            pretrain(recipe)
    pretrain(tiny_recipe(f"output={tmp_path / 'cut'}", *settings, "data.num_workers=2"))
    assert "once more" in " ".join(capfd.readouterr().err.split())
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_replay_of_one_is_a_run_without_it_and_said_to_be(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = STAGES.replace(", replay: {times: 4, buffer: 5}", "").replace(
        ", replay: {times: 2, buffer: 100}", ""
    )
    assert "replay" not in plain
    pretrain(tiny_recipe(f"output={tmp_path / 'plain'}", "batch_size=12", plain))
    said = capfd.readouterr().err.replace(str(tmp_path), "")
    assert "replay" not in said
    ones = STAGES.replace("times: 4", "times: 1").replace("times: 2", "times: 1")
    pretrain(tiny_recipe(f"output={tmp_path / 'ones'}", "batch_size=12", ones))
    said = " ".join(capfd.readouterr().err.split())
    assert "stage 1 has replay.times 1: nothing is replayed" in said
    assert "stage 3" not in said.split("8x12 px")[0]
    assert_same(tmp_path / "plain", tmp_path / "ones")


def test_steps_and_compute_stay_and_fewer_images_are_loaded(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from etpp_ssl.data.sources.synthetic import SyntheticSource

    real_open, real_masking = SyntheticSource.open, Masker.__call__
    num_loads = 0
    masked: list[int] = []

    def open_counted(source: SyntheticSource, index: int) -> Any:
        nonlocal num_loads
        num_loads += 1
        return real_open(source, index)

    def masking(masker: Masker, positions: Tensor, *rest: Any) -> Any:
        masked.extend(positions.tolist())
        return real_masking(masker, positions, *rest)

    monkeypatch.setattr(SyntheticSource, "open", open_counted)
    monkeypatch.setattr(Masker, "__call__", masking)
    run = pretrain(tiny_recipe(*REPLAY, "micro_batch_size=5"))
    curriculum = run.curriculum
    assert max(Counter(masked).values()) == 1
    assert len(masked) == curriculum.num_steps * 12 == curriculum.num_slots
    assert num_loads == curriculum.num_samples < curriculum.num_slots
    last = [row for row in run.folder.metrics() if "loss" in row][-1]
    assert last["images_seen"] == curriculum.num_slots
    assert last["images_loaded"] == curriculum.num_samples
    assert curriculum.equivalent_epochs == pytest.approx(run.recipe.budget_epochs, rel=0.1)


@pytest.mark.parametrize(("crop", "pixels"), [("fourier", 16 * 24), ("lanczos", 8 * 12)])
def test_the_plan_says_what_the_buffers_take(
    crop: str, pixels: int, tiny_recipe: Callable[..., Recipe]
) -> None:
    plan = plan_run(tiny_recipe(*REPLAY, f"curriculum.crop={crop}", "budget_epochs=400"))
    # Stage 1: five mini-batches of three images with three channels.
    assert plan.stages[0].replay_bytes == 5 * 3 * 3 * pixels
    assert [row.replay_bytes > 0 for row in plan.stages] == [True, True, False]
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=250))
    size = "16x24" if crop == "fourier" else "8x12"
    assert f"5 mini-batches of 3 images of {size} px" in out.getvalue()
    # 17,280 and 4,320 bytes.
    assert f"takes {'0.0173' if crop == 'fourier' else '0.00432'} MB over all processes" in out.getvalue()
    assert "4 times on average" in out.getvalue()


def test_a_buffer_longer_than_its_stage_takes_what_the_stage_fills(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    plan = plan_run(tiny_recipe(*REPLAY))
    stage = plan.stages[1].stage
    assert stage.num_steps < 100
    assert plan.stages[1].replay_bytes == stage.num_steps * 6 * 3 * 16 * 24


def available(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """Bytes of memory that are available, each time that somebody asks; the last number stays."""
    answers = chain(free, repeat(free[-1]))
    monkeypatch.setattr(
        memory, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=next(answers)))
    )


def test_a_buffer_beyond_the_memory_is_one_sentence_before_anything_is_written(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(*REPLAY)
    # Enough for the model.
    available(monkeypatch, 10**6, 17_000)
    with pytest.raises(UserError) as caught:
        pretrain(recipe)
    message = str(caught.value)
    for words in (
        "stage 1 has replay.buffer 5",
        "5 mini-batches of 3 images of 16x24 px",
        "are available: enough for 4,",
        "=lanczos",
    ):
        assert words in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()
    curriculum = recipe.build_curriculum(64)
    # Of three processes, one runs on this machine; and a finished stage needs nothing any more.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    available(monkeypatch, 17_281)
    check_replay(recipe.crop_view(), recipe.in_chans, curriculum, 3, step=curriculum.stages[1].first_step - 1)
    available(monkeypatch, 0)
    with pytest.raises(UserError, match="stage 2"):
        check_replay(recipe.crop_view(), recipe.in_chans, curriculum, 3, step=curriculum.stages[1].first_step)
    check_replay(recipe.crop_view(), recipe.in_chans, curriculum, 3, step=curriculum.stages[2].first_step)


def test_a_mini_batch_that_does_not_divide_among_the_processes_is_one_sentence(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    recipe = tiny_recipe(*REPLAY)
    with pytest.raises(UserError, match="loads 3 of 12 images, which do not divide evenly among the 2 proc"):
        check_replay(recipe.crop_view(), 3, recipe.build_curriculum(64), 2, step=0)
