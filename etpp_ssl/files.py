"""Files and folders: written whole or not at all, read only if they are regular and of a sane size.

Whatever stops a writer, a reader finds the old content or the new. Opening a named pipe waits for someone to
write to it, a device may never end, and a file can be larger than the memory: each of them is an error here,
before a byte of it is read.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from etpp_ssl.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

OTHERS_IN_BETWEEN = 100
"""How often other writers may put their folder in our way before a writer gives up."""


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `folder` at the end.

    Several processes may write one folder at once: each has a folder of its own aside, and the last one to
    finish stays. A writer that fails or is killed leaves `folder` as it was, or, for the moment between two
    renames, beside it as `.old-NAME-*`; one that is killed leaves its `.writing-NAME-*`, too.

    Raises:
        UserError: if it cannot be written.
    """
    aside, old = _beside(folder, "writing"), _beside(folder, "old")
    with _disk_faults(folder):
        try:
            aside.mkdir(parents=True)
            yield aside
            flush_folder(aside)
            take_place(aside, folder, old)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replaced_file(file: Path) -> Iterator[Path]:
    """The name of a file to write, which takes the place of `file` at the end, flushed.

    Several processes may write one file at once, as with `replaced`.

    Raises:
        UserError: if it cannot be written.
    """
    aside = _beside(file, "writing")
    with _disk_faults(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            flush(aside)
            os.replace(aside, file)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def check_place(path: Path, marker: str | None = None) -> Path:
    """Check that a file or a folder can be written, before the work whose result it takes.

    The folder around it, or the one that it will be made in, takes an empty file for a moment.

    Args:
        path: of the file or the folder.
        marker: of a folder: the file by which an earlier result is recognised, which it may replace.

    Returns:
        The absolute path: `.` has no name that could be exchanged for another folder's.

    Raises:
        UserError: if it cannot be written, or something else is there.
    """
    path = Path(os.path.abspath(path))
    if marker is None and os.path.isdir(path):
        raise UserError(f"{str(path)!r} is a folder; give the name of a file in it")
    if marker is not None and os.path.lexists(path):
        if not path.is_dir():
            raise UserError(f"{str(path)!r} is not a folder; choose another name")
        # Another process may be about to replace it.
        with suppress(FileNotFoundError):
            names = os.listdir(path)
            if names and marker not in names:
                raise UserError(
                    f"{str(path)!r} holds something that is not an earlier result; choose another"
                )
    around = next(folder for folder in path.parents if folder.exists())
    aside = _beside(around / path.name, "writing")
    with _disk_faults(path):
        aside.touch()
        aside.unlink()
    return path


def _beside(path: Path, what: str) -> Path:
    """A hidden name beside a file or folder that nobody else has."""
    return path.with_name(f".{what}-{path.name}-{secrets.token_hex(4)}")


@contextmanager
def _disk_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = disk_fault(error)
        if reason is None:
            raise
        raise UserError(f"{str(path)!r} cannot be written: {reason}") from error


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        UserError: if it cannot be written; what was there before still is.
    """
    with replaced_file(file) as aside:
        aside.write_text(text, encoding="utf-8")


def append_line(file: Path, line: str) -> None:
    """Append a line, whole or not at all, also while other processes append theirs.

    A partial line of a killed writer is cut off first.

    Raises:
        OSError: if it cannot be written.
    """
    with _locked(file), file.open("a+b", buffering=0) as opened:
        end = _end_of_lines(opened)
        opened.truncate(end)
        left = line.encode() + b"\n"
        try:
            while left:
                left = left[opened.write(left) :]
        except OSError:
            # Where this fails too, the next call does it.
            with suppress(OSError):
                opened.truncate(end)
            raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time; a file system without locks gives none, and no error."""
    try:
        from fcntl import LOCK_EX, flock
    except ImportError:  # Windows, where a lock on the file itself would keep readers out.
        from filelock import FileLock

        with FileLock(file.with_name(f".{file.name}.lock")):
            yield
        return
    with file.open("ab") as opened:
        with suppress(OSError):
            flock(opened, LOCK_EX)
        yield


def write_json(file: Path, values: dict[str, Any]) -> None:
    """An indented JSON file, in a folder that `replaced` gave."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as the umask lets them.

    safetensors (0.8) itself makes files that only their owner can read.

    Args:
        tensors: contiguous, without shared memory.
        file: to write.
        metadata: of the file.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    from safetensors.torch import save_file

    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, metadata=metadata)
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


def take_place(new: Path, folder: Path, old: Path) -> None:
    """Rename folder `new` to `folder`, and what was there, if anything, to `old`.

    Raises:
        OSError: if that fails; `folder` is unchanged then.
    """
    for _ in range(OTHERS_IN_BETWEEN):
        shutil.rmtree(old, ignore_errors=True)
        # Another process may have renamed it meanwhile.
        with suppress(FileNotFoundError):
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and new.exists():
                continue  # Another process has put its own there.
            with suppress(OSError):
                os.replace(old, folder)
            raise
        return
    raise OSError(errno.EBUSY, "other processes write it again and again")


def flush_folder(folder: Path) -> None:
    """Flush the files of a folder, and their names, to the disk.

    Raises:
        OSError: if the disk does not take them.
    """
    for file in folder.iterdir():
        flush(file)
    flush(folder)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's names where the system can do that, to the disk.

    Raises:
        OSError: if the disk does not take it.
    """
    is_folder = path.is_dir()
    try:
        # Windows flushes what may be written to, and opens no folders.
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" and not is_folder else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems refuse it, too.
        if not (is_folder and error.errno in _NO_FLUSH):
            raise


_NO_FLUSH = (errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def disk_fault(error: BaseException) -> str | None:
    """Why a disk did not take a file, or None for an error of another kind."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    if isinstance(error, SafetensorError) and "os error" in text:
        return text.removeprefix("Error while serializing: ").removeprefix("I/O error: ")
    # torch.save's own writer says where it stood when a write fell short, and not why.
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return "the disk did not take all of it"
    return None


def _end_of_lines(file: FileIO, block: int = 65536) -> int:
    """Where the last whole line ends, in bytes."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK", "O_BINARY", "O_NOINHERIT")
)
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_BLOCK = 1 << 16


