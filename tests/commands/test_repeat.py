"""A classifier's run with several seeds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import pytest
from rich.console import Console

from etpp_ssl.commands.repeat import finetune_repeatedly, print_repeats
from etpp_ssl.config import UserError
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import finetune

Build = Callable[..., FinetuneRecipe]


def test_each_seed_is_an_ordinary_run_with_its_own_labels(tiny_classifier: Build, tmp_path: Path) -> None:
    few = ["data.labels_per_class=3", "budget_epochs=1"]
    recipe = tiny_classifier(*few, "evaluate.repeats=3", f"output={tmp_path / 'all'}")
    summary = finetune_repeatedly(recipe)
    assert list(summary["seeds"]) == [3, 4, 5]
    alone = finetune(tiny_classifier(*few, "seed=4", f"output={tmp_path / 'alone'}"))
    assert {name: alone.newest[name] for name in summary["mean"]} == summary["seeds"][4]
    drawn = {
        RunFolder(tmp_path / "all" / f"seed-{seed}").checkpoints()[0].state()["data"] for seed in (3, 4, 5)
    }
    assert len(drawn) == 3
    top1 = [numbers["top1"] for numbers in summary["seeds"].values()]
    assert (summary["mean"]["top1"], summary["deviation"]["top1"]) == (fmean(top1), stdev(top1))
    # The same command again finds them finished.
    assert finetune_repeatedly(recipe) == summary
    assert json.loads((tmp_path / "all" / "repeats.json").read_text())["mean"] == summary["mean"]
    printed = io.StringIO()
    print_repeats(summary, Console(file=printed, width=100))
    assert [line.split()[0] for line in printed.getvalue().splitlines()] == [
        "seed",
        "3",
        "4",
        "5",
        "mean",
        "deviation",
    ]


def test_without_an_evaluation_there_is_nothing_to_repeat(tiny_classifier: Build) -> None:
    with pytest.raises(UserError, match=r"evaluate\.split is null"):
        finetune_repeatedly(tiny_classifier("evaluate={split: null, repeats: 2}"))
