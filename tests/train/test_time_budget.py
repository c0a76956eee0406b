"""A budget in hours: on a clock that the tests turn, it ends on time and resumes to the bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from stream_sources import write_tars
from torch import Tensor

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.run_state import TrainState
from etpp_ssl.train import time_budget
from etpp_ssl.train.launch import launch, pretrain
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.plan_table import print_plan
from etpp_ssl.train.run import Run
from etpp_ssl.train.time_budget import decide_steps, measure, train_step

SECONDS = {(8, 12): 1.0, (12, 16): 2.0, (16, 24): 4.0}
BUDGET = 120.0
REPLAY = [
    "batch_size=12",
    "curriculum.stages=["
    "{bandwidth: [8, 12], share: 0.3, replay: {times: 4, buffer: 5}},"
    "{bandwidth: [12, 16], share: 0.4, replay: {times: 2, buffer: 100}},"
    "{bandwidth: [16, 24], share: 0.3}]",
]


class Crash(Exception):
    pass


class Clock:
    """Time that passes with each training step: as long as one at its bandwidth takes."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.steps = 0
        self.slower_from: int | None = None
        self.crash_at: int | None = None

    def open(self, recipe: Recipe | FinetuneRecipe, fork: Path | None = None) -> Run:
        """A run whose clock this is."""
        run = open_run(recipe, fork)
        run.clock = lambda: self.now
        run.bare_model.register_forward_pre_hook(self.tick)
        return run

    def train(self, recipe: Recipe | FinetuneRecipe, fork: Path | None = None) -> Run:
        run = self.open(recipe, fork)
        launch(run)
        return run

    def tick(self, model: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not model.training:
            return
        self.steps += 1
        if self.steps == self.crash_at:
            raise Crash
        late = self.slower_from is not None and self.steps >= self.slower_from
        height, width = arguments[0].shape[-2:]
        self.now += SECONDS[height, width] * (2 if late else 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hours_recipe(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def build(*overrides: str, seconds: float = BUDGET) -> Recipe:
        return tiny_recipe("budget_epochs=null", f"budget_hours={seconds / 3600}", *overrides)

    return build


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def rows(folder: Path) -> list[dict[str, Any]]:
    timings = {"seconds", "images_per_second", "data_wait_share", "probe_seconds", "evaluation_seconds"}
    return [{k: v for k, v in row.items() if k not in timings} for row in RunFolder(folder).metrics()]


def assert_same(a: Path, b: Path) -> None:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert rows(a) == rows(b)


def test_it_ends_on_time_and_gives_stages_their_shares(
    clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    start = clock.now
    run = clock.train(hours_recipe())
    assert run.finished
    assert abs(clock.now - start - BUDGET) <= SECONDS[16, 24] / 2
    assert run.state.elapsed == pytest.approx(clock.now - start)
    compute = [s.num_steps * c for s, c in zip(run.curriculum.stages, run.curriculum.step_costs, strict=True)]
    shares = [spent / sum(compute) for spent in compute]
    assert shares == pytest.approx([0.2, 0.4, 0.4], abs=0.03)
    assert rows(tmp_path / "run")[-1]["equivalent_epochs"] == run.curriculum.equivalent_epochs
    assert run.folder.plan() == run.state.plan

    assert not plan_run(run.recipe).decided
    plan = plan_run(run.recipe, run.folder)
    assert plan.decided
    assert plan.curriculum.segments == run.curriculum.segments
    assert not plan_run(hours_recipe(seconds=360), run.folder).decided
    run.folder.plan_file.write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json' is not a plan"):
        plan_run(run.recipe, run.folder)


def test_a_plan_tells_the_time_at_the_speed_that_was_measured(
    clock: Clock,
    tiny_recipe: Callable[..., Recipe],
    hours_recipe: Callable[..., Recipe],
    capsys: pytest.CaptureFixture[str],
) -> None:
    speed = measure(clock.open(tiny_recipe()))
    assert list(speed.steps) == pytest.approx(list(SECONDS.values()))
    plan = plan_run(tiny_recipe(), speed=speed)
    steps = [row.stage.num_steps for row in plan.stages]
    assert plan.seconds == pytest.approx(sum(n * s for n, s in zip(steps, SECONDS.values(), strict=True)))
    every = replace(speed, evaluation=3.0, every_steps=2)
    assert plan_run(tiny_recipe(), speed=every).seconds == pytest.approx(plan.seconds + 1.5 * sum(steps) + 3)

    # A budget in hours becomes the steps that its run would have.
    recipe = hours_recipe()
    planned = plan_run(recipe, speed=measure(clock.open(recipe)))
    run = clock.open(recipe)
    decide_steps(run)
    assert planned.decided
    assert planned.curriculum.segments == run.curriculum.segments

    print_plan(plan, Console(width=140))
    first, second, third = (n * s for n, s in zip(steps, SECONDS.values(), strict=True))
    told = [f"0:{int(s) // 60:02}:{int(s) % 60:02}" for s in (first, second, third, first + second + third)]
    text = capsys.readouterr().out
    assert [time for time in told if time not in text] == []
    assert "time: " in text


def test_measuring_a_recipe_leaves_nothing(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_recipe("output=runs/tiny").model_dump_json())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(time_budget, "MOST_SECONDS", 0.01)
    cases = {"probe=knn": "3 stages and one probe knn ...", "curriculum=constant": "1 stage ..."}
    for override, told in cases.items():
        with pytest.raises(SystemExit) as ended:
            main(["plan", "tiny.yaml", "--measure", "budget_epochs=null", "budget_hours=1", override])
        assert not ended.value.code
        out, err = capsys.readouterr()
        assert re.search(r"^time: \d", out, re.MULTILINE)
        assert f"measuring {told}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("curriculum", ["efficienttrain", "constant"])
def test_a_machine_that_slows_down_ends_on_time_too(
    curriculum: str, clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    # In the middle of the first stage, or of the only one.
    clock.slower_from = 20
    start = clock.now
    # Lanczos crops come from the data workers: a batch that was asked for under an old plan does not fit.
    run = clock.train(hours_recipe(f"curriculum={curriculum}", "curriculum.crop=lanczos", seconds=300))
    assert abs(clock.now - start - 300) <= 0.05 * 300
    schedule = run.recipe.optim.learning_rates(10)
    trained = rows(tmp_path / "run")
    for row in trained:
        assert row["lr"] == schedule(run.curriculum.stage_at(row["step"] - 1).progress)
    progress = [run.curriculum.stage_at(step).progress for step in range(run.curriculum.num_steps)]
    # No step takes an unusual share of the schedule: the future was spread anew, nothing was cut off.
    assert max(b - a for a, b in zip(progress, [*progress[1:], 1.0], strict=True)) < 0.05


@pytest.mark.parametrize("settings", [[], REPLAY], ids=["plain", "replay"])
def test_it_resumes_to_the_bit_between_plans_and_right_after_one(
    settings: list[str], clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole = clock.train(hours_recipe(f"output={tmp_path / 'whole'}", *settings))
    assert whole.state.plan is not None
    ends = [segment.first_step for segment in whole.state.plan.segments[1:]]
    measured = 4 * len(SECONDS)
    # Before the first plan's first end, right after that end, and in the middle of the last stage.
    stops = [ends[0] - 1, ends[0] + 1, ends[-3] + 2]
    cut = hours_recipe(f"output={tmp_path / 'cut'}", "checkpoint.every_steps=4", *settings)
    done = 0
    for stop in stops:
        clock.steps, clock.crash_at = 0, (measured if done == 0 else 0) + stop - done
        with pytest.raises(Crash):
            clock.train(cut)
        done = RunFolder(tmp_path / "cut").checkpoints()[0].step
        assert done > 0
    clock.crash_at = None
    again = clock.train(cut)
    assert again.state.plan == whole.state.plan
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_kill_before_the_first_step_does_not_measure_again(
    clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    clock.crash_at = 4 * len(SECONDS) + 1
    with pytest.raises(Crash):
        clock.train(hours_recipe())
    assert [checkpoint.step for checkpoint in RunFolder(tmp_path / "run").checkpoints()] == [0]
    clock.crash_at, clock.steps = None, 0
    run = clock.train(hours_recipe())
    assert clock.steps == run.curriculum.num_steps


def with_the_plan_of(first: Run, run: Run) -> Run:
    """A run that need not measure: it has the plan and the time that another one began with."""
    *_, beginning = first.folder.checkpoints()
    assert beginning.step == 0
    run.state = TrainState.from_json(beginning.state()["state"])
    assert run.state.plan is not None
    run.curriculum = run.progress.curriculum = run.curriculum.laid_out(run.state.plan.segments)
    return run


def test_measuring_leaves_no_trace(clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    overrides = ["probe=knn", "probe.every_steps=50", "checkpoint.keep=99"]
    measured = clock.train(hours_recipe(f"output={tmp_path / 'measured'}", *overrides))
    clock.steps = 0
    told = with_the_plan_of(measured, clock.open(hours_recipe(f"output={tmp_path / 'told'}", *overrides)))
    launch(told)
    assert clock.steps == told.curriculum.num_steps, "it measured, too"
    assert_same(tmp_path / "measured", tmp_path / "told")


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_classifier_ends_on_time_and_its_measuring_leaves_no_trace(
    optimizer: str, clock: Clock, tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    def recipe(name: str) -> FinetuneRecipe:
        hours = ["budget_epochs=null", f"budget_hours={BUDGET / 3600}", "checkpoint.keep=99"]
        # Lamb counts steps in its groups.
        return tiny_classifier(f"output={tmp_path / name}", f"optim={optimizer}", *hours)

    start = clock.now
    run = clock.train(recipe("measured"))
    assert run.finished
    assert abs(clock.now - start - BUDGET) <= SECONDS[16, 24] / 2
    assert run.average is not None
    launch(with_the_plan_of(run, clock.open(recipe("told"))))
    assert_same(tmp_path / "measured", tmp_path / "told")


@pytest.mark.parametrize("overrides", [[], ["micro_batch_size=4", "optim.clip_grad=0.5"]])
def test_a_measured_step_computes_what_a_trained_step_does(
    overrides: list[str], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*overrides, "checkpoint.every_steps=4", "checkpoint.keep=99")
    trained = pretrain(recipe)
    run = open_run(recipe.model_copy(update={"output": str(tmp_path / "other")}))
    batches = run.open_batches(run.curriculum.stage_at, range(8))
    run.model.train()
    for step in range(8):
        stage = run.curriculum.stage_at(step)
        train_step(run, stage, batches, lr=run.learning_rate(stage))
    expected = load_file(trained.folder.checkpoint_folder / "step-00000008" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in run.bare_model.state_dict().items())


def test_a_plan_that_cannot_be_shown_ends_no_run(
    clock: Clock, hours_recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture[str]
) -> None:
    def in_the_way(run: Run) -> None:
        if run.state.step == 1:
            run.folder.plan_file.unlink()
            run.folder.plan_file.mkdir()

    on_step_end.append(in_the_way)
    try:
        assert clock.train(hours_recipe()).finished
    finally:
        on_step_end.remove(in_the_way)
    assert re.search(r"warning: '.*plan.json' cannot be written: Is a directory", capfd.readouterr().err)


def test_a_budget_too_short_is_one_sentence_and_writes_nothing(
    clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"budget_hours 0\.0\S* is too short: .* give more than 0\.0"
    ) as caught:
        clock.train(hours_recipe(seconds=40))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_stream_is_read_on_after_every_new_plan_and_every_kill(
    clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    data = f"data={{name: webdataset, urls: {write_tars(tmp_path / 'tars')}, num_images: 31, num_workers: 0}}"
    common = [data, "data.shuffle_buffer=4", "checkpoint.every_steps=5"]
    clock.train(hours_recipe(f"output={tmp_path / 'whole'}", *common))
    clock.crash_at, clock.steps = clock.steps - 8, 0
    with pytest.raises(Crash):
        clock.train(hours_recipe(f"output={tmp_path / 'cut'}", *common))
    clock.crash_at = None
    clock.train(hours_recipe(f"output={tmp_path / 'cut'}", *common))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_another_budget_is_refused_on_resume(
    clock: Clock, hours_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    clock.crash_at = 30
    with pytest.raises(Crash):
        clock.train(hours_recipe())
    clock.crash_at = None
    with pytest.raises(UserError, match=r"budget_hours \(0\.03\d+ -> 0\.1"):
        clock.train(hours_recipe(seconds=360))


def test_a_fork_keeps_the_plan_or_fits_what_is_left_to_another_budget(
    clock: Clock, hours_recipe: Callable[..., Recipe], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    clock.crash_at = 50
    with pytest.raises(Crash):
        clock.train(hours_recipe("checkpoint.every_steps=10"))
    clock.crash_at = None
    folder = tmp_path / "run"
    step = RunFolder(folder).checkpoints()[0].step
    base = open_run(hours_recipe())
    same = open_run(hours_recipe(f"output={tmp_path / 'same'}", "optim.base_lr=1e-3"), fork=folder)
    assert same.state.plan == base.state.plan
    longer = open_run(hours_recipe(f"output={tmp_path / 'longer'}", seconds=180), fork=folder)
    assert longer.curriculum.num_steps > base.curriculum.num_steps
    assert longer.curriculum.progress_after(step) == pytest.approx(base.curriculum.progress_after(step))
    left = clock.now
    clock.train(longer.recipe, fork=folder)
    assert clock.now - left == pytest.approx(180 - base.state.elapsed, abs=0.05 * 180)
    for overrides, words in (
        (["curriculum=constant"], "a plan of other stages"),
        (["batch_size=20"], "a plan of other stages"),
    ):
        with pytest.raises(UserError, match=words):
            open_run(hours_recipe(f"output={tmp_path / 'no'}", *overrides), fork=folder)


def test_a_fork_without_a_plan_or_a_future_is_one_sentence(
    clock: Clock, hours_recipe: Callable[..., Recipe], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    clock.train(tiny_recipe(f"output={tmp_path / 'epochs'}", "budget_epochs=0.5"))
    with pytest.raises(UserError, match="which has no plan in hours; give budget_epochs"):
        open_run(hours_recipe(), fork=tmp_path / "epochs")
    clock.train(hours_recipe(f"output={tmp_path / 'hours'}"))
    with pytest.raises(UserError, match="is finished; give budget_epochs"):
        open_run(hours_recipe(seconds=480), fork=tmp_path / "hours")
    goes_on = open_run(tiny_recipe("budget_epochs=30"), fork=tmp_path / "hours")
    assert goes_on.state.plan is None
    assert not goes_on.finished
