"""Files and folders take each other's place in one step."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import TINY

from etpp_ssl.config import UserError
from etpp_ssl.files import (
    append_line,
    check_place,
    flush,
    flush_folder,
    replaced,
    replaced_file,
    save_tensors,
    write_text,
)


def stop_while_writing(file: Path) -> None:
    file.write_text("a part")
    raise KeyboardInterrupt


def test_a_folder_replaces_the_one_before_or_leaves_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    for text in ("first", "second"):
        with replaced(folder) as aside:
            (aside / text).write_text(text)
        assert [path.name for path in folder.iterdir()] == [text]
    with pytest.raises(KeyboardInterrupt), replaced(folder) as aside:
        stop_while_writing(aside / "third")
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("nth", [1, 2])
def test_a_rename_that_fails_leaves_the_folder(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    with replaced(folder) as aside:
        (aside / "old").write_text("old")
    real, calls = os.replace, iter(range(1, 9))

    def refuse(source: Path, target: Path) -> None:
        if next(calls) == nth:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    sentence = "folder' cannot be written: Input/output error"
    with pytest.raises(UserError, match=sentence), replaced(folder) as aside:
        (aside / "new").write_text("new")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder", "folder/old"]


def test_a_file_replaces_the_one_before_or_leaves_it(tmp_path: Path) -> None:
    file = tmp_path / "a" / "file"
    write_text(file, "first")
    write_text(file, "zweite, ä")
    with pytest.raises(KeyboardInterrupt), replaced_file(file) as aside:
        stop_while_writing(aside)
    assert file.read_text(encoding="utf-8") == "zweite, ä"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_line_is_appended_after_the_last_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    expected = b""
    for torn in (b"", b"a", b"x" * 65535, b"x" * 65536, b"x" * 200_000):
        with file.open("ab") as opened:
            opened.write(torn)
        append_line(file, f"after {len(torn)}")
        expected += b"after %d\n" % len(torn)
        assert file.read_bytes() == expected


def write_folders(place: Path, name: str) -> None:
    for _ in range(60):
        with replaced(place) as aside:
            for file in ("one", "two"):
                (aside / file).write_text(name)


def write_files(place: Path, name: str) -> None:
    for _ in range(200):
        write_text(place, name * 1000)


@pytest.mark.parametrize("write", [write_folders, write_files])
def test_several_processes_write_one_place(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    place, context = tmp_path / "place", multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(place, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    texts = [file.read_text() for file in (place.iterdir() if place.is_dir() else [place])]
    assert len(set("".join(texts))) == 1


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_tensors_have_the_mode_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with replaced(tmp_path / "folder") as aside:
            save_tensors({"a": torch.ones(2)}, aside / "a.safetensors", {"key": "value"})
        with replaced_file(tmp_path / "b.safetensors") as file:
            save_tensors({"a": torch.ones(2)}, file)
    finally:
        os.umask(before)
    for name in ("folder/a.safetensors", "b.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    assert check_place(tmp_path / "a" / "b" / "file") == tmp_path / "a" / "b" / "file"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/b/c' cannot be written: "):
        check_place(tmp_path / "file" / "b" / "c")


def test_lines_that_processes_append_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"whole\ntorn")
    write = "import sys; from pathlib import Path; from etpp_ssl.files import append_line\n"
    write += "for i in range(200): append_line(Path(sys.argv[1]), sys.argv[2] * 300 + f' {i}')"
    writers = [subprocess.Popen([sys.executable, "-c", write, str(file), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    first, *lines = file.read_text().splitlines()
    assert first == "whole"
    for name in "abc":
        assert [line for line in lines if line[0] == name] == [f"{name * 300} {i}" for i in range(200)]
    assert len(lines) == 600
    assert os.listdir(tmp_path) == ["lines"]


def test_a_folder_that_cannot_be_flushed_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    real = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    flush_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "nothing")


WITHOUT_POSIX = """
import os, signal, sys
import accelerate, filelock, multiprocessing.pool, psutil, timm, torch, torchvision

sys.modules["fcntl"] = None
for module, names in ((os, "pread sysconf O_NOCTTY getuid geteuid fork killpg"),
                      (signal, "SIGCHLD SIGURG SIGKILL pthread_kill pthread_sigmask sigwaitinfo")):
    for name in names.split():
        delattr(module, name)
os.O_BINARY, real_open, binary = 0x8000, os.open, []

def windows_open(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    if str(path).endswith((".png", ".tar")) and ".writing-" not in str(path):
        binary.append((path, flags & os.O_BINARY))
    return real_open(path, flags, *rest, **more)

os.open = windows_open
from etpp_ssl.cli import main

def etpp(*words):
    try:
        main(list(words))
    except SystemExit as ended:
        assert ended.code in (0, None), words

folder = sys.argv[1]
etpp("prepare", f"{folder}/images", f"{folder}/shards", "--workers", "1")
for name, data in (("run", "folder"), ("sharded", "shards")):
    root = "images" if data == "folder" else "shards"
    etpp("pretrain", f"{folder}/recipe.yaml", f"data={data}", f"data.root={folder}/{root}",
         "data.num_workers=0", "batch_size=4",
         f"output={folder}/{name}", "probe=reconstruction", "data.holdout=4")
etpp("probe", f"{folder}/run", "probe=reconstruction")
etpp("export", f"{folder}/run")
etpp("report", f"{folder}/run")
assert binary and all(flags for _, flags in binary), binary
"""


def test_one_process_needs_nothing_that_only_posix_has(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (24, 16), (number * 20, 2, 3)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "recipe.yaml").write_text(TINY, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
