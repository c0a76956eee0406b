"""Images named by a text file, and the sentences for lists that are not right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.formats import url
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.loader import BatchBuilder, evaluation_requests, load_batches
from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.data.sources.folder import FileListConfig, FileSource
from etpp_ssl.data.views import EvalView


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images, a.png to f.png, four to nine pixels wide."""
    for number, letter in enumerate("abcdef"):
        Image.new("RGB", (4 + number, 3), (number, 0, 0)).save(tmp_path / f"{letter}.png")
    return tmp_path


def write_list(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def open_list(split: str = "train", **settings: Any) -> FileSource:
    return FileListConfig(**settings).open(split, in_chans=3, image_size=(8, 8), seed=0)


def sentence(split: str = "train", **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        open_list(split, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def widths(source: FileSource) -> list[int]:
    return [source.open(index).channels()[0].width for index in range(len(source))]


def labels_of(source: FileSource) -> list[int]:
    return [source.label(index) for index in range(len(source))]


def test_a_list_without_classes_keeps_its_order(folder: Path) -> None:
    source = open_list(file=write_list(folder / "list.txt", "c.png\na.png\nb.png\n"))
    assert source.classes is None
    assert [source.name(i) for i in range(3)] == ["c.png", "a.png", "b.png"]
    assert widths(source) == [6, 4, 5]
    assert labels_of(source) == [-1, -1, -1]


def test_a_list_with_classes_numbers_them_alphabetically(folder: Path) -> None:
    source = open_list(file=write_list(folder / "list.txt", "c.png\tpine\na.png\toak\nb.png\tpine\n"))
    assert source.classes == ["oak", "pine"]
    assert labels_of(source) == [1, 0, 1]
    assert widths(source) == [6, 4, 5]


def test_comments_empty_lines_windows_line_ends_and_a_byte_order_mark_are_skipped(folder: Path) -> None:
    text = "\ufeffa.png\toak \r\n# a comment\r\n\r\n   \r\nb.png\tscots pine"
    source = open_list(file=write_list(folder / "list.txt", text))
    assert source.files == ["a.png", "b.png"]
    assert source.classes == ["oak", "scots pine"]
    assert widths(source) == [4, 5]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_list_with_a_byte_order_mark_is_read_by_it(folder: Path, encoding: str) -> None:
    """What Excel and PowerShell write."""
    mark = "\ufeff" if encoding.endswith("e") else ""
    text = f"{mark}a.png\toak\r\nb.png\tÖlbaum\r\n".encode(encoding)
    source = open_list(file=write_list(folder / "list.txt", text))
    assert (source.files, source.classes) == (["a.png", "b.png"], ["oak", "Ölbaum"])
    assert widths(source) == [4, 5]


def test_a_list_in_utf16_without_a_mark_is_a_sentence(folder: Path) -> None:
    for end in ("le", "be"):
        path = write_list(folder / "list.txt", "a.png\nb.png\n".encode(f"utf-16-{end}"))
        assert "is not text in UTF-8" in sentence(file=path)
    path = write_list(folder / "list.txt", b"\xff\xfea\0b")
    assert "cannot be read" in sentence(file=path)


def test_names_may_hold_spaces_other_scripts_and_bytes_that_are_not_utf8(folder: Path) -> None:
    names = [b"two words.png", "木\u2028\x85.png".encode(), b"caf\xe9.png"]
    try:
        for number, name in enumerate(names):
            with open(bytes(folder) + b"/" + name, "wb") as file:
                Image.new("L", (20 + number, 3)).save(file, "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_list(file=write_list(folder / "list.txt", b"\n".join(names)))
    assert widths(source) == [20, 21, 22]
    for index in range(3):
        source.name(index).encode("utf-8")


def test_paths_are_relative_to_the_lists_folder_or_to_root_or_absolute(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    Image.new("RGB", (30, 3)).save(folder / "sub" / "a.png")
    lines = f"a.png\n{folder / 'b.png'}\n"
    file = write_list(folder / "sub" / "list.txt", lines)
    assert widths(open_list(file=file)) == [30, 5]
    assert widths(open_list(file=file, root=str(folder))) == [4, 5]


def test_variables_are_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_list(folder / "lists" / "list.txt", "a.png\n")
    monkeypatch.setenv("LISTS", str(folder / "lists"))
    monkeypatch.setenv("HOME", str(folder))
    assert widths(open_list(file="$LISTS/list.txt", root="~")) == [4]


def test_the_evaluation_list_uses_the_training_lists_classes_and_its_own_folder(folder: Path) -> None:
    train = write_list(folder / "train.txt", "a.png\toak\nb.png\tpine\nc.png\telm\n")
    (folder / "held").mkdir()
    Image.new("RGB", (40, 3)).save(folder / "held" / "d.png")
    held = write_list(folder / "held" / "eval.txt", "d.png\tpine\n")
    source = open_list("eval", file=train, eval_file=held)
    assert source.classes == ["elm", "oak", "pine"]
    assert labels_of(source) == [2]
    assert widths(source) == [40]
    assert len(open_list(file=train, eval_file=held)) == 3


def test_evaluation_without_a_list_says_what_would_do(folder: Path) -> None:
    message = sentence("eval", file=write_list(folder / "list.txt", "a.png\n"))
    assert "data.eval_file" in message
    assert "data.holdout" in message


def test_an_unknown_class_is_named(folder: Path) -> None:
    train = write_list(folder / "train.txt", "a.png\toak\nb.png\tpine\n")
    message = sentence("eval", file=train, eval_file=write_list(folder / "eval.txt", "c.png\tpalm\n"))
    assert "data.eval_file" in message
    assert "'palm'" in message
    bare = write_list(folder / "bare.txt", "a.png\n")
    assert "'oak'" in sentence("eval", file=bare, eval_file=train)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_lines_with_and_without_a_class_do_not_mix(folder: Path, split: str) -> None:
    mixed = write_list(folder / "mixed.txt", "a.png\toak\nb.png\n")
    whole = write_list(folder / "whole.txt", "a.png\toak\nb.png\toak\n")
    files = {"file": mixed} if split == "train" else {"file": whole, "eval_file": mixed}
    message = sentence(split, **files)
    assert ("data.file" if split == "train" else "data.eval_file") in message
    assert repr(mixed) in message
    assert "not on all" in message


def test_a_list_that_is_missing_empty_or_a_folder_is_named(folder: Path) -> None:
    good = write_list(folder / "list.txt", "a.png\n")
    empty = write_list(folder / "empty.txt", "# nothing but a comment\n\n")
    for path, reason in {
        str(folder / "missing.txt"): "No such file",
        str(folder): "Is a directory",
        empty: "no image",
    }.items():
        for split, files in {"train": {"file": path}, "eval": {"file": good, "eval_file": path}}.items():
            message = sentence(split, **files)
            assert ("data.file" if split == "train" else "data.eval_file") in message
            assert repr(path) in message
            assert reason in message
    message = sentence(file=good, root=str(folder / "gone"))
    assert "data.root" in message
    assert repr(str(folder / "gone")) in message


def test_a_line_that_names_no_file_is_an_unreadable_image(folder: Path) -> None:
    source = open_list(file=write_list(folder / "list.txt", b"a.png\ngone.png\nnull\0byte.png\n"))
    assert source.open(0).channels()
    for index in (1, 2):
        with pytest.raises(UnreadableImage):
            source.open(index).channels()


def test_the_fingerprint_depends_on_order_and_classes_but_not_on_the_folder(folder: Path) -> None:
    def fingerprint(text: str, name: str = "list.txt") -> str:
        return open_list(file=write_list(folder / name, text)).fingerprint()

    found = [
        fingerprint("a.png\nb.png\n"),
        fingerprint("b.png\na.png\n"),
        fingerprint("a.png\toak\nb.png\toak\n"),
        fingerprint("a.png\toak\nb.png\tpine\n"),
        fingerprint("a.png\n"),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint("# same images\na.png\n\nb.png", "moved/list.txt") == found[0]


# URLs.


@pytest.fixture
def storage(folder: Path) -> Any:
    """A storage in memory with the images; its files are gone after the test."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for file in folder.glob("*.png"):
        memory.pipe(f"/bucket/{file.name}", file.read_bytes())
    yield memory
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("root", [None, "memory://bucket/"])
def test_urls_are_read_through_fsspec(storage: Any, folder: Path, tmp_path: Path, root: str | None) -> None:
    before = "" if root else "memory://bucket/"
    text = f"{before}c.png\tpine\n{before}a.png\toak\n{(folder / 'b.png').as_uri()}\tpine\n"
    source = open_list(file=write_list(tmp_path / "lists/list.txt", text), root=root)
    assert widths(source) == [6, 4, 5]
    assert labels_of(source) == [1, 0, 1]
    assert source.name(1) == "memory://bucket/a.png"
    assert source.describe().startswith("3 images in ")
    assert source.stamp() is None
    deep = open_list(file=str(tmp_path / "lists/list.txt"), root=root, range=(0, 255))
    assert deep.open(2).region((0, 0, 5, 3), (5, 3)).pixels[0, 0].tolist() == [1, 0, 0]


def test_workers_read_urls_too(folder: Path, tmp_path: Path) -> None:
    def batches(text: str, num_workers: int) -> Any:
        source = open_list(file=write_list(tmp_path / "list.txt", text))
        view = EvalView((8, 8), 1.0)
        builder = BatchBuilder(source, view, KeyedOrder(6, 0))
        requests = evaluation_requests(range(6), size=(8, 8), batch_size=2)
        return list(load_batches(builder, requests, num_workers=num_workers, prefetch=2, pin_memory=False))

    files = sorted(folder.glob("*.png"))
    urls, paths = ("\n".join(names) for names in ([file.as_uri() for file in files], map(str, files)))
    for one, other in zip(batches(urls, 2), batches(paths, 0), strict=True):
        assert one.images.equal(other.images)


def test_a_file_that_is_gone_is_no_image_and_a_connection_that_fails_ends_the_run(
    storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_list(file=write_list(tmp_path / "list.txt", "memory://bucket/z.png\nmemory://bucket/a.png"))
    with pytest.raises(UnreadableImage, match=r"cannot be opened \(FileNotFoundError\)"):
        source.open(0)
    monkeypatch.setattr(FileSource, "max_bytes", 20)
    with pytest.raises(UnreadableImage, match="more than 20 bytes"):
        source.read(1)
    monkeypatch.undo()
    monkeypatch.setattr(url, "RETRY_SECONDS", 0.0)
    opened, failures = type(storage)._open, iter([TimeoutError("slow")] * 3)

    def fails(*args: Any, **kwargs: Any) -> Any:
        for failure in failures:
            raise failure
        return opened(*args, **kwargs)

    monkeypatch.setattr(type(storage), "_open", fails)
    assert source.open(1).size == (4, 3)
    failures = iter([TimeoutError("slow")] * 4)
    with pytest.raises(RunFault, match=r"a.png' cannot be read after 4 tries .TimeoutError: slow"):
        source.open(1)


def test_urls_that_cannot_be_read_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_list(tmp_path / "list.txt", "nothing://bucket/a.png\n")
    assert "data.file has URLs of nothing://, which fsspec does not open: " in sentence(file=file)
    file = write_list(tmp_path / "list.txt", "memory://bucket/a.png\n")
    assert sentence(file=file, tile=8, range=(0, 255)).startswith(
        "data.tile reads parts of files, and data.file"
    )
    assert sentence(file=file, frames="all").startswith("data.frames reads parts of files")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sentence(file=file) == (
        "data.file with URLs needs fsspec, which is not installed: pip install 'etpp-ssl[url]'"
    )
