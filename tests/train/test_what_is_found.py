"""What the data holds is said once, by `plan` and at the start of a run, and classes may have no images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from etpp_ssl.commands.evaluate import evaluate_run
from etpp_ssl.config import UserError
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.plan import plan_run, print_plan

LABELLED = [f"train/{name}/{n}.png" for name in ("ash", "elm", "oak") for n in range(4)]
"""And evaluation images without the first class: the indices of the others must not move up."""
LACKING = ["val/elm/1.png", "val/oak/1.png", "val/oak/2.png"]


def write(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)


def planned(recipe: Recipe | FinetuneRecipe) -> str:
    console = Console(width=500)
    with console.capture() as captured:
        print_plan(plan_run(recipe), console)
    return captured.get()


def test_plan_and_run_say_what_was_found_and_left_out(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "photos", *(f"{number}.png" for number in range(5)), "@eaDir/0.png")
    for number in range(30):
        (tmp_path / "photos" / f"{number}.HEIC").touch()
    recipe = tiny_recipe("data=folder", f"data.root={tmp_path}/photos", "data.num_workers=0", "batch_size=4")
    line = f"5 images in '{tmp_path}/photos' (5 .png; no labels); left out: 30 .heic, hidden folders '@eaDir'"
    assert f"training: {line}\n" in planned(recipe)
    pretrain(recipe)
    assert capsys.readouterr().err.count(line) == 1
    # A plan needs no data where the recipe says how many images there are.
    away = tiny_recipe("data=folder", f"data.root={tmp_path}/gone", "data.num_images=64")
    assert "training: " not in planned(away)


def test_a_classifier_is_evaluated_on_images_that_lack_a_class(
    tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data", *LABELLED, *LACKING)
    recipe = tiny_classifier(
        "data=folder",
        f"data.root={tmp_path}/data",
        "data.num_workers=0",
        "batch_size=4",
        "model.num_classes=3",
    )
    line = f"3 images in '{tmp_path}/data/val' (3 .png; 2 classes); no image of class ash"
    assert f"evaluation: {line}\n" in planned(recipe)
    run = finetune(recipe)
    assert line in capsys.readouterr().err
    assert run.task.evaluation is not None
    assert run.task.evaluation.images.all_labels() == [1, 2, 2]
    recall = evaluate_run(recipe, run.folder, print).result.recall
    assert recall[0] is None
    assert None not in recall[1:]


def test_a_probe_takes_evaluation_images_that_lack_a_class(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data", *LABELLED, *LACKING)
    settings = ["data=folder", f"data.root={tmp_path}/data", "data.num_workers=0", "batch_size=4"]
    pretrain(tiny_recipe(*settings, "probe=knn", "probe.k=2"))
    assert "(3 .png; 2 classes); no image of class ash" in capsys.readouterr().err
    write(tmp_path / "data", "val/yew/1.png")
    with pytest.raises(UserError, match="classes that training lacks: yew; training has ash, elm, oak"):
        pretrain(tiny_recipe(*settings, "probe=knn", f"output={tmp_path}/other"))
