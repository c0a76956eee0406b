"""Runs on uneven classes: balanced draws, class weights and logit adjustment, the same bits after any end."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from etpp_ssl.config import UserError
from etpp_ssl.data.training import IndexedImages
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.tasks.classify import Classification
from etpp_ssl.train.launch import finetune
from etpp_ssl.train.opening import open_run

COUNTS = {"a": 20, "b": 9, "c": 1}
PLAIN = ["augment.balance=none", "augment.class_weights=none", "augment.logit_adjustment=0"]
Build = Callable[..., FinetuneRecipe]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for label, (name, count) in enumerate(COUNTS.items()):
        for split, number in (("train", count), ("val", 4)):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = draw.integers(80 * label, 80 * label + 90, (20, 26, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def on(root: Path, *overrides: str) -> list[str]:
    return ["data=folder", f"data.root={root}", "data.num_workers=0", *overrides]


def newest(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[dict[str, Any]]:
    rows = metrics(folder)
    return [{key: row[key] for key in ("step", "loss", "frequency_loss")} for row in rows if "loss" in row]


@pytest.mark.parametrize(
    "settings", [["augment.balance=uniform"], ["augment.class_weights=sqrt", "augment.logit_adjustment=0.7"]]
)
def test_a_run_resumes_to_the_same_bits_with_any_workers(
    settings: list[str],
    uneven: Path,
    tiny_classifier: Build,
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    common = on(uneven, "checkpoint.every_steps=1", "budget_epochs=2", *settings)
    finetune(tiny_classifier(f"output={tmp_path / 'whole'}", *common))
    cut = f"output={tmp_path / 'cut'}"
    with crash_after(4):
        finetune(tiny_classifier(cut, *common, "data.num_workers=2"))
    finetune(tiny_classifier(cut, *common))
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "cut")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    finetune(tiny_classifier(f"output={tmp_path / 'plain'}", *common, *PLAIN))
    assert losses(tmp_path / "plain")[-1]["loss"] != losses(tmp_path / "whole")[-1]["loss"]


def test_the_run_records_the_images_of_each_class_where_its_loss_depends_on_them(
    uneven: Path, tiny_classifier: Build, tmp_path: Path
) -> None:
    weighted = on(uneven, "augment.class_weights=uniform")
    assert open_run(tiny_classifier(*weighted)).recipe.augment.class_counts == (20, 9, 1)
    assert open_run(tiny_classifier(*on(uneven))).recipe.augment.class_counts is None
    with pytest.raises(UserError, match=r"is \[1, 2, 3\], but the classes have \[20, 9, 1\] images"):
        open_run(tiny_classifier(*weighted, "augment.class_counts=[1, 2, 3]"))


def test_logits_are_adjusted_by_the_logarithm_of_the_shares_in_training_alone(tiny_classifier: Build) -> None:
    counts = [30, 20, 10, 9, 8, 7, 6, 5, 4, 1]
    recipe = tiny_classifier(f"augment.class_counts={counts}", "augment.logit_adjustment=1.5")
    task = Classification(recipe, recipe.build_model(10), torch.device("cpu"), 10)
    logits, targets = torch.randn(4, 10), torch.rand(4, 10).softmax(1)
    found = task.losses(logits, {"targets": targets})
    prior = torch.tensor(counts) / 100
    probabilities = logits.exp() * prior**1.5
    probabilities /= probabilities.sum(1, keepdim=True)
    torch.testing.assert_close(found["loss"], -(targets * probabilities.log()).sum(1).mean())
    # Nobody said how many images there are.
    assert found.keys() == {"loss"}
    task.know_counts(counts)
    expected = -(targets * (0.9 * prior + 0.01).log()).sum(1).mean()
    torch.testing.assert_close(task.losses(logits, {"targets": targets})["frequency_loss"], expected)


def test_one_class_alone_is_refused(tiny_classifier: Build, tmp_path: Path) -> None:
    (tmp_path / "train" / "only").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "only" / "0.png")
    (tmp_path / "list.txt").write_text("train/only/0.png\tonly\n")
    listed = ["data=list", f"data.file={tmp_path / 'list.txt'}", "evaluate.split=null"]
    with pytest.raises(UserError, match="training images are all of one class, only: a classifier tells two"):
        open_run(tiny_classifier(*listed))
    # A single sub-folder is a folder of images.
    with pytest.raises(UserError, match=r"needs some, and the data has none \(two class sub-folders or more"):
        open_run(tiny_classifier(*on(tmp_path)))


@pytest.mark.parametrize("setting", ["balance=uniform", "class_weights=sqrt", "logit_adjustment=1"])
def test_images_without_labels_are_refused(setting: str, tiny_classifier: Build, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "0.png")
    recipe = tiny_classifier(
        *on(tmp_path, "evaluate.split=null", f"augment.{setting}", "model.num_classes=2")
    )
    with pytest.raises(UserError, match="and the data has none"):
        open_run(recipe)


def test_labels_that_are_known_only_on_reading_are_read_once(
    uneven: Path, tiny_classifier: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_classifier(*on(uneven, "augment.balance=uniform")).open_training()
    assert isinstance(source, IndexedImages)
    read: list[int] = []
    found = source.source.all_labels()
    assert found is not None
    labels = found.tolist()

    def label(self: object, index: int) -> int:
        read.append(index)
        return labels[index]

    monkeypatch.setattr(type(source.source), "all_labels", lambda self: None)
    monkeypatch.setattr(type(source.source), "label", label)
    assert source.class_counts(3, read=False) is None
    assert source.class_counts(4, read=True) == [20, 9, 1, 0]
    assert source.labels.tolist() == labels
    assert read == list(range(30))
    with pytest.raises(UserError, match=r"has label 2, but model.num_classes is 2"):
        source.class_counts(2, read=True)


def test_a_row_that_an_older_version_began_has_no_mean_of_a_loss_that_it_did_not_know(
    uneven: Path,
    tiny_classifier: Build,
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    recipe = tiny_classifier(*on(uneven, "checkpoint.every_steps=1", "budget_epochs=2"))
    with crash_after(2):
        finetune(recipe)
    (file,) = (tmp_path / "run" / "checkpoints" / "step-00000001").glob("state.json")
    content = json.loads(file.read_text())
    assert content["state"]["part_sums"].pop("frequency_loss") > 0
    file.write_text(json.dumps(content))
    finetune(recipe)
    first, second, *_ = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert "frequency_loss" not in first
    assert "frequency_loss" in second


@pytest.mark.parametrize("setting", ["balance=uniform", "class_weights=sqrt"])
def test_a_label_of_minus_one_is_named(
    setting: str, uneven: Path, tiny_classifier: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_classifier(*on(uneven, f"augment.{setting}"))
    monkeypatch.setattr(
        "etpp_ssl.data.sources.folder.FileSource.all_labels", lambda self: np.array([0] * 29 + [-1])
    )
    with pytest.raises(UserError, match=r"'c.0.png' has no(ne| label)"):
        open_run(recipe)


def test_more_classes_than_images_are_trained_on(
    uneven: Path, tiny_classifier: Build, tmp_path: Path
) -> None:
    settings = ["augment.class_weights=uniform", "augment.logit_adjustment=1", "model.num_classes=50"]
    finetune(tiny_classifier(*on(uneven, *settings, "augment.smoothing=0")))
    assert all(np.isfinite(list(row.values())).all() for row in losses(tmp_path / "run"))


@pytest.mark.parametrize(
    "override", ["balance=even", "class_weights=inverse", "logit_adjustment=-1", "class_counts=[3, -1]"]
)
def test_bad_values_are_named(override: str, tiny_classifier: Build) -> None:
    with pytest.raises(UserError, match=f"augment.{override.split('=')[0]}"):
        tiny_classifier(f"augment.{override}")
