"""Folders of images: what is found, in which order, with which labels, and what is said when it is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sources.folder import FileSource, FolderConfig


def write_images(root: Path, *names: str | bytes) -> Path:
    """An image of its own colour and width for each name."""
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            Image.new("RGB", (4 + number, 3), (number, 2 * number, 100)).save(file, "PNG")
    return root


def open_folder(root: Path, split: str = "train", **settings: Any) -> FileSource:
    config = FolderConfig(root=str(root), **settings)
    return config.open(split, in_chans=3, image_size=(8, 8), seed=0)


def labels_of(source: FileSource) -> list[int]:
    return [source.label(index) for index in range(len(source))]


def sentence(root: Path | str, split: str = "train", **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        open_folder(Path(root), split, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_class_folders_name_the_labels_in_alphabetical_order(tmp_path: Path) -> None:
    source = open_folder(write_images(tmp_path, "dog/2.png", "cat/9.png", "cat/1.png", "ape/5.png"))
    assert source.classes == ["ape", "cat", "dog"]
    assert [source.name(i) for i in range(4)] == ["ape/5.png", "cat/1.png", "cat/9.png", "dog/2.png"]
    assert labels_of(source) == [0, 1, 1, 2]
    # Each name leads to its own picture, whose width tells in which order they were written.
    assert [source.open(i).channels()[0].width for i in range(4)] == [7, 6, 5, 4]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("b.png", "a.png"), id="flat"),
        pytest.param(("only/a.png", "only/b.png"), id="one folder is no choice of classes"),
        pytest.param(("a.png", "cat/b.png", "dog/c.png"), id="an image beside the class folders"),
    ],
)
def test_without_two_class_folders_for_all_images_there_are_no_labels(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    source = open_folder(write_images(tmp_path, *names))
    assert source.classes is None
    assert labels_of(source) == [-1] * len(names)


def test_nested_folders_belong_to_the_class_of_the_first_level(tmp_path: Path) -> None:
    source = open_folder(write_images(tmp_path, "dog/a/b/c.png", "cat/x.png", "dog/y.png"))
    assert source.classes == ["cat", "dog"]
    assert [source.name(i) for i in range(3)] == ["cat/x.png", "dog/a/b/c.png", "dog/y.png"]
    assert labels_of(source) == [0, 1, 1]


def test_labels_none_turns_class_folders_off(tmp_path: Path) -> None:
    source = open_folder(write_images(tmp_path, "cat/a.png", "dog/b.png"), labels="none")
    assert source.classes is None
    assert labels_of(source) == [-1, -1]


@pytest.mark.parametrize("synonym", ["val", "validation", "valid", "eval", "test"])
def test_a_root_with_a_folder_per_split_is_understood(tmp_path: Path, synonym: str) -> None:
    write_images(
        tmp_path, "train/cat/1.png", "train/dog/2.png", f"{synonym}/cat/3.png", f"{synonym}/dog/4.png"
    )
    train, evaluation = open_folder(tmp_path), open_folder(tmp_path, "eval")
    assert train.folder == tmp_path / "train"
    assert evaluation.folder == tmp_path / synonym
    assert train.classes == evaluation.classes == ["cat", "dog"]
    assert train.files == ["cat/1.png", "dog/2.png"]
    assert evaluation.files == ["cat/3.png", "dog/4.png"]


def test_val_is_preferred_to_test_and_a_named_split_to_both(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a.png", "val/b.png", "test/c.png", "unusual/d.png")
    assert open_folder(tmp_path, "eval").files == ["b.png"]
    assert open_folder(tmp_path, "eval", eval_split="test").files == ["c.png"]
    config = FolderConfig(root=str(tmp_path), split="unusual")
    assert config.open("train", in_chans=3, image_size=(8, 8), seed=0).files == ["d.png"]
    assert "missing" in sentence(tmp_path, "eval", eval_split="missing")


def test_a_root_that_is_the_training_folder_finds_the_evaluation_folder_beside_it(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a.png", "val/b.png")
    assert open_folder(tmp_path / "train").files == ["a.png"]
    assert open_folder(tmp_path / "train", "eval").files == ["b.png"]


def test_a_root_of_another_name_never_takes_its_neighbours_for_evaluation(tmp_path: Path) -> None:
    write_images(tmp_path, "photos/a.png", "val/b.png")
    message = sentence(tmp_path / "photos", "eval")
    assert "data.eval_split" in message
    assert "data.holdout" in message


def test_the_root_may_use_home_and_environment_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.png")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("PHOTOS", tmp_path.name)
    assert open_folder(Path("~/$PHOTOS")).files == ["a.png"]
    assert "data.root" in sentence("~no-such-user/photos")


def test_every_extension_counts_in_upper_and_lower_case_and_nothing_else_does(tmp_path: Path) -> None:
    wanted = ["a.JPG", "b.jpeg", "c.Png", "d.WEBP", "e.bmp", "f.TIF", "g.tiff", "h.gif", "i.NPY", "j.jfif"]
    wanted += ["k.avif", "l.jp2", "m.PPM", "n.pgm", "o.tga", "p.mpo", "q.jpe"]
    write_images(tmp_path, *wanted, "labels.txt", "png", "archive.tar", "r.jpg.txt", "s.png~", "t.HEIC")
    source = open_folder(tmp_path)
    assert source.files == wanted
    assert all(source.open(index).channels() for index in range(len(source)))


def test_what_was_found_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    """30 HEIC photographs and 5 PNGs trained on 5 without a word."""
    write_images(tmp_path, *(f"{number}.png" for number in range(5)), "x.JFIF", "notes", "._x.jpg", ".hidden")
    for number in range(30):
        (tmp_path / f"{number}.HEIC").touch()
    for name in ("@eaDir/0.png/SYNO.jpg", "__MACOSX/1.png", ".thumbnails/2.png", "$RECYCLE.BIN/3.png"):
        write_images(tmp_path, name)
    source = open_folder(tmp_path)
    assert len(source) == 6
    assert source.describe() == (
        f"6 images in '{tmp_path}' (5 .png, 1 .jfif; no labels); left out: 30 .heic, 1 without "
        f"extension, 1 hidden .jpg, hidden folders '$RECYCLE.BIN', '.thumbnails', '@eaDir' and 1 more"
    )
    (tmp_path / "deep" / "@EADIR").mkdir(parents=True)
    write_images(tmp_path / "deep", "@EADIR/x.png", "y.png")
    assert open_folder(tmp_path).files[-2:] == ["deep/y.png", "x.JFIF"]
    assert "left out" not in open_folder(write_images(tmp_path / "plain", "a.png")).describe()


def test_a_folder_of_other_files_says_what_they_are(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.heic").touch()
    assert "(left out: 3 .heic; looked for .apng, .avif" in sentence(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "(it is empty; looked for" in sentence(tmp_path / "empty")


def test_classes_without_images_and_what_keeps_labels_from_being_are_said(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "3.heic").touch()
    source = open_folder(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert source.describe().endswith("; left out: 1 .heic; no image in the folders emu")
    write_images(tmp_path, "stray.png")
    assert "; no labels, as 'stray.png' lies beside the folders" in open_folder(tmp_path).describe()
    assert "stray" not in open_folder(tmp_path, labels="none").describe()


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "cat/._1.png", ".cache/2.png", "dog/.thumbs/3.png", "dog/4.png")
    assert open_folder(tmp_path).files == ["cat/1.png", "dog/4.png"]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", "cat/1.png", "dog/2.png")
    elsewhere = write_images(tmp_path / "elsewhere", "3.png")
    (root / "emu").symlink_to(elsewhere, target_is_directory=True)
    (root / "dog" / "up").symlink_to(root, target_is_directory=True)
    (elsewhere / "self").symlink_to(elsewhere, target_is_directory=True)
    source = open_folder(root)
    assert source.files == ["cat/1.png", "dog/2.png", "emu/3.png"]
    assert source.open(2).channels()[0].size == (4, 3)


def test_a_link_to_nowhere_is_an_unreadable_image(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    source = open_folder(tmp_path)
    assert source.files == ["a.png", "b.png"]
    with pytest.raises(UnreadableImage, match="No such file"):
        source.open(1).channels()


def test_odd_names_load_and_can_be_written_to_logs_and_json(tmp_path: Path) -> None:
    names = [
        b"two words.png",
        b"line\nbreak.png",
        "ünïcode\u2028.png".encode(),
        b"caf\xe9/latin.png",
        b"caf\xe9/\xff\xfe.png",
    ]
    try:
        write_images(tmp_path, *names)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_folder(tmp_path)
    assert {os.fsencode(file) for file in source.files} == set(names)
    log = tmp_path / "log"
    for index in range(len(source)):
        written = names.index(os.fsencode(source.files[index]))
        assert source.open(index).channels()[0].width == 4 + written
        log.write_text(source.name(index), encoding="utf-8")
        log.write_text(json.dumps(source.name(index), ensure_ascii=False), encoding="utf-8")
    shown = {source.name(index) for index in range(len(source))}
    assert len(shown) == len(names)
    assert {"two words.png", "caf\\xe9/latin.png"} <= shown


def test_class_names_can_be_written_to_logs_too(tmp_path: Path) -> None:
    try:
        write_images(tmp_path, b"caf\xe9/1.png", b"bar/2.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_folder(tmp_path)
    assert source.classes == ["bar", "caf\\xe9"]
    assert labels_of(source) == [0, 1]


def test_a_file_that_cannot_be_read_is_an_unreadable_image_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_folder(write_images(tmp_path, "a.png", "b.png", "c.png"))
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UnreadableImage, match=r"^No such file or directory$"):
        source.open(0).channels()
    with pytest.raises(UnreadableImage, match=r"^Is a directory$"):
        source.open(1).channels()

    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    # For root, whom permissions do not stop.
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnreadableImage, match=r"^Permission denied$"):
        source.open(2).channels()


def test_a_damaged_file_is_an_unreadable_image(tmp_path: Path) -> None:
    source = open_folder(write_images(tmp_path, "a.png", "b.png"))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.png").write_bytes(b"no image at all")
    for index in range(2):
        with pytest.raises(UnreadableImage) as error:
            source.open(index).channels()
        assert str(error.value)
        assert "\n" not in str(error.value)


def test_a_wrong_root_is_one_sentence_that_names_it(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("no image here")
    for name, expected in {
        "missing": "does not exist",
        "a.png": "is not a folder",
        "empty": "no image",
        "text": "no image",
    }.items():
        message = sentence(tmp_path / name)
        assert "data.root" in message
        assert repr(str(tmp_path / name)) in message
        assert expected in message
    assert ".jpeg" in sentence(tmp_path / "text")


def test_the_fingerprint_survives_a_move(tmp_path: Path) -> None:
    before = open_folder(write_images(tmp_path / "here", "cat/1.png", "dog/2.png")).fingerprint()
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert open_folder(tmp_path / "there").fingerprint() == before


def test_the_fingerprint_tells_additions_removals_renames_and_other_labels(tmp_path: Path) -> None:
    names = ["cat/1.png", "cat/2.png", "dog/3.png"]

    def fingerprint(*names: str, **settings: Any) -> str:
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        return open_folder(write_images(root, *names), **settings).fingerprint()

    found = [
        fingerprint(*names),
        fingerprint(*names, "dog/4.png"),
        fingerprint(*names[:-1], "emu/3.png"),
        fingerprint("cat/1.png", "dog/3.png"),
        fingerprint("cat/1.png", "cat/2b.png", "dog/3.png"),
        fingerprint("cat/1.png", "dog/2.png", "dog/3.png"),
        fingerprint(*names, labels="none"),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(*reversed(names)) == found[0]


def test_the_order_is_independent_of_the_file_systems_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "cat/b.png", "cat/a.png", "cat/B.png", "dog/x/1.png", "dog/2.png", "é/1.png")
    (tmp_path / "zoo").symlink_to(tmp_path / "cat", target_is_directory=True)
    plain = open_folder(tmp_path)
    scan = os.scandir

    @contextmanager
    def backward(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scan(path) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backward)
    other = open_folder(tmp_path)
    assert plain.files == other.files == sorted(plain.files, key=os.fsencode)
    assert plain.files[:3] == ["cat/B.png", "cat/a.png", "cat/b.png"]
    assert plain.fingerprint() == other.fingerprint()
    assert labels_of(plain) == labels_of(other)


def test_cifar10_is_found_from_its_root(real_images: Path) -> None:
    train = open_folder(real_images / "cifar10")
    evaluation = open_folder(real_images / "cifar10", "eval")
    assert len(train) == 50_000
    assert len(evaluation) == 10_000
    assert train.classes == evaluation.classes
    assert train.classes is not None
    assert len(train.classes) == 10
    assert sorted(labels_of(train)) == [label for label in range(10) for _ in range(5000)]
    assert train.open(0).channels()[0].size == (32, 32)


def test_grayscale_photographs_of_imagenette_become_three_channels(real_images: Path) -> None:
    source = open_folder(real_images / "imagenette")
    gray = []
    for index, file in enumerate(source.files):
        with Image.open(source.folder / file) as image:
            if image.mode == "L":
                gray.append(index)
        if len(gray) == 3:
            break
    assert gray
    for index in gray:
        (picture,) = source.open(index).channels()
        assert picture.mode == "RGB"
        red, green, blue = picture.split()
        assert red.tobytes() == green.tobytes() == blue.tobytes()
