"""What the data holds is said once, by `plan` and at the start of a run, and classes may have no images."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from etpp_ssl.commands.evaluate import evaluate_run
from etpp_ssl.config import UserError
from etpp_ssl.recipe import FinetuneRecipe, Recipe, load_any
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.plan_table import print_plan
from etpp_ssl.train.summary import tell_start

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
    line = f"data.root '{tmp_path}/gone' does not exist: planned for the 64 images of data.num_images\n"
    assert line in planned(away)
    with pytest.raises(UserError, match="gone' does not exist"):
        planned(tiny_recipe("data=folder", f"data.root={tmp_path}/gone", "data.num_images=null"))
    # What is at hand and cannot be used keeps a run from starting, so it has no plan.
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image below"):
        planned(tiny_recipe("data=folder", f"data.root={tmp_path}/empty", "data.num_images=64"))


def test_what_was_left_out_is_said_once_where_evaluation_takes_from_the_same_images(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    write(tmp_path / "data", *LABELLED, "notes/readme.png", *LACKING)
    (tmp_path / "data" / "train" / "list.txt").touch()
    common = ["data=folder", f"data.root={tmp_path}/data", "data.num_workers=0", "batch_size=4"]
    held_out = "3 images kept from training (data.holdout)"
    recipe = tiny_recipe(*common, "probe=knn", "data.holdout=3")
    text = planned(recipe)
    assert text.count("left out: 1 .txt") == 1
    assert f"training: 9 of 12 images in '{tmp_path}/data/train' " in text
    assert f"evaluation: {held_out}\n" in text
    assert f"  evaluation  {held_out}; probe knn after the last step\n" in started(recipe, 200)
    # Other images are described, and so are training images where a classifier is evaluated on those.
    other = tiny_recipe(*common, "probe=knn")
    assert f"evaluation: 3 images in '{tmp_path}/data/val' " in planned(other)
    train = tiny_classifier(*common, "data.holdout=3", "evaluate.split=train")
    assert "  evaluation  9 of 12 images in " in started(train, 200)


def test_the_first_block_fits_a_terminal_and_what_is_copied_stays_in_one_piece(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    write(tmp_path / "photos", *(f"{number}.png" for number in range(5)))
    output = tmp_path / ("long-" * 20)
    recipe = tiny_recipe(
        "data=folder", f"data.root={tmp_path}/photos", "data.num_workers=0", "batch_size=4",
        "probe=reconstruction", "data.holdout=2", f"output={output}", "budget_epochs=30",
    )  # fmt: skip
    lines = started(recipe, 80).splitlines()
    assert f"  output      {output}" in lines
    long = [line for line in lines if len(line) > 80 and str(tmp_path) not in line]
    assert long == []
    assert any(line.startswith(14 * " ") for line in lines)
    words = [line[14:].split() for line in lines]
    assert [word for line in words for word in line] == started(recipe, 800, names=False).split()


def started(recipe: Recipe | FinetuneRecipe, width: int, names: bool = True) -> str:
    """What a run says of itself on a terminal before its first step."""
    run = open_run(recipe)
    run.progress.console = Console(force_terminal=True, highlight=False, width=width, soft_wrap=True)
    with run.progress.console.capture() as captured:
        tell_start(run)
    return "\n".join(line[0 if names else 14 :] for line in captured.get().splitlines()) + "\n"


def test_images_at_hand_are_counted_and_the_recipes_number_is_an_expectation(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "photos", *(f"{number}.png" for number in range(12)))
    settings = ["data=folder", f"data.root={tmp_path}/photos", "data.num_workers=0", "batch_size=4"]
    line = "data.num_images says 9,469, and 12 were found: those are used\n"
    other = tiny_recipe(*settings, "data.num_images=9469")
    assert line in planned(other)
    assert plan_run(other).curriculum.num_steps == plan_run(tiny_recipe(*settings)).curriculum.num_steps
    run = pretrain(other)
    assert capsys.readouterr().err.count(line) == 1
    # The run records what it found: reports and plans elsewhere go by it. The same command resumes.
    assert run.folder.any_recipe().data.stated_images == 12
    assert pretrain(other).state.step == run.state.step
    assert "data.num_images says" not in planned(tiny_recipe(*settings, "data.num_images=12"))
    strict = tiny_recipe(*settings, "data.num_images=9469", "data.strict=true")
    for refusing in (plan_run, pretrain):
        with pytest.raises(UserError, match="is 9469, but the data has 12 images"):
            refusing(strict)
    capsys.readouterr()
    write(tmp_path / "photos", "added.png")
    with pytest.raises(UserError, match="the data is not what run"):
        pretrain(other)
    assert "those are used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        "{name: list, file: GONE/list.txt}",
        "{name: shards, root: GONE}",
        "{name: timm, root: GONE}",
        "{name: timm, dataset: torch/cifar10, root: GONE}",
        "{name: webdataset, urls: 'GONE/{0..3}.tar'}",
        "{name: webdataset, urls: 'GONE/*.tar'}",
    ],
)
def test_every_source_that_is_elsewhere_can_be_planned(
    data: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe(f"data={data.replace('GONE', str(tmp_path / 'gone'))}", "data.num_images=640")
    assert "planned for the 640 images of data.num_images\n" in planned(recipe)


def test_the_papers_recipes_insist_on_imagenet() -> None:
    recipes = [load_any(path) for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))]
    imagenet = [recipe for recipe in recipes if recipe.data.stated_images == 1_281_167]
    assert len(imagenet) > 30
    assert all(recipe.data.strict for recipe in imagenet if recipe.data.name == "folder")
    assert not any(recipe.data.strict for recipe in recipes if recipe not in imagenet)


def test_plan_says_that_the_lack_of_evaluation_images_keeps_training_from_starting(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    write(tmp_path / "photos", *(f"{number}.png" for number in range(5)))
    settings = ["data=folder", f"data.root={tmp_path}/photos", "data.num_workers=0", "batch_size=4"]
    recipe = tiny_recipe(*settings, "probe=reconstruction")
    reason = "no evaluation images .* data.holdout=N keeps N of the latter"
    with pytest.raises(UserError, match=reason):
        pretrain(recipe)
    assert re.search(f"warning: training would not start here: .*{reason}", planned(recipe))
    assert "warning: training would not start" not in planned(tiny_recipe(*settings, "data.holdout=2"))


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
    assert run.task.evaluation.images.all_labels().tolist() == [1, 2, 2]
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
