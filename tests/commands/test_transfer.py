"""`etpp transfer`: protocols, resuming, the page, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from etpp_ssl.cli import main
from etpp_ssl.commands.transfer import epochs_for
from etpp_ssl.evaluation.predictions import confusion_of, top1_of
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain

FAST = ["budget_epochs=4", "batch_size=16", "data.num_workers=0", "optim.auto_lrs=[0.001, 0.01]"]


def etpp(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    """Images of 20 x 28, whose class is seen in their brightness."""
    draw = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = draw.integers(0, 60, (20, 28, 3)) + 70 * number
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "train", {"ant": 20, "bee": 20, "cat": 10})
    write_images(folder / "val", {"ant": 4, "bee": 4, "cat": 4})
    return folder


@pytest.fixture
def pretrained(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    return Path(pretrain(tiny_recipe(f"output={tmp_path / 'encoder'}", "budget_epochs=0.4")).folder.path)


def test_one_command_tries_all_protocols_and_resumes(
    pretrained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["transfer", pretrained, f"data.root={photos}", f"output={out}", *FAST]
    assert etpp(*command) == 0
    first = capsys.readouterr()
    for name in ("kNN", "linear head", "attentive head", "fine-tuning"):
        assert name in first.out
    recipe = FinetuneRecipe.load(out)
    assert recipe.size == (16, 24)
    assert recipe.model.embed_dim == 16
    state = json.loads((out / "report" / "transfer.json").read_text())
    found = {row["protocol"]: row for row in state["outcomes"]}
    assert list(found) == ["knn", "linear_cached", "attentive"]
    # Brightness is easy to tell, and what is measured is the same as elsewhere.
    assert found["knn"]["top1"] > 60
    (row,) = [row for row in RunFolder(out).metrics() if "start_holdout_top1" in row]
    assert found["linear_cached"]["holdout_top1"] == pytest.approx(row["start_holdout_top1"])
    assert row["holdout_top1" if not row["start_kept"] else "start_holdout_top1"] == pytest.approx(
        float(first.out.split("fine-tuning")[1].split()[2]), abs=0.005
    )
    net = timm.create_model(f"local-dir:{out / 'export' / 'timm'}", pretrained=True)
    assert net.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    # One extraction each of train, holdout and eval serves kNN, both heads, the trials and the run.
    assert len(list((out / "report" / "features").iterdir())) == 3

    page = (out / "report" / "transfer.html").read_text()
    assert page.count("data:image/png") == 1 + 12
    assert "Most sure, and wrong" in page

    assert etpp(*command) == 0
    again = capsys.readouterr()
    rows = [line for line in first.out.splitlines() if "head" in line or "kNN" in line]
    assert [line for line in again.out.splitlines() if "head" in line or "kNN" in line] == rows

    assert etpp(*command, "seed=5") == 2
    assert "was started with other settings: seed was 3" in capsys.readouterr().err.replace(
        "seed: ", "seed was "
    )


def test_the_budget_follows_the_number_of_images() -> None:
    assert [epochs_for(n) for n in (100, 524, 5_000, 20_000, 100_000)] == [512, 97.7, 31.6, 15.8, 10]
    images = [n * epochs_for(n) for n in range(1, 3000)]
    assert min(images) > 51_000


def test_macro_top1_is_the_mean_over_classes_that_have_images() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 0, 2])
    confusion = confusion_of(labels, predicted, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    top1, macro = top1_of(confusion)
    assert top1 == pytest.approx(100 * 4 / 6)
    assert macro == pytest.approx((75 + 50) / 2)
