"""Losses and gradients that are not finite: stop, skip, rewind; in both loops, at once and one step late."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
import torch
from spoilt_steps import poisoned
from torch import Tensor

from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import finetune, launch, pretrain
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.nonfinite import NonFinite
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.run import Run

Start = Callable[[Recipe | FinetuneRecipe], Run]


def start(recipe: Recipe | FinetuneRecipe, *, late: bool) -> Run:
    """Train; `late` lets the host learn of a bad step one step later: a GPU's way, which a CPU can go too."""
    run = open_run(recipe)
    run.late_verdicts = late
    launch(run)
    return run


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def train(request: pytest.FixtureRequest) -> Callable[[Recipe | FinetuneRecipe], Run]:
    """See `start`."""
    return partial(start, late=request.param)


def test_stop_ends_the_run_before_a_checkpoint_and_names_step_and_samples(
    train: Start, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with poisoned(4), pytest.raises(NonFinite) as fault:
        train(tiny_recipe("checkpoint.every_steps=3"))
    assert fault.value.step == 4
    assert "of step 5 (samples 40 to 49) are not finite" in str(fault.value)
    assert fault.value.exit_code == 1
    folder = RunFolder(tmp_path / "run")
    assert [checkpoint.step for checkpoint in folder.checkpoints()] == [3]
    status = json.loads(folder.status_file.read_text())
    assert status["state"] == "failed"
    assert status["message"] == str(fault.value)
    # Met no more, it leaves no trace: the same command goes on.
    train(tiny_recipe())
    assert json.loads(folder.status_file.read_text())["state"] == "finished"


def test_the_last_step_is_judged_too(
    train: Start, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    last = tiny_recipe().build_curriculum(64).num_steps - 1
    with poisoned(last), pytest.raises(NonFinite, match=f"of step {last + 1} "):
        train(tiny_recipe())
    assert RunFolder(tmp_path / "run").checkpoints() == []


def tensors_of(run: Run) -> dict[str, Tensor]:
    checkpoint = run.folder.checkpoints()[0]
    return {**checkpoint.model(), **checkpoint.optimizer(), **(checkpoint.average() or {})}


@pytest.mark.parametrize("clip", ["null", "0.5"])
def test_a_skipped_step_leaves_weights_and_moments_alone_in_either_way(
    clip: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    ends = []
    for late in (False, True):
        recipe = tiny_recipe(
            "nonfinite.policy=skip", f"optim.clip_grad={clip}", f"output={tmp_path / str(late)}",
            "checkpoint.every_steps=3", "micro_batch_size=4",
        )  # fmt: skip
        with poisoned(2, 3, 9):
            run = start(recipe, late=late)
        assert run.state.num_skipped == 3
        rows = run.folder.metrics()
        assert [row["skipped_steps"] for row in rows if "loss" in row][-1] == 3
        ends.append((tensors_of(run), [(row["step"], row["loss"]) for row in rows]))
    (at_once, rows_at_once), (late_ones, rows_late) = ends
    assert rows_at_once == rows_late
    assert at_once.keys() == late_ones.keys()
    assert all(torch.equal(at_once[name], late_ones[name]) for name in at_once)
    steps = {int(value) for name, value in at_once.items() if name.endswith(".step")}
    assert steps == {run.curriculum.num_steps - 3}, "Adam counted a step that was left out"


def test_a_row_without_a_finite_step_is_not_written(tiny_recipe: Callable[..., Recipe]) -> None:
    with poisoned(3, 4, 5):
        run = pretrain(tiny_recipe("nonfinite.policy=skip"))
    rows = run.folder.metrics()
    assert 3 in [row["step"] for row in rows]
    assert 6 not in [row["step"] for row in rows]
    assert all(row["loss"] == row["loss"] for row in rows)


def test_lost_weights_end_a_run_that_skips(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    with (
        poisoned(*range(5, 20)),
        pytest.raises(NonFinite, match=r"of step 16 .* so were the 10 steps before"),
    ):
        pretrain(tiny_recipe("nonfinite.policy=skip"))


@pytest.mark.parametrize("every", [3, 1000])
def test_a_rewind_goes_back_to_the_checkpoint_with_a_lower_learning_rate(
    train: Start, every: int, tiny_recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture[str]
) -> None:
    with poisoned(7, times=2):
        run = train(
            tiny_recipe("nonfinite.policy=rewind", f"checkpoint.every_steps={every}", "log_every_steps=1")
        )
    back = 6 if every == 3 else 0
    assert f"back to step {back} with 0.25 of the learning rate (rewind 2 of 3)" in capfd.readouterr().err
    assert run.state.num_rewinds == 2
    rows = run.folder.metrics()
    assert [row["step"] for row in rows] == list(range(1, run.curriculum.num_steps + 1))
    for row in rows:
        stage = run.curriculum.stage_at(row["step"] - 1)
        factor = 0.25 if row["step"] > back else 1.0
        progress = stage.progress or run.curriculum.progress_after(1) / 2
        assert row["lr"] == factor * run.recipe.optim.learning_rates(stage.batch_size)(progress)


def test_rewinds_are_bounded(tiny_recipe: Callable[..., Recipe]) -> None:
    with poisoned(7), pytest.raises(NonFinite, match="so they were after 2 rewinds"):
        pretrain(tiny_recipe("nonfinite.policy=rewind", "nonfinite.max_rewinds=2"))


def test_a_run_killed_after_a_rewind_ends_in_the_same_bits(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    overrides = ("nonfinite.policy=rewind", "checkpoint.every_steps=3", "log_every_steps=1")
    with poisoned(7, times=1):
        whole = pretrain(tiny_recipe(*overrides, f"output={tmp_path / 'whole'}"))
    for number, step in enumerate((8, 11)):
        output = f"output={tmp_path / str(number)}"
        with poisoned(7, times=1), crash_after(step):
            pretrain(tiny_recipe(*overrides, output))
        # Killed at 8, before the next checkpoint, it does not know of the rewind, and meets step 7 again.
        with poisoned(7, times=1):
            cut = pretrain(tiny_recipe(*overrides, output))
        a, b = tensors_of(whole), tensors_of(cut)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert [row["loss"] for row in whole.folder.metrics()] == [
            row["loss"] for row in cut.folder.metrics()
        ]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_classifier_skips_and_rewinds_with_its_average(
    optimizer: str, tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    common = (f"optim={optimizer}", "checkpoint.every_steps=3")
    with poisoned(7):
        run = finetune(tiny_classifier(*common, "nonfinite.policy=skip", f"output={tmp_path / 'skip'}"))
    assert run.state.num_skipped == 1
    assert all(value.isfinite().all() for value in tensors_of(run).values())
    with poisoned(7, times=1):
        rewound = finetune(
            tiny_classifier(
                *common, "nonfinite={policy: rewind, lr_factor: 1.0}", f"output={tmp_path / 'rewind'}"
            )
        )
    plain = finetune(tiny_classifier(*common, f"output={tmp_path / 'plain'}"))
    a, b = tensors_of(rewound), tensors_of(plain)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "a rewind brings back everything"


def test_a_skipped_step_leaves_the_statistics_of_batch_norms_alone(
    train: Start,
    tiny_classifier: Callable[..., FinetuneRecipe],
) -> None:
    with poisoned(1, 3):
        run = train(
            tiny_classifier(
                "model={name: resnet10t, args: {channels: [8, 8, 8, 8]}}", "image_size=32", "budget_epochs=1",
                "curriculum=constant", "nonfinite.policy=skip",
            )
        )  # fmt: skip
    assert run.state.num_skipped == 2
    assert all(value.isfinite().all() for value in tensors_of(run).values())


def test_gradients_are_judged_where_the_loss_is_finite(
    tiny_recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture[str]
) -> None:
    def hook(run: Run) -> None:
        def spoil(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if run.state.step == 5:
                parameter.grad.flatten()[-1] = torch.inf

        if run.state.step == 1:
            next(iter(run.model.parameters())).register_post_accumulate_grad_hook(spoil)

    on_step_end.append(hook)
    try:
        run = pretrain(tiny_recipe("nonfinite.policy=skip"))
    finally:
        on_step_end.remove(hook)
    said = [line for line in capfd.readouterr().err.splitlines() if "not finite" in line]
    assert ["of step 6 " in line for line in said] == [True]
    assert run.state.num_skipped == 1
