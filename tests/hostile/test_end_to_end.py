"""A folder of everything odd: training goes through, each bad file is named, and so it is everywhere else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_images import BOMBS, ODD, encoded, noise

from etpp_ssl.cli import main
from etpp_ssl.commands.prepare import PrepareConfig, prepare
from etpp_ssl.data.sources.folder import FileListConfig, FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.evaluation.features import read_embeddings
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder

NAMES = [
    b"line\nbreak.png",
    b"two\r\nlines.png",
    b"quote'\".png",
    b"back\\slash.png",
    b"tab\t.png",
    b"caf\xe9.png",
    b"\xff\xfe.png",
    "\u2028\u202e😀.png".encode(),
    b"escape\x1b[31m.png",
    b"<script>alert(1)<.png",
    b"%s{}$HOME`id`;.png",
    b"-o.png",
    b"n" * 251 + b".png",
]
"""Of good images."""
BAD_NAMES = [b"bad\nline.png", b"bad\xe9.png", b"bad'\".png"]
KEYS: dict[str, Any] = {"in_chans": 3, "image_size": (16, 24), "seed": 0}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")


def write(folder: Path, name: bytes, content: bytes) -> None:
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(content)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Good, odd and bad images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        write(folder, name, encoded(noise(seed=number), "PNG"))
    for name in BAD_NAMES:
        write(folder, name, b"no picture")
    for name, make in ODD.items():
        (folder / name).write_bytes(make())
    for name, make in BOMBS.items():
        (folder / name).write_bytes(make(30_000, 30_000))
    (folder / "text.png").write_text("text")
    (folder / "nothing.jpg").touch()
    (folder / "cut.png").write_bytes(encoded(noise(), "PNG")[:200])
    (folder / "cut.jpg").write_bytes(encoded(noise(size=(200, 100)), "JPEG")[:900])
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "up").symlink_to(folder, target_is_directory=True)
    return folder


NUM_BAD = len(BAD_NAMES) + len(BOMBS) + 7
NUM_BAD_HEADERS = NUM_BAD - 2
"""Of those two that are cut short the header is whole."""
NUM_IMAGES = len(NAMES) + len(ODD) + NUM_BAD


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def run_of(recipe: Recipe, tmp_path: Path) -> str:
    recipe.save(tmp_path / "recipe.yaml")
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_training_goes_through_and_names_every_bad_file(
    decoder: str,
    images: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    data = ["data=folder", f"data.root={images}", "data.max_bad_share=1", f"data.decoder={decoder}"]
    workers = "2" if decoder == "pillow" else "0"
    recipe = tiny_recipe(*data, f"data.num_workers={workers}", "budget_epochs=3", "curriculum=constant")
    assert command("pretrain", run_of(recipe, tmp_path)) == 0
    said = capsys.readouterr()
    told = [line for line in (said.out + said.err).splitlines() if "unreadable image" in line]
    assert len(told) == NUM_BAD
    for name in (*BOMBS, "text.png", "nothing.jpg", "cut.png", "cut.jpg", "pipe.png", "zero.png", "gone.png"):
        assert sum(f"unreadable image '{name}': " in line for line in told) == 1, name
    assert any("unreadable image 'bad\\nline.png'" in line for line in told)
    assert any("unreadable image 'bad\\\\xe9.png'" in line for line in told)
    assert "Traceback" not in said.out + said.err
    run = RunFolder(tmp_path / "run")
    assert run.metrics()[-1]["bad_images"] == NUM_BAD
    state = run.trained(pytest.fail).state()
    assert len(state["state"]["bad_images"]) == NUM_BAD


def test_names_of_any_bytes_go_through_every_command(
    images: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["data=folder", f"data.root={images}", "data.max_bad_share=1", "data.holdout=12"]
    recipe = tiny_recipe(*data, "budget_epochs=1", "curriculum=constant", "probe=reconstruction")
    assert command("pretrain", run_of(recipe, tmp_path)) == 0
    run = str(tmp_path / "run")
    assert command("embed", run) == 0
    assert command("reconstruct", run, "--count", "4") == 0
    assert command("report", run) == 0
    assert command("export", run) == 0
    capsys.readouterr()
    embedded = read_embeddings(tmp_path / "run" / "embeddings" / "train.safetensors")
    source = FolderConfig(root=str(images)).open("train", **KEYS)
    assert set(embedded.names) <= {source.name(index) for index in range(len(source))}
    assert len(set(embedded.names)) == len(embedded.names)
    page = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page


def test_folder_list_and_shards_agree_about_names(images: Path, tmp_path: Path) -> None:
    folder = FolderConfig(root=str(images)).open("train", **KEYS)
    one_line = [file for file in folder.files if "\n" not in file and "\t" not in file]
    with (tmp_path / "list.txt").open("wb") as file:
        file.write(b"\n".join(os.fsencode(name) for name in one_line))
    listed = FileListConfig(file=str(tmp_path / "list.txt"), root=str(images)).open("train", **KEYS)
    assert listed.files == one_line
    (split,) = prepare(images, tmp_path / "shards", PrepareConfig(skip_bad=True), lambda done, total: None)
    assert len(split.bad) == NUM_BAD
    shards = ShardsConfig(root=str(tmp_path / "shards")).open("train", **KEYS)
    bad = {name for name, _ in split.bad}
    assert shards.files == [f for i, f in enumerate(folder.files) if folder.name(i) not in bad]
    for name in NAMES:
        place = shards.files.index(os.fsdecode(name))
        assert shards.read(place) == (images / os.fsdecode(name)).read_bytes()
    prints = {folder.fingerprint(), listed.fingerprint(), shards.fingerprint()}
    assert len(prints) == 3
    # What is not there cannot be read; what was renamed is other data.
    os.rename(images / os.fsdecode(NAMES[0]), images / "line break.png")
    assert FolderConfig(root=str(images)).open("train", **KEYS).fingerprint() not in prints


def test_prepare_names_bad_files_on_one_line_each(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ((), ("--size", "16")):
        out = tmp_path / f"shards{len(options)}"
        assert command("prepare", str(images), str(out), "--workers", "1", *options) == 0
        said = capsys.readouterr()
        found, *told = said.err.splitlines()
        assert found.startswith(f"etpp: {NUM_IMAGES} images in ")
        assert all(line.startswith("etpp: kept as it is: ") for line in told)
        # Of copied bytes only the header is read: what is damaged behind it is not known.
        # Two of the odd ones have 16 bits, which JPEG does not.
        assert len(told) == (NUM_BAD + 2 if options else NUM_BAD_HEADERS)
        assert f"{len(told)} bad" in said.out
        index = json.loads((out / "index.json").read_text(encoding="utf-8"))
        assert len(index["bad"]) == len(told)
    assert any("'bad\\nline.png'" in line for line in told)
    assert "data.max_pixels" in "".join(told)


def test_too_many_bad_files_end_the_run_with_one_sentence(
    images: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["data=folder", f"data.root={images}", "data.max_bad_share=0.05", "curriculum=constant"]
    assert command("pretrain", run_of(tiny_recipe(*data), tmp_path)) != 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert "images are unreadable, more than data.max_bad_share 0.05 allows; the last one is " in line
