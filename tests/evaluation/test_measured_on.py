"""A result's record says which images it is of, and how many of them were trained on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from probe_data import write_coloured

from etpp_ssl.evaluation.measured_on import (
    in_words,
    measured_on,
    shown_number,
    training_mark,
    without_looking,
)
from etpp_ssl.recipe import Recipe

Build = Callable[..., Recipe]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """36 training images and 18 of validation, whose names are among those of training."""
    write_coloured(tmp_path / "photos")
    return tmp_path / "photos"


def test_what_guessing_gets_right_is_told(tiny_recipe: Build, tmp_path: Path) -> None:
    write_coloured(tmp_path / "photos")
    for file in sorted((tmp_path / "photos" / "val" / "red").iterdir())[2:]:
        file.unlink()
    recipe = tiny_recipe("data=folder", f"data.root={tmp_path}/photos", "data.labels=folders")
    images = recipe.open_split("eval")
    found = images.all_labels()
    assert found is not None
    labels = found.tolist()
    assert images.classes is not None
    most = max(range(len(images.classes)), key=labels.count)
    share = 100 * labels.count(most) / len(labels)
    assert without_looking(images) == (
        f"without looking: {100 / len(images.classes):.4g} % by chance, {share:.4g} % by class "
        f"{images.classes[most]} alone"
    )
    assert without_looking(tiny_recipe(*UNLABELLED, f"data.root={tmp_path}/photos").open_split("eval")) == ""


def test_accuracies_and_recalls_are_in_per_cent() -> None:
    numbers = {"knn_top1": 12.5, "top5": 8 / 3, "mean_recall": 50.0, "eval_loss": 2.25, "knn_k": 20}
    shown = [shown_number(name, value) for name, value in numbers.items()]
    assert shown == ["12.5 %", "2.667 %", "50 %", "2.25", "20"]


UNLABELLED = ["data=folder", "data.labels=none"]


@pytest.mark.parametrize(
    ("trained", "measured", "split", "num_images", "trained_on"),
    [
        ([], [], "eval", 18, 0),
        ([], [], "train", 36, 36),
        ([], ["data.eval_split=train"], "eval", 36, 36),
        (["data.holdout=10"], [], "eval", 10, 0),
        (["data.holdout=10"], ["data.holdout=0"], "eval", 18, 0),
        (["data.holdout=10"], ["data.holdout=0"], "train", 36, 26),
        ([], ["data.holdout=10"], "eval", 10, 10),
        (["data.labels_per_class=2"], ["data.labels_per_class=null"], "train", 36, 6),
        (["data.labels_per_class=2"], ["data.holdout=35", "data.labels_per_class=null"], "eval", 35, None),
    ],
)
def test_images_that_were_trained_on_are_counted(
    trained: list[str], measured: list[str], split: str, num_images: int, trained_on: int | None,
    photos: Path, tiny_recipe: Build,
) -> None:  # fmt: skip
    data = ["data=folder", f"data.root={photos}", "data.num_images=null"]
    run, recipe = tiny_recipe(*data, *trained), tiny_recipe(*data, *trained, *measured)
    source = recipe.open_split(split)
    fingerprint = run.open_split("train").fingerprint()
    record = measured_on(recipe, split, source, [(run, fingerprint)])
    assert record["num_images"] == num_images
    assert record["split"] == split
    assert record["holdout"] == recipe.data.holdout
    assert record["fingerprint"] == source.fingerprint()
    assert record["root"].startswith(str(photos))
    if trained_on is None:
        # Six of 36 were trained on, and the holdout leaves out one.
        assert record["trained_on"] in (5, 6)
    else:
        assert record["trained_on"] == trained_on
    assert ("training images" in in_words(record)) == bool(record["trained_on"])


def test_data_that_has_moved_or_changed(photos: Path, tiny_recipe: Build, tmp_path: Path) -> None:
    run = tiny_recipe("data=folder", f"data.root={photos}", "data.holdout=10", "data.num_images=null")
    fingerprint = run.open_split("train").fingerprint()
    shutil.copytree(photos, tmp_path / "moved")
    shutil.rmtree(photos)
    moved = tiny_recipe("data=folder", f"data.root={tmp_path / 'moved'}", "data.num_images=null")
    for split, expected in (("train", 36), ("eval", None)):
        record = measured_on(moved, split, moved.open_split(split), [(run, fingerprint)])
        assert record["trained_on"] == expected
    (tmp_path / "moved").rename(photos)
    (photos / "train" / "blue" / "0.png").unlink()
    # Another draw than the one that was trained on; nobody knows which images those were.
    for split, expected in (("train", 25), ("eval", None)):
        record = measured_on(run, split, run.open_split(split), [(run, fingerprint)])
        assert record["trained_on"] == expected


def test_windows_of_a_file_that_was_trained_on_are_counted(tiny_recipe: Build, tmp_path: Path) -> None:
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.zeros((40, 40 + 20 * number, 3), np.uint16))
    data = [
        "data=folder",
        f"data.root={tmp_path}",
        "data.range=dtype",
        "data.tile=40",
        "data.num_images=null",
    ]
    run = tiny_recipe(*data, "data.holdout=2")
    training = run.open_split("train")
    fingerprint = training.fingerprint()
    record = measured_on(run, "eval", run.open_split("eval"), [(run, fingerprint)])
    assert (record["root"], record["trained_on"]) == (str(tmp_path), 0)
    # Other windows show what those of training do.
    shifted = tiny_recipe(*data, "data.stride=20")
    source = shifted.open_split("train")
    counts = {0: 1, 1: 2, 2: 3, 3: 4}
    expected = sum(
        counts[int(name[0])]
        for name in {training.name(index) for index in range(len(training))}
        if name.endswith("#0,0")
    )
    record = measured_on(shifted, "train", source, [(run, fingerprint)])
    assert (record["num_images"], record["trained_on"]) == (10, expected)
    # Without windows, too.
    whole = tiny_recipe(*data, "data.tile=null")
    assert measured_on(whole, "train", whole.open_split("train"), [(run, fingerprint)])["trained_on"] == 2


def test_a_mark_and_a_phrase() -> None:
    record = {"data": "folder", "root": "/photos/val", "split": "eval", "holdout": 0, "num_images": 2000,
              "fingerprint": "abc", "trained_on": 0}  # fmt: skip
    assert in_words(record) == "2,000 images of /photos/val, split eval, fingerprint abc"
    assert in_words(record, whole_path=False) == "2,000 images of val, split eval, fingerprint abc"
    assert training_mark(record) == training_mark(None) == training_mark({**record, "trained_on": None}) == ""
    assert training_mark({**record, "trained_on": 2000}) == "training images"
    assert training_mark({**record, "trained_on": 1500}) == "1,500 of 2,000 are training images"
