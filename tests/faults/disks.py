"""Disks that take no more: real ones where the tests may mount a small tmpfs, and errors put in otherwise.

What is put in meets the calls to the system, as a disk's own errors do; no name of the package is replaced.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class SmallDisk:
    """A tmpfs of a few megabytes.

    Args:
        folder: where it is mounted.
        megabytes: its size.
    """

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        self._size = megabytes << 20
        folder.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))

    def unmount(self) -> None:
        """Give it up with all that is on it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True)

    @contextmanager
    def full(self, left: int = 0) -> Iterator[None]:
        """No room but for `left` bytes, in whole pages; names of files need none."""
        filler = self.folder / "filler"
        free = os.statvfs(self.folder)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
            os.truncate(filler, filler.stat().st_size - left)
        try:
            yield
        finally:
            filler.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written."""
        _mount("-o", "remount,ro", str(self.folder))
        try:
            yield
        finally:
            _mount("-o", f"remount,rw,size={self._size}", str(self.folder))


@contextmanager
def refused(call: Any, number: int, *, nth: int = 1, part: str | None = None) -> Iterator[None]:
    """The `nth` call of a function inside fails with an error of the system, once.

    Args:
        call: a built-in function, or a Python function.
        number: of the error.
        nth: counted from 1.
        part: the argument of `call` that names a file, which is left cut short.
    """
    met, code = 0, getattr(call, "__code__", None)

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal met
        if argument is call if code is None else event == "call" and frame.f_code is code:
            met += event in ("call", "c_call")
            if met == nth and event in ("call", "c_call"):
                if part is not None:
                    Path(frame.f_locals[part]).write_bytes(b"part")
                raise OSError(number, os.strerror(number))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert met >= nth, f"{call} was called {met} times only"


Refusal = Callable[[str, tuple[Any, ...]], bool]
_refusals: list[Refusal] = []


@contextmanager
def full_where(asked: Refusal) -> Iterator[None]:
    """The disk is full inside where `asked`, given an audit event ("open", "os.rename") and its arguments."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename") and any(asks(event, arguments) for asks in _refusals):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if not getattr(full_where, "hooked", False):
        full_where.hooked = True  # type: ignore[attr-defined]
        sys.addaudithook(hook)
    _refusals.append(asked)
    try:
        yield
    finally:
        _refusals.remove(asked)


def no_checkpoint_of(*steps: int) -> AbstractContextManager[None]:
    """Checkpoints of these steps find the disk full, as they are to take their place."""
    names = {f"step-{step:08d}" for step in steps}
    return full_where(
        lambda event, arguments: (
            event == "os.rename"
            and Path(arguments[0]).name.startswith(".writing-")
            and Path(arguments[1]).name in names
        )
    )


def opens_for_writing(event: str, arguments: tuple[Any, ...], name: str) -> bool:
    """Whether an audit event is the opening of a file of this name, to write to it."""
    return (
        event == "open"
        and Path(os.fsdecode(arguments[0])).name == name
        and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if isinstance(arguments[0], str | bytes | os.PathLike)
        else False
    )


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The kernel takes the first `size` bytes of any file and no more, whoever writes: "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
