"""`data.cache`: pictures of kept pixels are those of the files, in every crop; room, keys, runs."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY

from etpp_ssl.config import UserError
from etpp_ssl.data import cache
from etpp_ssl.data.cache import Keeping, KeptImages, KeptPicture, Row, keep, keeping
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.resize import resize
from etpp_ssl.data.sources.folder import FileSource, open_folder
from etpp_ssl.data.views import TrainView, random_crop_box
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import pretrain


def write(folder: Path) -> None:
    """Pictures of odd sizes, of each orientation, gray and in colour, and files that are no such thing."""
    generator = np.random.default_rng(0)
    for number in range(12):
        height, width = 30 + 7 * number, 101 - 5 * number
        coarse = generator.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        image.convert("L" if number == 9 else "RGB").save(folder / f"{number:02}.jpg", exif=exif, quality=95)
    Image.fromarray(generator.integers(0, 256, (40, 33, 3), dtype=np.uint8)).save(folder / "12.png")
    (folder / "13.jpg").write_bytes(b"\xff\xd8 broken")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    folder = tmp_path_factory.mktemp("files")
    write(folder)
    return open_folder("data.root", folder, Reading(3))


def kept_in(source: FileSource, where: str, at_least: tuple[int, int] = (8, 11)) -> KeptImages:
    return keep(source, Keeping(at_least, "pillow"), where, num_threads=2, say=lambda _: None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_every_crop_has_the_bits_of_the_file(files: FileSource, where: str) -> None:
    whole = kept_in(files, where)
    # As a data worker of any start method gets it.
    kept = pickle.loads(pickle.dumps(whole))
    draw, levels = random.Random(0), set()
    for index in range(len(files) - 1):
        picture, original = kept.open(index), files.open(index)
        assert isinstance(picture, KeptPicture)
        assert picture.size == original.size
        levels.add(len(picture._levels))
        for one, other in zip(picture.channels(), files.open(index).channels(), strict=True):
            assert one.mode == other.mode
            assert np.array_equal(np.asarray(one), np.asarray(other))
        for _ in range(12):
            box = random_crop_box(picture.size, (0.1, 1.0), draw)
            size = (draw.randint(8, 30), draw.randint(11, 40))
            ours, theirs = picture.region(box, size), files.open(index).region(box, size)
            assert ours.box == theirs.box
            assert torch.equal(resize(ours, size, "bicubic"), resize(theirs, size, "bicubic"))
    assert levels == {1, 2, 3}
    with pytest.raises(UnreadableImage):
        kept.open(len(files) - 1)


def test_a_reduction_that_is_not_kept_comes_from_the_file(files: FileSource) -> None:
    kept = kept_in(files, "ram", at_least=(1000, 1000))
    picture = kept.open(0)
    box, size = (0, 0, *picture.size), (20, 6)
    assert picture.region(box, size).pixels.shape == files.open(0).region(box, size).pixels.shape
    assert picture.region(box, size).pixels.shape[1] < picture.size[0]


def test_only_the_levels_that_a_stage_can_ask_for_are_kept() -> None:
    view = TrainView((224, 320), (0.2, 1.0), flip=True, lanczos=False, seed=0, decode="reduced")
    some = keeping(view, [(96, 144), (224, 320)])
    assert some.at_least == (252, 168)
    assert [some.num_levels(size, jpeg=True) for size in ((503, 400), (504, 336), (1008, 672))] == [1, 2, 3]
    assert some.num_levels((5000, 5000), jpeg=False) == 1
    full = TrainView((224, 320), (0.2, 1.0), flip=True, lanczos=False, seed=0, decode="full")
    assert keeping(full, [(96, 144)]).num_levels((5000, 5000), jpeg=True) == 1


def test_another_run_on_the_same_files_decodes_nothing(
    files: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kept_in(files, "disk")
    monkeypatch.setattr(cache, "_fill", lambda *_: pytest.fail("decoded again"))
    again = kept_in(files, "disk")
    assert again.file == first.file
    assert str(tmp_path) in again.file
    assert not list(Path(again.file).parents[1].glob(".writing-*"))
    # A file that has changed is another data set.
    path = files.folder / "12.png"
    os.utime(path, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception):
        kept_in(files, "disk")


def test_what_has_no_room_is_said_before_anything_is_decoded(
    files: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = Keeping((8, 11), "pillow").room(files)
    assert 1.0 < need / os.stat(kept_in(files, "disk").file).st_size < 1.2
    shutil.rmtree(cache.cache_folder())
    monkeypatch.setattr(cache, "_fill", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(cache.psutil, "virtual_memory", lambda: type("", (), {"available": need - 1}))
    with pytest.raises(UserError, match=r"data.cache: 14 decoded images take about .* but this machine has"):
        kept_in(files, "ram")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"has 1 kB of disk space free; use data\.cache=off"):
        kept_in(files, "disk")


def test_images_whose_changes_nobody_can_see_are_not_kept_on_disk(files: FileSource) -> None:
    class Unstamped:
        def __len__(self) -> int:
            return len(files)

    with pytest.raises(UserError, match=r"use data\.cache=ram"):
        kept_in(Unstamped(), "disk")  # type: ignore[arg-type]


def test_a_row_without_pixels_opens_the_file(files: FileSource) -> None:
    kept = KeptImages(files, np.zeros((len(files), len(Row._fields)), dtype=np.int64), os.devnull)
    assert not isinstance(kept.open(0), KeptPicture)
    assert (kept.name(0), kept.label(0), len(kept)) == (files.name(0), -1, len(files))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_has_the_same_bits(
    workers: int,
    files: FileSource,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends = []
    for where in ("off", "ram", "disk"):
        data = f"data={{name: folder, root: {files.folder}, cache: {where}, num_workers: {workers}}}"
        settings = ("batch_size=6", "data.max_bad_share=0.2", "image_size=[16, 24]", "probe=none")
        run = pretrain(tiny_recipe(f"output={tmp_path / where}", data, *settings, "budget_epochs=3"))
        ends.append((run.folder.checkpoints()[0].path / "model.safetensors").read_bytes())
    assert ends[0] == ends[1] == ends[2]
    assert capsys.readouterr().err.count("images are kept decoded in") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.cache=memory",), "data.cache"),
        (("data.cache=ram", "data.range=[0,1]"), "only photographs of 8 bits are kept"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.parse(TINY, settings)
