"""Names as arrays, and the index that they are kept in: equal to the plain definition, current, shared."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sources import kept_index, list_file, names
from etpp_ssl.data.sources.folder import FileListConfig, FileSource, FolderConfig
from etpp_ssl.data.sources.found import extension_of, find_images
from etpp_ssl.data.sources.names import Names, NamesWriter, count_extensions, label_counts, small_labels

HOSTILE = (
    "a-b/x.jpg", "a/x.jpg", "a/b.jpg", "a/b/z.JPG", "a/b.c/y.png", "a/ü .tif", "a/line\nbreak\t.png",
    "a/\udcff\udcfe.png", "a/jpg.jpg/q.jpeg", "b/" + "d/" * 30 + "deep.bmp", "b/x.nii.gz", "b/no.such.webp",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_index, "_anew", None)
    return tmp_path / "cache" / "etpp" / "names"


def long_ago(*paths: Path) -> None:
    """An index of what changed a moment ago is not trusted."""
    for path in paths:
        os.utime(path, (1e9, 1e9))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in HOSTILE:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "images" / "b" / "again").symlink_to(tmp_path / "images" / "a")
    (tmp_path / "images" / "b" / "note.txt").touch()
    age(tmp_path / "images")
    return tmp_path / "images"


def age(folder: Path) -> None:
    long_ago(folder, *(Path(where) for where, _, _ in os.walk(folder)))


def open_folder(folder: Path, **settings: Any) -> FileSource:
    return FolderConfig(root=str(folder), **settings).open("train", in_chans=3, image_size=(8, 8), seed=0)


def open_list(path: Path, split: str = "train", **settings: Any) -> FileSource:
    config = FileListConfig(file=str(path), **settings)
    return config.open(split, in_chans=3, image_size=(8, 8), seed=0)


def twin_of_hash(files: list[str], labels: list[int]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for file, label in zip(files, labels, strict=True):
        digest.update(os.fsencode(file) + b"\0%d\n" % label)
    return digest.hexdigest()


def content(source: FileSource) -> tuple[Any, ...]:
    labels = [source.label(index) for index in range(len(source))]
    assert source.all_labels().tolist() == labels
    assert source.fingerprint() == twin_of_hash(list(source.files), labels)
    return list(source.files), labels, source.classes, source.fingerprint(), source.describe()


def no_scan(*args: Any) -> Any:
    raise AssertionError("the names were read again")


def test_a_folder_from_its_index_is_the_folder(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    plain = open_folder(folder)
    files = sorted(HOSTILE, key=os.fsencode)
    assert content(plain)[:2] == (files, [["a", "a-b", "b"].index(file.split("/")[0]) for file in files])
    index = str(tmp_path / "own" / "photos.index")
    first = open_folder(folder, index=index)
    monkeypatch.setattr("etpp_ssl.data.sources.folder_names.find_images", no_scan)
    assert content(plain) == content(first) == content(open_folder(folder, index=index))
    assert "1 .gz" not in plain.describe()
    assert os.listdir(tmp_path / "own") == ["photos.index"]


def test_linked_folders_and_their_order_are_those_of_a_walk_one_by_one(tmp_path: Path) -> None:
    """The first path of a folder in the order of names counts, however fast the others are listed."""
    for name in ("z/real", "m"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(30):
        (tmp_path / "z" / "real" / f"{number}.jpg").touch()
    (tmp_path / "m" / "link").symlink_to(tmp_path / "z" / "real")
    (tmp_path / "m" / "up").symlink_to(tmp_path)
    found = find_images(tmp_path)
    assert {os.path.dirname(path) for path in found.paths()} == {"m/link"}
    assert found.paths() == sorted(found.paths())


def test_a_list_from_its_index_is_the_list(tmp_path: Path, monkeypatch: Any) -> None:
    lines = [
        b"b.jpg\toak", b"# no", b"", b" a.jpg \t elm ", b"n\0ull.jpg\toak", b"\xff\xfe.png\toak\r",
        b"s3x://host/c.png\telm", "ü.tif\t\u3000elm\u3000".encode(), b"\toak", b"x.jpeg\tn\xe9",
    ]  # fmt: skip
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    long_ago(path)
    monkeypatch.setattr("etpp_ssl.data.sources.folder.check_urls", lambda key, starts: None)
    monkeypatch.setattr(list_file, "BLOCK", 7)
    plain = open_list(path)
    assert list(plain.files) == [
        "b.jpg", "a.jpg", "n\0ull.jpg", "\udcff\udcfe.png", "s3x://host/c.png", "ü.tif", "", "x.jpeg",
    ]  # fmt: skip
    assert plain.classes == ["elm", "n\\xe9", "oak"]
    assert [plain.label(index) for index in range(8)] == [2, 0, 2, 2, 0, 0, 2, 1]
    assert plain.files.facts.schemes == ["s3x"]
    first = open_list(path, index=str(tmp_path / "i"))
    monkeypatch.setattr(list_file, "_read", no_scan)
    assert content(plain) == content(first) == content(open_list(path, index=str(tmp_path / "i")))


def test_a_list_without_oddities_is_read_as_one_with_them(tmp_path: Path) -> None:
    """Whole blocks at once, or line by line where a comment, a space or an end of Windows is in the block."""
    rows = [
        (f"d/{'x' * (i % 7)}{i}.{['jpg', 'JPG', 'png'][i % 5 % 3]}", f"c{i * i % 11}") for i in range(200)
    ]
    for text in ("\n".join("\t".join(row) for row in rows), "\n".join(name for name, _ in rows)):
        found = []
        for end in ("", "\n", "\n# odd"):
            path = tmp_path / "list.txt"
            path.write_text(text + end)
            found.append(content(open_list(path)))
        assert found[0] == found[1] == found[2]
        assert found[0][0] == [name for name, _ in rows]


def test_many_classes_and_many_names_are_kept_by_themselves(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More classes than an int16 numbers; the list is above the size from which an index is kept."""
    count = 33_000
    path = tmp_path / "list.txt"
    path.write_text("".join(f"a-folder-of-a-class-{i:05d}/{'x' * 90}.jpg\tc{i:05d}\n" for i in range(count)))
    long_ago(path)
    first = open_list(path)
    assert [file.suffix for file in cache.iterdir()] == [".index"]
    monkeypatch.setattr(list_file, "_read", no_scan)
    again = open_list(path)
    assert again.files.labels.dtype == np.int32
    assert again.label(count - 1) == count - 1
    assert again.name(count - 1).startswith("a-folder-of-a-class-32999/x")
    assert again.files == first.files
    assert len(pickle.dumps(again.files)) < 500
    copy = pickle.loads(pickle.dumps(again.files))
    assert copy[12_345] == again.files[12_345]
    assert copy.label(12_345) == 12_345


