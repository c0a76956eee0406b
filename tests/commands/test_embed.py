"""Features in a file: what is in it, what a reader without this package finds, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from PIL import Image
from safetensors.torch import save_file

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
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