def read_regular(path: str | os.PathLike[str], at_most: int) -> bytes:
    """The bytes of a file.

    Args:
        path: the file; links are followed.
        at_most: bytes.

    Raises:
        OSError: with a `strerror` for people, if it cannot be read, is not a regular file, or is larger.
        ValueError: if the path holds a null byte.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        _check_size(size, at_most)
        return _all(descriptor, size, at_most)
    finally:
        os.close(descriptor)


def read_head(path: str | os.PathLike[str], num_bytes: int, at_most: int | None) -> bytes:
    """The first bytes of a file, fewer where it has fewer.

    Args:
        path: the file; links are followed.
        num_bytes: how many.
        at_most: bytes of the whole file; None is any number.

    Raises:
        OSError, ValueError: as `read_regular`.
    """
    descriptor = open_regular(path)
    try:
        _check_size(os.fstat(descriptor).st_size, at_most)
        return os.read(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor of a file, for reading.

    Raises:
        OSError: as `read_regular`.
        ValueError: if the path holds a null byte.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        require_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_text(path: Path, at_most: int, *, errors: str = "strict") -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: as `read_regular`.
        ValueError: if it is not UTF-8, unless `errors` says how to read it.
    """
    return read_regular(path, at_most).decode("utf-8-sig", errors)


def require_regular(status: os.stat_result) -> None:
    """Check that what `os.stat` or `os.fstat` found is a regular file.

    Raises:
        OSError: if it is not.
    """
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")


def _check_size(size: int, at_most: int | None) -> None:
    if at_most is not None and size > at_most:
        raise OSError(errno.EFBIG, f"its {size:,} bytes are more than {at_most:,}")


def _all(descriptor: int, size: int, at_most: int) -> bytes:
    parts, found = [], 0
    # One byte more than it has tells the end; files of /proc say that they have none.
    while part := os.read(descriptor, max(size + 1 - found, _BLOCK)):
        parts.append(part)
        found += len(part)
        if found > at_most:
            raise OSError(errno.EFBIG, f"it grew beyond {at_most:,} bytes while it was read")
    return parts[0] if len(parts) == 1 else b"".join(parts)
