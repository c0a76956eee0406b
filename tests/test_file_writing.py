"""Files and folders take each other's place in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from etpp_ssl.config import UserError
from etpp_ssl.files import append_line, replaced, replaced_file, write_text


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
