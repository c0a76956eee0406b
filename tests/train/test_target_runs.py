"""Runs with other targets than pixels: what is logged, and that interruptions leave no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from etpp_ssl.cli import main
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.run_state import TrainState
from etpp_ssl.train.launch import pretrain

TIMINGS = {"seconds", "images_per_second", "data_wait_share", "probe_seconds"}
COMBINED = (
    "target=combined",
    "target.parts=[{name: pixels, weight: 0.5}, {name: hog, weight: 3.0}, {name: pixels, norm_pix: false}]",
)
PARTS = {"loss_norm_pixels": 0.5, "loss_hog": 3.0, "loss_pixels": 1.0}


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def test_the_parts_are_logged_and_the_loss_is_their_weighted_sum(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pretrain(tiny_recipe(*COMBINED, "micro_batch_size=4", "probe=reconstruction"))
    *trained, probed = rows(tmp_path / "run")
    assert len(trained) > 3
    for row in trained:
        assert row["loss"] == pytest.approx(sum(w * row[name] for name, w in PARTS.items()), rel=1e-5)
    held_out = {name: probed[f"heldout_{name}"] for name in ("loss", *PARTS)}
    expected = sum(w * held_out[name] for name, w in PARTS.items())
    assert held_out["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", [("target=hog",), COMBINED], ids=["hog", "combined"])
def test_resume_is_bitwise_also_between_two_rows(
    target: tuple[str, ...],
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    pretrain(tiny_recipe(*target, f"output={tmp_path / 'whole'}"))
    cut = tiny_recipe(*target, f"output={tmp_path / 'cut'}", "checkpoint.every_steps=2")
    # Rows are due after 3, 6, ...: the checkpoints of steps 4 and 10 hold a step's losses each.
    for stop in (5, 11):
        with crash_after(stop):
            pretrain(cut)
        assert RunFolder(tmp_path / "cut").checkpoints()[0].step == stop - 1
    pretrain(cut)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    weights = [
        load_file(RunFolder(tmp_path / name).checkpoints()[0].path / "model.safetensors")
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_learns_histograms(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pretrain(tiny_recipe("target=hog", "budget_epochs=20", "curriculum=constant"))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_fork_under_another_target_logs_only_its_own_losses(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    parts = "target.parts=[{name: pixels, label: before}]"
    with crash_after(5):
        pretrain(tiny_recipe("target=combined", parts, "checkpoint.every_steps=4"))
    fork = tiny_recipe(f"output={tmp_path / 'fork'}", "target.norm_pix=false")
    pretrain(fork, fork=tmp_path / "run")
    first = rows(tmp_path / "fork")[0]
    assert first["step"] == 6
    assert not any(name.startswith("loss_") for row in rows(tmp_path / "fork") for name in row)


def test_a_checkpoint_from_before_targets_had_parts_is_read() -> None:
    values = TrainState(step=4, loss_sum=0.5, loss_steps=1).to_json()
    del values["part_sums"]
    assert TrainState.from_json(values) == TrainState(step=4, loss_sum=0.5, loss_steps=1)


def test_a_cell_that_does_not_divide_the_patch_is_a_mistake_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'run'}\nbudget_epochs: 1\nbatch_size: 4\ndata: {{name: synthetic}}\n"
    )
    for target in ("{name: hog, cell: 5}", "{name: combined, parts: [{name: hog, cell: 5}]}"):
        with pytest.raises(SystemExit) as caught:
            main(["plan", str(recipe), f"target={target}"])
        assert caught.value.code == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "cell 5 of the hog target does not divide the patch of 16 pixels" in message
        assert "valid are 1, 2, 4, 8, 16" in message
    assert not (tmp_path / "run").exists()
