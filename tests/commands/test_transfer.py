"""`etpp transfer`: protocols, resuming, the page, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from etpp_ssl.cli import main
from etpp_ssl.commands.transfer_recipe import epochs_for, recipe_of
from etpp_ssl.evaluation.predictions import confusion_of
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.checkpoint import save_checkpoint
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

    # As after an interruption: what was done is read, the rest is done again, to the same bits.
    steps = len(RunFolder(out).metrics())
    state["outcomes"] = [{**found["knn"], "seconds": 77.0}]
    (out / "report" / "transfer.json").write_text(json.dumps(state))
    assert etpp(*command) == 0
    again = json.loads((out / "report" / "transfer.json").read_text())["outcomes"]
    assert again[0]["seconds"] == 77
    for row in again[1:]:
        assert {**row, "seconds": 0} == {**found[row["protocol"]], "seconds": 0}
    assert len(RunFolder(out).metrics()) == steps

    assert etpp(*command, "seed=5") == 2
    assert "was started with other settings: seed (0 -> 5)" in capsys.readouterr().err


def test_the_budget_follows_the_number_of_images() -> None:
    assert [epochs_for(n) for n in (100, 524, 5_000, 20_000, 100_000)] == [512, 97.7, 31.6, 15.8, 10]
    images = [n * epochs_for(n) for n in range(1, 3000)]
    assert min(images) > 0.995 * 51_200


def test_a_confusion_counts_true_classes_by_row() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 1, 0, 2])
    confusion = confusion_of(labels, predicted, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


@pytest.fixture
def encoder(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """The folder of a pre-training run with random weights, which takes no time."""
    return untrained(tiny_recipe(f"output={tmp_path / 'random'}"))


def untrained(recipe: Recipe) -> Path:
    folder, model = RunFolder(recipe.output), recipe.build_model()
    recipe.save(folder.recipe_file)
    save_checkpoint(folder, 5, model, torch.optim.SGD(model.parameters(), lr=0.1), {}, keep=1)
    return folder.path


def test_without_an_evaluation_split_numbers_are_of_the_holdout(encoder: Path, photos: Path) -> None:
    said: list[str] = []
    recipe = recipe_of(str(encoder), [f"data.root={photos / 'val'}"], said.append)
    assert recipe.evaluate.split == "holdout"
    assert "no evaluation images" in said[-1]
    assert "All numbers are of the holdout, the 10% of the training images" in said[-1]
    assert (recipe.precision, recipe.size) == ("fp32", (16, 24))
    # 9 images of 12, for what 3 classes keep; and a batch may be larger than the set.
    assert recipe.budget_epochs == epochs_for(9)
    recipe = recipe_of(str(encoder), [f"data.root={photos}", "budget_epochs=3"], said.append)
    assert (recipe.evaluate.split, recipe.budget_epochs) == ("eval", 3)
    recipe = recipe_of(str(encoder), [f"data.root={photos}", "budget_hours=0.1"], said.append)
    assert (recipe.budget_hours, recipe.budget_epochs) == (0.1, None)


@pytest.mark.parametrize(
    ("images", "overrides", "words"),
    [
        ({"ant": 6}, [], "has no class sub-folders, or a single one"),
        ({".": 6}, [], "has no class sub-folders, or a single one"),
        ({"ant": 1, "bee": 1}, [], "holds out none, as no class has two"),
        ({"ant": 6, "bee": 6}, ["data.holdout_share=0"], "compares protocols on the holdout"),
        ({"ant": 6, "bee": 6}, ["evaluate.split=null"], "evaluate.split is null"),
        (
            {"ant": 6, "bee": 6},
            ["evaluate.repeats=2"],
            "evaluate.repeats is 2, which fine-tuning alone can do",
        ),
        ({"ant": 6, "bee": 6}, ["init=other"], "the first argument: leave init=... out"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_a_sentence(
    images: dict[str, int], overrides: list[str], words: str, encoder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = write_images(tmp_path / "images", images)
    out = tmp_path / "out"
    assert etpp("transfer", encoder, f"data.root={root}", f"output={out}", *FAST, *overrides) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_what_is_no_trained_encoder_is_refused_in_a_sentence(
    encoder: Path, photos: Path, tmp_path: Path, tiny_recipe: Callable[..., Recipe],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refused(source: Path, *overrides: str) -> str:
        assert etpp("transfer", source, f"data.root={photos}", f"output={tmp_path / 'out'}", *overrides) == 2
        return capsys.readouterr().err

    shutil.rmtree(encoder / "checkpoints")
    assert "has no checkpoint yet" in refused(encoder)
    assert "is not a run, which would say what network its weights are of" in refused(tmp_path / "a.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    sampled = untrained(
        tiny_recipe(
            f"output={tmp_path / 'sampled'}", "in_chans=2", "data.channel_sampling=2", "data.range=dtype"
        )
    )
    assert "name 2 of them, as in data.channels=[0, 1]" in refused(sampled)
    chosen = [f"data.root={photos}", "data.channels=[2, 0]"]
    recipe = recipe_of(str(sampled), chosen, lambda _: None)
    assert (recipe.in_chans, recipe.data.range, recipe.data.mean) == (2, "dtype", (0.5, 0.5))
    assert "is a folder with other files in it and no run" in refused(sampled, "data.channels=[2, 0]")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_class_that_training_lacks_is_named(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images" / "train", {"ant": 6, "bee": 6})
    write_images(tmp_path / "images" / "val", {"ant": 2, "wasp": 2})
    assert etpp("transfer", encoder, f"data.root={tmp_path / 'images'}", f"output={tmp_path / 'out'}") == 2
    assert "classes that training lacks: wasp; training has ant, bee" in capsys.readouterr().err


def test_the_shipped_recipe_takes_the_network_of_any_run(encoder: Path, photos: Path) -> None:
    recipe = FinetuneRecipe.load("transfer", [f"init={encoder}", f"data.root={photos}"])
    assert (recipe.model.embed_dim, recipe.size, recipe.optim.layer_decay) == (16, (16, 24), 0.75)
    assert (recipe.optim.base_lr, recipe.model.head, recipe.data.holdout_share) == ("auto", "linear", 0.1)
    given = ["optim={base_lr: 0.001}", f"init={encoder}", f"data.root={photos}"]
    recipe = FinetuneRecipe.load("transfer", given)
    assert (recipe.model.head, recipe.evaluate.keep_better) == ("linear", True)
