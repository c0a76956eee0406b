"""Reading shards: by index, from any process, and one sentence where tars and index disagree."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from etpp_ssl.commands.prepare import PrepareConfig, prepare
from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sources.shards import MAX_OPEN, ShardsConfig, ShardSource

LONG = "oak/" + 12 * "deep-folder/" + 150 * "x" + ".png"


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4 + number, 3), (number, 2 * number, 100)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w", **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **settings) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def open_shards(root: Path, split: str = "train", **settings: Any) -> ShardSource:
    config = ShardsConfig(root=str(root), **settings)
    return config.open(split, in_chans=3, image_size=(8, 8), seed=0)


def sentence(root: Path, split: str = "train", **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        open_shards(root, split, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    for number in range(6):
        path = tmp_path / "files" / ("oak" if number % 2 else "pine") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    prepare(tmp_path / "files", tmp_path / "shards", PrepareConfig(), lambda done, total: None)
    return tmp_path / "shards"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_others_are_scanned(format: int, tmp_path: Path) -> None:
    pictures = {"oak/a.png": picture(0), LONG: picture(1), "yew/\u677e.PNG": picture(2)}
    write_tar(tmp_path / "2.tar", {"yew/last.png": picture(3)}, format=format)
    write_tar(tmp_path / "1.tar", {"readme.txt": b"no image", **pictures}, format=format)
    (tmp_path / "3.tar.gz").write_bytes(b"not looked at")
    source = open_shards(tmp_path)
    assert source.files == [*pictures, "yew/last.png"]
    assert [source.read(index) for index in range(4)] == [*pictures.values(), picture(3)]
    assert source.classes == ["oak", "yew"]
    assert [source.label(index) for index in range(4)] == [0, 0, 1, 1]


def test_names_of_any_bytes_are_scanned(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.png")
    write_tar(tmp_path / "1.tar", {name: picture(1)}, format=tarfile.GNU_FORMAT)
    source = open_shards(tmp_path)
    assert source.files == [name]
    assert source.name(0) == "caf\\xe9\n.png"


def test_webdataset_labels_are_found_in_any_order(tmp_path: Path) -> None:
    members = {"b.cls": b"2", "b.png": picture(0), "c.d.png": picture(1), "c.cls": b" 0\n", "a.json": b"{}"}
    write_tar(tmp_path / "1.tar", members)
    source = open_shards(tmp_path)
    assert source.classes == ["0", "1", "2"]
    assert [source.label(index) for index in range(2)] == [2, 0]


def test_without_labels_there_are_no_classes(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", {"b.png": picture(0), "c.png": picture(1)})
    source = open_shards(tmp_path)
    assert source.classes is None
    assert source.label(1) == -1


BROKEN_TARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda root: root.mkdir(exist_ok=True), "`etpp prepare"),
    "no image": (lambda root: write_tar(root / "1.tar", {"a.txt": b""}), "no image in the tars"),
    "compressed": (lambda root: write_tar(root / "1.tar", {"a.png": b""}, "w:gz"), "uncompressed tar"),
    "no tar": (lambda root: (root / "1.tar").write_bytes(b"x" * 2000), "uncompressed tar"),
    "some labels": (
        lambda root: write_tar(root / "1.tar", {"a.png": b"", "b.png": b"", "b.cls": b"1"}),
        "'a.png'",
    ),
    "label in words": (lambda root: write_tar(root / "1.tar", {"a.png": b"", "a.cls": b"oak"}), "oak"),
    "negative label": (lambda root: write_tar(root / "1.tar", {"a.png": b"", "a.cls": b"-1"}), "start at 0"),
    "two images": (
        lambda root: write_tar(root / "1.tar", {"a.png": b"", "a.seg.png": b"", "a.cls": b"1"}),
        "has two images",
    ),
}


@pytest.mark.parametrize("name", BROKEN_TARS)
def test_tars_that_cannot_be_used_are_one_sentence(name: str, tmp_path: Path) -> None:
    make, words = BROKEN_TARS[name]
    make(tmp_path)
    assert words in sentence(tmp_path)


def test_a_tar_that_was_cut_short_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", {"a.png": picture(0), "b.png": b"x" * 20_000})
    os.truncate(path, 9_000)
    assert "cannot be read as an uncompressed tar" in sentence(tmp_path)


def change_index(folder: Path, **changes: Any) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BROKEN_INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda root: (root / "shard-000000.tar").unlink(), "cannot be read"),
    "shorter shard": (lambda root: os.truncate(root / "shard-000000.tar", 700), "has 700 bytes, but the"),
    "cut short": (lambda root: os.truncate(root / "index.json", 60), "is not an index of shards"),
    "not an object": (lambda root: (root / "index.json").write_text("[]"), "is not an index of shards"),
    "newer": (lambda root: change_index(root, version=2), "version 2"),
    "no format": (lambda root: (root / "index.json").write_text("{}"), "is not an index of shards"),
    "no rows": (
        lambda root: change_index(root, rows={"names": [], "labels": []}),
        "is not an index of shards",
    ),
}


@pytest.mark.parametrize("name", BROKEN_INDEX)
def test_an_index_that_does_not_match_is_one_sentence(name: str, prepared: Path) -> None:
    change, words = BROKEN_INDEX[name]
    change(prepared)
    message = sentence(prepared)
    assert words in message
    assert "run `etpp prepare` again" in message


def test_a_shard_that_shrinks_or_vanishes_later_makes_images_unreadable(prepared: Path) -> None:
    source = open_shards(prepared)
    os.truncate(prepared / "shard-000000.tar", 700)
    with pytest.raises(UnreadableImage, match="ends early"):
        source.read(5)
    (prepared / "shard-000000.tar").unlink()
    copy = pickle.loads(pickle.dumps(source))
    with pytest.raises(UnreadableImage, match="No such file"):
        copy.read(0)


def test_a_spawned_process_reads_the_same(prepared: Path) -> None:
    source = open_shards(prepared)
    here = [source.read(index) for index in range(6)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(source.read, range(6)) == here


def test_a_forked_process_does_not_move_the_parents_reads(prepared: Path) -> None:
    source = open_shards(prepared)
    here = [source.read(index) for index in range(6)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        there = pool.map_async(source.read, [0, 1, 2, 3, 4, 5] * 20)
        assert [source.read(index) for index in range(6)] * 20 == here * 20
        assert there.get() == here * 20


def test_threads_read_the_same_where_there_is_no_pread(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    source = open_shards(prepared)
    here = [source.read(index) for index in range(6)]
    monkeypatch.delattr(os, "pread")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, [0, 1, 2, 3, 4, 5] * 50)) == here * 50


def test_what_others_tars_hold_beside_images_is_said(tmp_path: Path) -> None:
    members = {"cat/1.png": picture(1), "dog/2.jfif": picture(2), "dog/3.heic": b"", "@eaDir/4.png": b""}
    members |= {"notes": b"", ".thumbs/5.jpg": b"", "./dog/6.json": b"{}"}
    source = open_shards(write_tar(tmp_path / "1.tar", members).parent)
    assert source.files == ["cat/1.png", "dog/2.jfif"]
    assert source.describe() == (
        f"2 images in '{tmp_path}' (1 .jfif, 1 .png; 2 classes); left out: 1 without extension, 1 .heic, "
        f"1 .json, 1 hidden .jpg, 1 hidden .png"
    )
    write_tar(tmp_path / "heic/1.tar", {"1.heic": b"", "2.heic": b""})
    assert "no image in the tars of" in sentence(tmp_path / "heic")
    assert "which hold 2 .heic" in sentence(tmp_path / "heic")


def test_few_tars_stay_open(tmp_path: Path) -> None:
    count = MAX_OPEN + 3
    for number in range(count):
        write_tar(tmp_path / f"{number:03d}.tar", {f"{number}.png": picture(number)})
    source = open_shards(tmp_path)

    def open_tars() -> int:
        links = (f"/proc/self/fd/{entry}" for entry in os.listdir("/proc/self/fd"))
        return sum(os.path.islink(link) and str(tmp_path) in os.readlink(link) for link in links)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not list open files")
    for index in (*range(count), 0, count - 1, 2):
        assert source.read(index) == picture(index)
        assert open_tars() <= MAX_OPEN
    assert open_tars() == MAX_OPEN
    del source
    assert open_tars() == 0


def test_other_data_has_another_fingerprint(prepared: Path, tmp_path: Path) -> None:
    one = open_shards(prepared).fingerprint()
    prepared.rename(tmp_path / "moved")
    assert open_shards(tmp_path / "moved").fingerprint() == one
    prints = {one}
    for number, members in enumerate(
        ({"a.png": picture(0)}, {"b.png": picture(0)}, {"a.png": picture(0) + b"."}, {"a/a.png": picture(0)})
    ):
        prints.add(open_shards(write_tar(tmp_path / f"other-{number}/1.tar", members).parent).fingerprint())
    assert len(prints) == 5


def test_evaluation_tars_lie_beside_the_training_tars(tmp_path: Path) -> None:
    for split in ("train", "val", "extra"):
        write_tar(tmp_path / split / "1.tar", {f"{split}.png": picture(1)})
    assert open_shards(tmp_path, "eval").files == ["val.png"]
    assert open_shards(tmp_path / "train", "eval").files == ["val.png"]
    assert open_shards(tmp_path, "eval", eval_split="extra").files == ["extra.png"]
    assert "data.holdout" in sentence(tmp_path, "eval", eval_split="nowhere")
