"""Data sets that do harm, and processes of which a test can see how they end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from etpp_ssl.data.formats.base import Picture
from etpp_ssl.data.sources.base import ImageSource


@dataclass
class Trapped:
    """A data set in which something happens whenever one image is asked for."""

    inner: ImageSource
    index: int
    act: Callable[[], Any]

    @property
    def classes(self) -> list[str] | None:
        return self.inner.classes

    def __len__(self) -> int:
        return len(self.inner)

    def open(self, index: int) -> Picture:
        self._spring(index)
        return self.inner.open(index)

    def label(self, index: int) -> int:
        return self.inner.label(index)

    def all_labels(self) -> list[int] | None:
        return self.inner.all_labels()

    def name(self, index: int) -> str:
        return f"photos/{index:02d}.jpg"

    def fingerprint(self) -> str:
        return self.inner.fingerprint()

    def describe(self) -> str:
        return self.inner.describe()

    def _spring(self, index: int) -> None:
        if index == self.index:
            self.act()


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    stderr: str
    left_over: list[int] = field(default_factory=list)
    """Processes of its group that were still there."""

    @property
    def last_line(self) -> str:
        """What a user sees last."""
        return self.stderr.strip().splitlines()[-1]


def run_aside(
    body: Callable[[], object], *, during: Callable[[int], None] | None = None, deadline: float = 60.0
) -> Ended:
    """Run something in a forked process of its own group.

    Args:
        body: what to run; how it ends is the process's exit code.
        during: called here meanwhile, with the process's number.
        deadline: seconds until it counts as hanging, and everything in its group is killed.
    """
    with tempfile.TemporaryFile() as stderr:
        process = multiprocessing.get_context("fork").Process(target=_aside, args=(body, stderr.fileno()))
        process.start()
        assert process.pid is not None
        try:
            if during is not None:
                during(process.pid)
            process.join(deadline)
            hangs = process.is_alive()
            left_over = [] if hangs else _group(process.pid)
        finally:
            for pid in _group(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.join(10)
        stderr.seek(0)
        # torch's own line about a crashed worker ends with a zero byte.
        text = stderr.read().decode().replace("\0", "")
    if hangs:
        pytest.fail(f"it hangs; on stderr: {text}")
    assert process.exitcode is not None
    return Ended(process.exitcode, text, left_over)


def _aside(body: Callable[[], object], stderr: int) -> None:
    os.setsid()
    os.dup2(stderr, 2)
    # pytest's own go elsewhere.
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.disable()
    body()


def _group(leader: int) -> list[int]:
    """Processes in the group of `leader` that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # After the name, which is in parentheses: state, parent, group.
                state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == leader and state not in "ZX":
                found.append(int(folder.name))
    return found
