"""Features beside a run: they are used again where nothing has changed, and only there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from etpp_ssl.cli import main
from etpp_ssl.evaluation import feature_cache
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import pretrain

KNN = ["probe=knn", "probe.k=3"]
HEADS = ["probe=linear_cached", "probe.epochs=2", "probe.base_lrs=[0.01]", "probe.weight_decays=[0]"]


@pytest.fixture
def train(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Path]:
    """The folder of a run on two classes of pictures in files."""
    draw = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        low = 60 * (number % 2)
        Image.fromarray(draw.integers(low, low + 180, (16, 24, 3), dtype=np.uint8)).save(file)
    data = ["data=folder", f"data.root={tmp_path}/photos", "data.holdout=12", "data.num_workers=0"]
    return lambda *overrides: pretrain(tiny_recipe(*data, "budget_epochs=1", *overrides)).folder.path


@pytest.fixture
def run(train: Callable[..., Path]) -> Path:
    return train()


def probe(run: Path, *overrides: str) -> dict[str, float]:
    with pytest.raises(SystemExit) as ended:
        main(["probe", str(run), *overrides])
    assert not ended.value.code
    row = json.loads((run / "report" / "probes.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in row.items() if key.startswith(("knn", "linear"))}


def kept(run: Path) -> list[Path]:
    return sorted((run / "report" / "features").glob("*"))


def spoil(files: list[Path]) -> None:
    """Make features of which every probe makes class 0."""
    for file in files:
        tensors = load_file(file)
        tensors["features"] = torch.ones_like(tensors["features"])
        save_file(tensors, file)


def test_a_second_probe_uses_what_the_first_one_extracted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knn = probe(run, *KNN)
    assert "of an earlier probe" not in capsys.readouterr().err
    heads = probe(run, *HEADS)
    assert capsys.readouterr().err.count("of an earlier probe") == 2
    # Training and evaluation images, the same for both.
    assert len(kept(run)) == 2
    assert (probe(run, *KNN), probe(run, *HEADS)) == (knn, heads)
    spoil(kept(run))
    assert probe(run, *KNN) != knn
    assert probe(run, *HEADS) != heads


@pytest.mark.parametrize(
    "override", ["data.crop_pct=0.5", "probe.pool=avg", "probe.precision=bf16", "data.mean=[0, 0, 0]"]
)
def test_other_settings_are_extracted_anew(override: str, run: Path) -> None:
    fresh = probe(run, *KNN, override)
    shutil.rmtree(run / "report" / "features")
    probe(run, *KNN)
    spoil(kept(run))
    assert probe(run, *KNN, override) == fresh
    assert len(kept(run)) == 4


def test_other_pictures_under_old_names_are_extracted_anew(run: Path, tmp_path: Path) -> None:
    knn = probe(run, *KNN)
    spoil(kept(run))
    for file in (tmp_path / "photos").rglob("*.png"):
        os.utime(file, (1, 1))
    assert probe(run, *KNN) == knn


def test_other_weights_are_extracted_anew(train: Callable[..., Path], run: Path, tmp_path: Path) -> None:
    other = train("budget_epochs=2", f"output={tmp_path / 'other'}")
    fresh = probe(other, *KNN)
    shutil.rmtree(other / "report" / "features")
    probe(run, *KNN)
    spoil(kept(run))
    shutil.copytree(run / "report" / "features", other / "report" / "features")
    assert probe(other, *KNN) == fresh
    assert len(kept(other)) == 4


def test_a_damaged_file_counts_as_none_and_unreadable_images_are_tried_again(
    run: Path, tmp_path: Path
) -> None:
    knn = probe(run, *KNN)
    for file in kept(run):
        file.write_bytes(file.read_bytes()[:-7])
    assert probe(run, *KNN) == knn
    assert len(kept(run)) == 2
    for file in kept(run):
        file.unlink()
    bad = tmp_path / "photos" / "a" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    probe(run, *KNN, "data.max_bad_share=1")
    assert len(kept(run)) == 1


def test_the_files_have_a_bound_and_the_oldest_go(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(run, *KNN)
    first = kept(run)
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 2 * max(file.stat().st_size for file in first))
    for number, file in enumerate(first):
        os.utime(file, (number, number))
    probe(run, *KNN, "data.crop_pct=0.5")
    assert sum(file.stat().st_size for file in kept(run)) <= feature_cache.MOST_BYTES
    assert not set(first) <= set(kept(run))
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 100)
    there = kept(run)
    probe(run, *KNN, "data.crop_pct=0.6")
    assert kept(run) == there
