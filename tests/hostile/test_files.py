"""Folders that hold what is no file: nothing waits, nothing vanishes without a word, and each is named."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hostile_images import encoded, noise

from etpp_ssl.commands.prepare import PrepareConfig, prepare
from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sources.folder import FileSource, FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.recipe import Recipe

PICTURE = encoded(noise(), "PNG")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these are kinds of files of Unix")


def open_folder(root: Path) -> FileSource:
    return FolderConfig(root=str(root)).open("train", in_chans=3, image_size=(8, 8), seed=0)


def reasons(source: FileSource) -> dict[str, str]:
    """Why each image cannot be read, by name; those that can be are left out."""
    found = {}
    for index in range(len(source)):
        try:
            source.open(index)
        except UnreadableImage as error:
            found[source.name(index)] = str(error)
    assert not any("\n" in reason for reason in found.values())
    return found


@contextmanager
def listening(path: Path) -> Iterator[None]:
    """A socket there."""
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        # Its path may have a hundred bytes only.
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)
        yield


def test_what_is_no_file_is_an_unreadable_image_and_nobody_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(PICTURE)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    with listening(tmp_path / "socket.png"):
        found = reasons(open_folder(tmp_path))
    assert found == {
        "empty.png": "it is empty",
        "null.png": "it is a device, not a file",
        "pipe.png": "it is a named pipe, not a file",
        "self.png": os.strerror(40),
        "socket.png": os.strerror(6),
        "zero.png": "it is a device, not a file",
    }


def test_a_list_reads_no_pipe_and_no_device_either(tmp_path: Path) -> None:
    from etpp_ssl.data.sources.folder import FileListConfig

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.txt").write_text("pipe\n/dev/zero\n/proc/self/maps\n.\n\0\n" + "x" * 5000)
    config = FileListConfig(file=str(tmp_path / "list.txt"))
    source = config.open("train", in_chans=3, image_size=(8, 8), seed=0)
    found = reasons(source)
    assert len(found) == 6
    assert found["pipe"] == "it is a named pipe, not a file"
    assert found["x" * 5000] == "File name too long"
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match=r"^data\.file '.*' cannot be read: "):
            FileListConfig(file=str(path)).open("train", in_chans=3, image_size=(8, 8), seed=0)


def test_a_file_that_is_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "terabyte.png").open("wb") as file:
        file.truncate(1 << 40)
    assert "its 1,099,511,627,776 bytes are more than" in reasons(open_folder(tmp_path))["terabyte.png"]


def test_files_may_change_and_vanish_after_they_were_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png", "e/f.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PICTURE)
    source = open_folder(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(PICTURE[:40])
    (tmp_path / "d.png").write_bytes(encoded(noise(size=(5, 6)), "JPEG"))
    (tmp_path / "e" / "f.png").unlink()
    (tmp_path / "e").rmdir()
    found = reasons(source)
    assert found.pop("c.png")
    assert found == {
        "a.png": "No such file or directory",
        "b.png": "it is a named pipe, not a file",
        "e/f.png": "No such file or directory",
    }
    assert source.open(3).size == (5, 6)


def test_a_folder_that_cannot_be_read_is_named_instead_of_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(PICTURE)
    (tmp_path / "b").chmod(0)
    # Permissions do not stop root: what it would be told is put in the place of what it is told.
    scan = os.scandir

    def refused(path: str) -> object:
        if str(path) == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    if os.access(tmp_path / "b", os.R_OK):
        monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"^data\.root: folder '.*/b' cannot be read: Permission denied$"):
        open_folder(tmp_path)
    (tmp_path / "b").chmod(0o755)


@contextmanager
def deep_folder(top: Path, name: str, count: int) -> Iterator[None]:
    """Folders in folders, further down than a path can say."""
    here = os.getcwd()
    os.chdir(top)
    try:
        for _ in range(count):
            os.mkdir(name)
            os.chdir(name)
        yield
    finally:
        for _ in range(count):
            os.chdir("..")
            if not os.listdir(name):
                os.rmdir(name)
        os.chdir(here)


def test_a_deep_folder_is_walked_and_one_too_deep_for_a_path_is_named(tmp_path: Path) -> None:
    with deep_folder(tmp_path, "d", 1200):
        Path("1.png").write_bytes(PICTURE)
        source = open_folder(tmp_path)
        assert source.files == ["d/" * 1200 + "1.png"]
        assert not reasons(source)
        Path("1.png").unlink()
    name = "long" * 50
    with deep_folder(tmp_path, name, 25):
        Path("1.png").write_bytes(PICTURE)
        with pytest.raises(UserError, match="cannot be read: File name too long") as error:
            open_folder(tmp_path)
        assert len(str(error.value)) < 500
        Path("1.png").unlink()


def test_many_links_to_each_other_end(tmp_path: Path) -> None:
    """Followed without memory, 12 folders that each link to all others have 12! paths."""
    folders = [tmp_path / f"f{number:02d}" for number in range(12)]
    for folder in folders:
        folder.mkdir()
        (folder / "x.png").write_bytes(PICTURE)
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other, target_is_directory=True)
    assert len(open_folder(tmp_path)) == 12


def test_paths_in_a_recipe_may_be_anything(tmp_path: Path) -> None:
    for root in ("/dev/null", "x" * 300, "/" + "y/" * 3000, "~nobody-of-this-name/z", "$NOT_SET_AT_ALL"):
        with pytest.raises(UserError, match=r"^data\.root ") as error:
            FolderConfig(root=root).open("train", in_chans=3, image_size=(8, 8), seed=0)
        assert "\n" not in str(error.value)
    (tmp_path / "recipe.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("x" * 300), Path("a\0b")):
        with pytest.raises(UserError, match=r"^recipe '.*' cannot be read: ") as error:
            Recipe.load(path)
        assert "\n" not in str(error.value)


def test_shards_are_files_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(PICTURE)
    os.mkfifo(tmp_path / "images" / "2.png")
    (split,) = prepare(tmp_path / "images", tmp_path / "out", PrepareConfig(), lambda done, total: None)
    assert split.bad == [("2.png", "it is a named pipe, not a file")]
    shard = tmp_path / "out" / "shard-000000.tar"
    size = shard.stat().st_size
    shard.unlink()
    os.mkfifo(shard)
    config = ShardsConfig(root=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"has 0 bytes, but the index says {size:,}"):
        config.open("train", in_chans=3, image_size=(8, 8), seed=0)
    (tmp_path / "out" / "index.json").unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar' cannot be read .*: it is a named pipe"):
        config.open("train", in_chans=3, image_size=(8, 8), seed=0)
    os.mkfifo(tmp_path / "out" / "index.json")
    with pytest.raises(UserError, match=r"index\.json' cannot be read: it is a named pipe"):
        config.open("train", in_chans=3, image_size=(8, 8), seed=0)
