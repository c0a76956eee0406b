"""The promises of a run: the same bits whatever interrupts it, and that it learns."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY
from torch import Tensor

from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.run_state import TrainState
from etpp_ssl.train.launch import pretrain
from etpp_ssl.train.opening import open_run

TIMINGS = {"seconds", "images_per_second", "data_wait_share", "probe_seconds"}


def weights(folder: Path) -> dict[str, Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "model.safetensors")


def rows(folder: Path, *, without: set[str] = TIMINGS) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def assert_same(a: Path, b: Path) -> None:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a probe, which no test changes."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(Recipe.parse(TINY, [f"output={folder}", "probe=knn", "probe.every_steps=7"]))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe as it is, which no test changes."""
    folder = tmp_path_factory.mktemp("plain")
    pretrain(Recipe.parse(TINY, [f"output={folder}"]))
    return folder


def test_resume_is_bitwise_at_any_step_with_any_workers(
    whole: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    # Steps 5 and 11 lie between two rows, 12 and 17 in the middle of an epoch and of a stage.
    for number, (stop, workers) in enumerate([(5, 2), (11, 0), (12, 1), (17, 3)]):
        recipe = tiny_recipe(
            f"output={tmp_path / 'cut'}",
            f"data.num_workers={workers}",
            "checkpoint.every_steps=2",
            "probe=knn",
            "probe.every_steps=7",
        )
        with crash_after(stop):
            pretrain(recipe)
        steps = [checkpoint.step for checkpoint in RunFolder(tmp_path / "cut").checkpoints()]
        assert steps[0] == stop - 1 - (stop - 1) % 2, f"attempt {number}"
    pretrain(tiny_recipe(f"output={tmp_path / 'cut'}", "probe=knn", "probe.every_steps=7"))
    assert_same(whole, tmp_path / "cut")


def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(
    whole: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    terminate_in: Callable[[int], AbstractContextManager[None]],
) -> None:
    recipe = tiny_recipe(f"output={tmp_path / 'cut'}", "probe=knn", "probe.every_steps=7")
    before = signal.getsignal(signal.SIGTERM)
    with terminate_in(4), pytest.raises(Interrupted, match="SIGTERM after step 4") as caught:
        pretrain(recipe)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert RunFolder(tmp_path / "cut").checkpoints()[0].step == 4
    pretrain(recipe)
    assert_same(whole, tmp_path / "cut")


def test_a_finished_run_is_left_as_it_is(whole: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    def contents() -> dict[str, tuple[bytes, int]]:
        files = [file for file in sorted(whole.rglob("*")) if file.is_file()]
        return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    before = contents()
    run = pretrain(tiny_recipe(f"output={whole}", "data.num_workers=1"))
    assert run.finished
    assert contents() == before
    newest = RunFolder(whole).checkpoints()[0]
    assert newest.step == run.curriculum.num_steps


def test_accumulated_micro_batches_give_the_whole_batchs_step(
    plain: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    # 10 = 4 + 4 + 2: the last one is short and must weigh less.
    pretrain(tiny_recipe(f"output={tmp_path / 'b'}", "micro_batch_size=4"))
    for a, b in zip(rows(plain), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)


def test_accelerates_own_accumulation_plays_no_part(
    whole: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run = pretrain(tiny_recipe(f"output={tmp_path / 'other'}", "probe=knn", "probe.every_steps=7"))
    assert run.accelerator.gradient_accumulation_steps == 1
    assert_same(whole, tmp_path / "other")


def test_the_learning_rate_is_one_curve_over_compute(whole: Path) -> None:
    recipe = RunFolder(whole).recipe()
    curriculum = recipe.build_curriculum(64)
    schedule = recipe.optim.learning_rates(recipe.batch_size)
    trained = [row for row in rows(whole) if "loss" in row]
    assert {row["stage"] for row in trained} == {0, 1, 2}
    for row in trained:
        stage = curriculum.stage_at(row["step"] - 1)
        assert row["lr"] == schedule(stage.progress)
        assert tuple(row["bandwidth"]) == stage.bandwidth
        assert row["images_seen"] == stage.samples.stop
    assert trained[-1]["equivalent_epochs"] == curriculum.equivalent_epochs


def test_the_first_step_learns_and_the_others_keep_their_rate(tiny_recipe: Callable[..., Recipe]) -> None:
    for warmup in (0.0, 0.1, 0.5):
        run = open_run(tiny_recipe(f"optim.warmup_share={warmup}"))
        schedule, curriculum = run.recipe.optim.learning_rates(10), run.curriculum
        first = run.learning_rate(curriculum.stage_at(0))
        assert first == (schedule(curriculum.stage_at(1).progress / 2) if warmup else schedule(0.0))
        assert first > 0
        for step in range(1, curriculum.num_steps):
            stage = curriculum.stage_at(step)
            assert run.learning_rate(stage) == schedule(stage.progress)


def test_a_run_of_one_step_learns_and_warns_which_keys_made_it_so_short(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("curriculum=constant", "batch_size=1000", "budget_epochs=1", "micro_batch_size=500")
    before = {name: value.clone() for name, value in open_run(recipe).bare_model.state_dict().items()}
    run = pretrain(recipe)
    assert run.state.step == 1
    assert rows(tmp_path / "run")[0]["lr"] == recipe.optim.learning_rates(1000)(0.5)
    assert [name for name, value in weights(tmp_path / "run").items() if not torch.equal(value, before[name])]
    warnings = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: the run has")
    ]
    assert len(warnings) == 1
    for words in (
        "only 1 optimizer step",
        "budget_epochs 1 of 64 images",
        "batch_size 1000",
        "lower batch_size",
    ):
        assert words in warnings[0]


def test_a_run_that_version_0_5_began_keeps_the_rate_of_its_first_step(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    # With this policy there is a checkpoint before the first step.
    recipe = tiny_recipe("nonfinite.policy=rewind", "log_every_steps=1")
    with crash_after(2):
        pretrain(recipe)
    file = tmp_path / "run" / "checkpoints" / "step-00000000" / "state.json"
    content = json.loads(file.read_text())
    del content["state"]["first_step_learns"]
    file.write_text(json.dumps(content))
    pretrain(recipe)
    assert [row["lr"] > 0 for row in rows(tmp_path / "run")][:3] == [False, True, True]


def test_a_large_batch_moves_learning_rate_and_samples_with_the_stage_and_resumes_to_the_bit(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    overrides = ["curriculum.large_batch=tokens", "budget_epochs=6", "micro_batch_size=4"]
    run = pretrain(tiny_recipe(f"output={tmp_path / 'whole'}", *overrides))
    assert [stage.batch_size for stage in run.curriculum.stages] == [40, 20, 10]
    seen = 0
    for row in rows(tmp_path / "whole"):
        stage = run.curriculum.stage_at(row["step"] - 1)
        assert row["batch_size"] == stage.batch_size
        assert row["lr"] == run.recipe.optim.learning_rates(stage.batch_size)(stage.progress)
        seen = row["images_seen"]
    assert seen == run.curriculum.num_samples
    first, second = (stage.first_step for stage in run.curriculum.stages[1:])
    cut = tiny_recipe(f"output={tmp_path / 'cut'}", *overrides, "checkpoint.every_steps=1")
    for stop in (first - 1, first + 1, second + 1):
        with crash_after(stop):
            pretrain(cut)
    pretrain(cut)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_it_learns(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # Pixels as they are: guessing an image's mean colour alone does not get this far.
    pretrain(tiny_recipe("budget_epochs=20", "curriculum=constant", "target.norm_pix=false"))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]


def test_lanczos_crops_in_the_worker_and_trains(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pretrain(tiny_recipe("curriculum.crop=lanczos"))
    lanczos = [row["loss"] for row in rows(tmp_path / "run")]
    pretrain(tiny_recipe(f"output={tmp_path / 'fourier'}"))
    fourier = [row["loss"] for row in rows(tmp_path / "fourier")]
    assert lanczos != fourier
    assert lanczos[0] == pytest.approx(fourier[0], rel=0.2)


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_stays_near_float32(
    precision: str, plain: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pretrain(tiny_recipe(f"precision={precision}"))
    for a, b in zip(rows(tmp_path / "run"), rows(plain), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)


def test_gradient_checkpointing_changes_nothing(
    plain: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pretrain(tiny_recipe(f"output={tmp_path / 'checkpointed'}", "model.grad_checkpointing=true"))
    assert_same(plain, tmp_path / "checkpointed")


def test_a_recipe_that_changes_the_result_is_refused_on_resume(
    whole: Path, tiny_recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(UserError, match=r"seed \(3 -> 4\)") as caught:
        pretrain(tiny_recipe(f"output={whole}", "seed=4"))
    assert "--fork" in str(caught.value)


def test_changed_data_is_refused_on_resume(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(64):
        Image.new("RGB", (24, 16), (3 * number, 90, 200)).save(images / f"{number}.png")
    recipe = tiny_recipe(f"data={{name: folder, root: {images}, num_workers: 0}}", "checkpoint.every_steps=2")
    with crash_after(5):
        pretrain(recipe)
    (images / "7.png").rename(images / "another.png")
    with pytest.raises(UserError, match="the data is not what run"):
        pretrain(recipe)


def test_a_fork_goes_on_elsewhere_under_another_recipe(
    whole: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    steps = RunFolder(whole).checkpoints()[0].step
    longer = tiny_recipe(f"output={tmp_path / 'fork'}", "budget_epochs=2.5", "optim.base_lr=1e-3")
    run = pretrain(longer, fork=whole)
    assert run.finished
    assert rows(tmp_path / "fork")[0]["step"] > steps
    # Called again it resumes the fork instead of starting it anew.
    again = pretrain(longer, fork=whole)
    assert again.state.step == run.state.step


def test_a_fork_takes_no_accidents_of_the_old_run_over(
    whole: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    file = RunFolder(old).checkpoints()[0].path / "state.json"
    content = json.loads(file.read_text())
    content["state"] |= {"bad_images": [[5, "5.png"]], "num_rewinds": 3, "num_skipped": 2, "lr_factor": 0.1}
    file.write_text(json.dumps(content))
    run = open_run(tiny_recipe(f"output={tmp_path / 'fork'}", "budget_epochs=2.5"), fork=old)
    past = content["state"]
    assert run.state == TrainState(step=past["step"], seconds=past["seconds"], elapsed=past["elapsed"])


def test_a_fork_with_nothing_left_to_train_is_one_sentence(
    whole: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    same = tiny_recipe(f"output={tmp_path / 'fork'}", "optim.base_lr=1e-3")
    with pytest.raises(UserError, match="nothing is left for a fork; give a larger budget"):
        pretrain(same, fork=whole)
    assert not (tmp_path / "fork").exists()


def test_a_cooldown_off_a_trunk_is_the_run_that_was_planned_so(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    def of(folder: str, epochs: float, cooldown: float) -> Recipe:
        settings = ("optim.schedule=wsd", f"optim.cooldown={cooldown}", "optim.warmup_share=0", "probe=none")
        place = (f"output={tmp_path / folder}", f"budget_epochs={epochs}", "curriculum=constant")
        return tiny_recipe(*place, *settings, "checkpoint.every_steps=1", "checkpoint.keep=100")

    alone = pretrain(of("alone", 2, 0.4))
    trunk = pretrain(of("trunk", 3, 0))
    steps = alone.state.step
    at = next(c.path for c in trunk.folder.checkpoints() if c.step <= 0.6 * steps)
    branch = pretrain(of("branch", 2, 0.4), fork=at)
    assert rows(tmp_path / "branch")[0]["step"] > Checkpoint(at).step > 0
    ends = [run.folder.checkpoints()[0].path / "model.safetensors" for run in (alone, branch)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    late = next(c.path for c in trunk.folder.checkpoints() if c.step <= 0.9 * steps)
    with pytest.raises(UserError, match=r"optim.cooldown 0.4 is more than what is left: at .*; fork"):
        pretrain(of("late", 2, 0.4), fork=late)
    assert not (tmp_path / "late").exists()


def test_a_fork_of_another_model_names_the_tensors(
    whole: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    other = tiny_recipe(f"output={tmp_path / 'fork'}", "budget_epochs=9", "model.embed_dim=24")
    with pytest.raises(UserError, match=r"another model: .*is \(.*instead of .*more"):
        pretrain(other, fork=whole)
    assert not (tmp_path / "fork").exists()


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    whole: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(
        f"output={tmp_path / 'cut'}", "checkpoint.every_steps=4", "probe=knn", "probe.every_steps=7"
    )
    pretrain(recipe)
    newest, before = RunFolder(tmp_path / "cut").checkpoints()
    file = newest.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    pretrain(recipe)
    messages = " ".join(capfd.readouterr().err.split())
    assert f"{newest.path.name} is damaged" in messages
    assert f"at step {before.step}" in messages
    assert_same(whole, tmp_path / "cut")
    for checkpoint in RunFolder(tmp_path / "cut").checkpoints():
        (checkpoint.path / "state.json").write_text("{")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        pretrain(recipe)


def test_rows_after_the_checkpoint_are_cut_and_a_torn_line_is_survived(
    whole: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    recipe = tiny_recipe(
        f"output={tmp_path / 'cut'}", "checkpoint.every_steps=4", "probe=knn", "probe.every_steps=7"
    )
    with crash_after(11):
        pretrain(recipe)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    pretrain(recipe)
    assert_same(whole, tmp_path / "cut")


def test_only_the_last_checkpoints_are_kept(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run = pretrain(tiny_recipe("checkpoint.every_steps=3", "checkpoint.keep=2"))
    last = run.curriculum.num_steps
    kept = [checkpoint.step for checkpoint in run.folder.checkpoints()]
    assert kept == [last, last - 1 - (last - 1) % 3]


def test_a_changed_environment_is_a_warning(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe("checkpoint.every_steps=2")
    with crash_after(5):
        pretrain(recipe)
    state = tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json"
    values = json.loads(state.read_text())
    values["environment"]["threads"] = "77"
    state.write_text(json.dumps(values))
    pretrain(recipe)
    assert "threads 77 ->" in " ".join(capfd.readouterr().err.split())


def test_a_tracker_receives_the_rows(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(tiny_recipe("tracker=tensorboard"))
    folder = next((tmp_path / "run").rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    tracked = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(row["step"], row["loss"]) for row in rows(tmp_path / "run") if "loss" in row]
    assert [step for step, _ in tracked] == [step for step, _ in expected]
    assert [value for _, value in tracked] == pytest.approx([loss for _, loss in expected])


def test_it_starts_from_another_runs_or_an_encoders_weights(
    whole: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from etpp_ssl.export.timm import export

    trained = weights(whole)
    for name, init in (("all", whole), ("encoder", export(whole, tmp_path / "timm"))):
        first = open_run(tiny_recipe(f"output={tmp_path / name}", f"init={init}")).bare_model.state_dict()
        same = {key for key in trained if torch.equal(first[key], trained[key])}
        assert {key for key in trained if key.startswith("encoder.")} <= same
        assert ("decoder.mask_token" in same) == (name == "all")
