"""Features in a file: what is in it, what a reader without this package finds, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image
from pyramids import know_pyramids, write_pyramid
from safetensors.torch import save_file

import etpp_ssl
from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import Place
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.evaluation.features import read_embeddings
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import pretrain


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images in two classes, one of them unreadable, one with a name that is no UTF-8."""
    root = tmp_path / "images"
    names = ["a/1.png", "a/2.png", "a/3.png", "b/one\ntwo.png", "b/4.png", "b/ünï.png", "b/\udcff.png"]
    for number, name in enumerate(names):
        file = root / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.fsencode(file), "wb") as opened:
                Image.new("RGB", (30, 20), (30 * number, 100, 9 * number)).save(opened, format="PNG")
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    (root / "train" / "a" / "2.png").write_bytes(b"no picture")
    return root


def test_a_run_is_embedded_and_read_back(
    tiny_recipe: Callable[..., Recipe],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe("budget_epochs=0.3")
    bare = pretrain(recipe).bare_model
    folder, out = str(tmp_path / "run"), tmp_path / "new" / "features.safetensors"
    arguments = ["embed", folder, "data=folder", f"data.root={images}", f"--out={out}", "--batch-size=4"]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out)
    assert "left out: 1 of 7 images cannot be read: 'a/2.png'" in printed.err
    assert re.search(r"^6 images, \d+ features of each$", printed.err, re.MULTILINE)
    assert [file.name for file in out.parent.iterdir()] == [out.name]

    source = tiny_recipe("data=folder", f"data.root={images}").data.open(
        "train", in_chans=3, image_size=recipe.size, seed=0
    )
    found = read_embeddings(out)
    readable = [index for index in range(7) if source.name(index) != "a/2.png"]
    assert found.rows.indices.tolist() == readable
    assert found.rows.labels.tolist() == [source.label(index) for index in readable]
    assert found.names == [source.name(index) for index in readable]
    assert any("\n" in name for name in found.names)
    assert found.classes == ["a", "b"]
    assert found.notes["num_unreadable"] == "1"
    assert found.notes["image_size"] == "16x24"
    assert found.notes["pool"] == "token"
    view = EvalView(recipe.size, recipe.data.crop_pct)
    normalise = Normalise(*recipe.data.statistics(3), torch.device("cpu"))
    pictures = torch.stack([view(source.open(index), index, recipe.size) for index in readable])
    with torch.inference_mode():
        expected = bare.encoder.cpu().eval()(normalise(pictures))
    assert found.rows.features.dtype == torch.float32
    torch.testing.assert_close(found.rows.features, expected)

    # The two lines of the module's docstring.
    tensors = safetensors.numpy.load_file(out)
    names = tensors["names"].tobytes().decode(errors="surrogateescape").split("\0")
    assert names == found.names
    assert tensors["features"].shape == (6, 16)