def test_small_sets_leave_nothing(folder: Path, tmp_path: Path) -> None:
    open_folder(folder)
    (tmp_path / "list.txt").write_text("a.jpg\n")
    open_list(tmp_path / "list.txt")
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_many_names_is_kept(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etpp_ssl.data.sources.folder_names.KEPT_FROM", 3)
    first = content(open_folder(folder))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("etpp_ssl.data.sources.folder_names.find_images", no_scan)
    assert content(open_folder(folder)) == first


@pytest.mark.parametrize("aged", [True, False])
def test_what_changes_is_found(folder: Path, tmp_path: Path, aged: bool) -> None:
    """A change within the resolution of the times is found, too: the index is not trusted so soon."""
    index = str(tmp_path / "i")
    if not aged:
        os.utime(folder / "a")
    before = open_folder(folder, index=index)
    status = os.stat(folder / "a")
    (folder / "a" / "new.jpg").touch()
    if not aged:
        os.utime(folder / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    after = open_folder(folder, index=index)
    assert set(after.files) - set(before.files) == {"a/new.jpg"}
    assert after.fingerprint() != before.fingerprint()
    # The older map stays what it was.
    assert list(before.files) == sorted(HOSTILE, key=os.fsencode)


def test_rescan_reads_once_more_and_once_only(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    index = tmp_path / "i"
    open_folder(folder, index=str(index))
    number = index.stat().st_ino
    kept_index.rescan()
    open_folder(folder, index=str(index))
    assert index.stat().st_ino != number
    monkeypatch.setattr("etpp_ssl.data.sources.folder_names.find_images", no_scan)
    open_folder(folder, index=str(index))
    # Another process of the same launch takes what the first has built.
    kept_index.rescan()
    monkeypatch.setenv("LOCAL_RANK", "1")
    open_folder(folder, index=str(index))


def test_an_index_that_is_something_else_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "c").mkdir(parents=True)
    (other / "c" / "x.jpg").touch()
    index = tmp_path / "i"
    open_folder(other, index=str(index))
    kept = index.read_bytes()
    with pytest.raises(UserError, match=rf"data.index '{index}' is the index of other data \('{other}'\)"):
        open_folder(folder, index=str(index))
    assert index.read_bytes() == kept
    text = tmp_path / "text"
    text.write_text("mine" * 20)
    with pytest.raises(UserError, match="is a file, but not an index of names"):
        open_folder(folder, index=str(text))
    assert text.read_text() == "mine" * 20


@pytest.mark.parametrize("cut", [0, 1, 40, 10_000])
def test_a_damaged_index_in_the_cache_is_written_anew(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr("etpp_ssl.data.sources.folder_names.KEPT_FROM", 1)
    first = content(open_folder(folder))
    (index,) = cache.iterdir()
    whole = index.read_bytes()
    index.write_bytes(whole[: max(0, len(whole) - cut)] if cut else whole[:-3] + b"xyz")
    assert content(open_folder(folder)) == first
    assert len(index.read_bytes()) == len(whole)


def test_without_a_place_for_the_index_a_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = content(open_folder(folder))
    (tmp_path / "file").touch()
    assert content(open_folder(folder, index=str(tmp_path / "file" / "i"))) == wanted
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("data: the index of names cannot be kept (")
    assert "File exists" in said

    class Full:
        name = "disk"

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    plain = NamesWriter.__init__
    monkeypatch.setattr(NamesWriter, "__init__", lambda self, file: plain(self, file and Full()))
    assert content(open_folder(folder, index=str(tmp_path / "i"))) == wanted
    assert capsys.readouterr().err.endswith("No space left on device); each start reads them anew\n")
    assert not list(tmp_path.glob("*.lock"))
    assert not list(tmp_path.glob(".*i*"))


def test_a_scan_that_is_interrupted_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = tmp_path / "own"
    around.mkdir()
    (around / ".writing-i-1234").touch()  # Of one that was killed.
    with monkeypatch.context() as patch:
        patch.setattr(NamesWriter, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_folder(folder, index=str(around / "i"))
    assert os.listdir(around) == []
    assert len(open_folder(folder, index=str(around / "i"))) == len(HOSTILE)
    assert os.listdir(around) == ["i"]


def test_of_several_that_need_an_index_one_builds_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here threads stand for processes: each has a lock of its own."""
    built: list[int] = []
    opened: list[str] = []

    def open_one() -> None:
        opened.append(open_folder(folder, index=str(index)).fingerprint())

    finish = NamesWriter.finish
    monkeypatch.setattr(NamesWriter, "finish", lambda *args: (built.append(1), finish(*args))[1])
    index = tmp_path / "i"
    with FileLock(tmp_path / ".i.lock"):
        threads = [threading.Thread(target=open_one) for _ in range(3)]
        for thread in threads:
            thread.start()
        threads[0].join(1.5)
        assert not built
    for thread in threads:
        thread.join(10)
    assert built == [1]
    assert len(opened) == 3
    assert len(set(opened)) == 1
    assert "waiting for the process that reads the names" in capsys.readouterr().err


def test_another_process_of_the_machine_leaves_it_to_the_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(kept_index, "PATIENCE_SECONDS", 0.3)
    assert len(open_folder(folder, index=str(tmp_path / "i"))) == len(HOSTILE)  # In the end, it does.


def test_a_file_that_vanishes_after_the_scan_is_an_unreadable_image(folder: Path, tmp_path: Path) -> None:
    source = open_folder(folder, index=str(tmp_path / "i"))
    (folder / source.files[0]).unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.open(0)


def test_names_are_a_sequence_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "CHUNK", 3)
    found = Names.of(HOSTILE, range(len(HOSTILE)))
    assert list(found) == [*HOSTILE] == found == found[:]
    assert found[-1] == HOSTILE[-1]
    assert found.index("a/x.jpg") == 1
    for outside in (len(HOSTILE), -len(HOSTILE) - 1):
        with pytest.raises(IndexError):
            found[outside]
    assert found.fingerprint() == twin_of_hash([*HOSTILE], [*range(len(HOSTILE))])
    assert found == pickle.loads(pickle.dumps(found))
    assert found != Names.of([*HOSTILE[:-1], "other"])
    assert not Names.of([])


def test_extensions_and_labels_are_counted_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = [*HOSTILE, "x", "", ".jpg", "a/.jpg", "b.averylongextension", "c.NII.gz", "d.jpeg2", "e.JPEG", "f."]
    raw = [os.fsencode(name) for name in odd]
    wanted: dict[str, int] = {}
    for name in odd:
        wanted[extension_of(name)] = wanted.get(extension_of(name), 0) + 1
    assert dict(count_extensions([raw[:5], raw[5:]])) == wanted
    for first in range(len(raw)):  # The first one's ending is looked for in all.
        turned = [raw[first], *raw]
        found = names._extensions_in(b"".join(turned), np.cumsum([len(name) for name in turned]))
        assert found - count_extensions([turned[:1]]) == wanted
    labels = np.random.default_rng(0).integers(0, 40, 1000)
    monkeypatch.setattr(names, "CHUNK", 64)
    assert label_counts(labels, 41).tolist() == np.bincount(labels, minlength=41).tolist()
    for most, dtype in ((127, "int8"), (128, "int16"), (32_767, "int16"), (32_768, "int32")):
        assert small_labels([-1, most]).dtype == dtype
