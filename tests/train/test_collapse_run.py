"""A run whose learning rate is far too small says so: in its log, in `etpp evaluate` and in its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from probe_data import write_coloured

from etpp_ssl.cli import main
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.report.history import read_histories
from etpp_ssl.report.results import collapses
from etpp_ssl.train.launch import finetune

COMMON = [
    "image_size=16",
    "curriculum=constant",
    "model.drop_path=0.0",
    "model.head_init_std=2e-5",
    "augment={rand_augment: null, erasing: 0.0, mixup: 0.8, cutmix: 0.0}",
]


def evaluate(run: Path) -> None:
    """Whatever is found, the exit code is 0."""
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run)])
    assert ended.value.code == 0


def test_a_rate_far_too_small_is_told_once_of_each_kind_and_in_every_place(
    tiny_classifier: Callable[..., FinetuneRecipe], capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["data.num_images=120", "data.num_eval_images=200", "budget_epochs=4", "evaluate.every_steps=40"]
    recipe = tiny_classifier(*COMMON, *images, "optim={base_lr: 1e-7}")
    run = finetune(recipe).folder.path
    said = capsys.readouterr().err
    assert (
        said.count("warning: step 21: the classifier has collapsed: its training loss, 2.303, has not") == 1
    )
    assert said.count("the classifier has collapsed: it ") == 1
    for words in (
        "reaches 3.91e-09 (optim.base_lr 1e-07 at batch_size 10) after 2 steps of warm-up, of 48 in all",
        "raise optim.base_lr, for instance to 8e-07",
    ):
        assert words in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "collapse" in row and "loss" in row] == [*range(21, 49, 3)]
    assert [row["step"] for row in rows if "collapse" in row and "top1" in row] == [40, 48]
    evaluate(run)
    # The newest row's, the newest evaluation's and that of `etpp evaluate`, which is the same here.
    assert collapses(read_histories([run], lambda text: None)[0]) == [
        rows[-2]["collapse"],
        rows[-1]["collapse"],
    ]
    assert "warning: the classifier has collapsed: it " in capsys.readouterr().err
    found = json.loads((run / "report" / "evaluation" / "eval" / "evaluation.json").read_text())
    assert found["collapse"] == rows[-1]["collapse"]


def test_a_healthy_run_is_not_warned_of(
    tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coloured(tmp_path / "images", 20, 10)
    images = ["data=folder", f"data.root={tmp_path / 'images'}", "data.num_workers=0", "budget_epochs=8"]
    run = finetune(tiny_classifier(*COMMON, *images, "optim={base_lr: 5e-2}")).folder.path
    assert "collapse" not in capsys.readouterr().err
    assert "collapse" not in (run / "metrics.jsonl").read_text()
    evaluate(run)
    assert "collapse" not in capsys.readouterr().err
    (history,) = read_histories([run], lambda text: None)
    assert collapses(history) == []