def test_windows_are_rows_with_their_places(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_pyramids(monkeypatch)
    scenes, rng = tmp_path / "scenes", np.random.default_rng(0)
    place = Place((500_000.0, 10.0, 0.0, 5_600_000.0, 0.0, -10.0), "EPSG:32633")
    for name, size, where in (("a", (40, 50), place), ("b", (30, 40), None), ("c", (32, 30), place)):
        values = rng.integers(0, 4000, (*size, 3), dtype=np.uint16)
        write_pyramid(scenes / f"{name}.pyr", values, None, where)
    (scenes / "d.pyr").write_bytes(b"PK broken")
    data = ["data=folder", f"data.root={scenes}", "data.range=[0,4000]", "data.tile=[30,30]"]
    every = ["data.num_images=null", "data.num_workers=0", "data.max_bad_share=1", "budget_epochs=4"]
    recipe = tiny_recipe(*data, *every, "batch_size=4")
    pretrain(recipe)
    assert run(["embed", str(tmp_path / "run"), "--split=train"]) == 0
    found = read_embeddings(tmp_path / "run" / "embeddings" / "train.safetensors")
    assert found.names == [
        "a.pyr#0,0", "a.pyr#0,20", "a.pyr#10,0", "a.pyr#10,20", "b.pyr#0,0", "b.pyr#0,10",
        "c.pyr#0,0", "c.pyr#2,0",
    ]  # fmt: skip
    assert found.windows is not None
    assert found.windows.corners.tolist() == [
        [0, 0], [0, 20], [10, 0], [10, 20], [0, 0], [0, 10], [0, 0], [2, 0],
    ]  # fmt: skip
    names = [found.windows.crs_names[number] for number in found.windows.crs.tolist()]
    assert names == ["EPSG:32633"] * 4 + [""] * 2 + ["EPSG:32633"] * 2
    assert found.windows.transforms[3].tolist() == list(place.at(20, 10).transform)
    assert found.windows.transforms[4:6].isnan().all()
    assert not found.windows.transforms[[0, 1, 2, 3, 6, 7]].isnan().any()
    # What a reader without this package finds.
    tensors = safetensors.numpy.load_file(tmp_path / "run" / "embeddings" / "train.safetensors")
    assert tensors["corners"].tolist() == found.windows.corners.tolist()
    # A file's windows have their own pixels, and their own features.
    source, view = recipe.open_split("train"), EvalView(recipe.size, recipe.data.crop_pct)
    views = torch.stack([view(source.open(index), index, recipe.size) for index in range(8)])
    encoder = etpp_ssl.load(tmp_path / "run")
    assert found.rows.indices.tolist() == list(range(8))
    assert len(found.rows.features.unique(dim=0)) == 8
    with torch.inference_mode():
        normalised = recipe.normaliser(torch.device("cpu"))(views)
    torch.testing.assert_close(encoder.embed(normalised), found.rows.features)
    # Whole files have no corners.
    assert (
        run(["embed", str(tmp_path / "run"), "--split=train", "data.tile=null", f"--out={tmp_path / 'w'}"])
        == 0
    )
    assert read_embeddings(tmp_path / "w").windows is None


def test_other_splits_pools_and_places(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny_recipe("budget_epochs=0.3"))
    folder = tmp_path / "run"
    assert run(["embed", str(folder), "--split=eval", "--pool=avg"]) == 0
    file = folder / "embeddings" / "eval.safetensors"
    assert capsys.readouterr().out.strip() == str(file)
    run_features = read_embeddings(file)
    assert run_features.rows.features.shape == (24, 16)
    assert run_features.notes["pool"] == "avg"
    assert "checkpoints/step-" in run_features.notes["weights"]

    tiny_recipe("output=elsewhere").save(tmp_path / "recipe.yaml")
    other = tmp_path / "other.safetensors"
    recipe_arguments = ["embed", str(tmp_path / "recipe.yaml"), "--split=eval", "--pool=avg"]
    assert run([*recipe_arguments, f"init={folder}", f"--out={other}"]) == 0
    assert torch.equal(read_embeddings(other).rows.features, run_features.rows.features)
    capsys.readouterr()
    for arguments, words in (
        ([*recipe_arguments, f"--out={other}"], "init=WEIGHTS"),
        ([*recipe_arguments, f"init={folder}"], "--out"),
        (["embed", str(tmp_path / "nowhere")], "does not exist"),
        (["embed", str(folder), f"--out={tmp_path / 'recipe.yaml' / 'x'}"], "cannot be written"),
        (["embed", str(folder), f"--out={tmp_path}"], "is a folder"),
    ):
        assert run(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert words in error[-1]
        assert error[-1].startswith("etpp: error: ")


def test_a_folder_of_images_is_embedded_as_the_run_sees_its_own(
    tiny_recipe: Callable[..., Recipe], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny_recipe("budget_epochs=0.3"))
    folder = tmp_path / "run"
    place = images.rename(images.with_name("set 1"))
    assert run(["embed", str(folder), str(place / "train")]) == 0
    (file,) = (folder / "embeddings").iterdir()
    assert file.name.startswith("train-")
    found = read_embeddings(file)
    assert len(found.names) == 6
    assert found.notes["root"] == str(place / "train")
    assert found.notes["trained_on"] == "0"
    assert run(["embed", str(folder), str(tmp_path / "nowhere")]) == 2
    assert "nowhere' does not exist" in capsys.readouterr().err


def test_what_holds_no_embeddings_is_refused(tmp_path: Path) -> None:
    save_file({"features": torch.zeros(1, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="it lacks indices, labels, names"):
        read_embeddings(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text(json.dumps({}))
    for name in ("b.safetensors", "c.safetensors"):
        with pytest.raises(UserError, match="cannot be read"):
            read_embeddings(tmp_path / name)
