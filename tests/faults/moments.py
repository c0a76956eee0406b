"""Moments at which a run is killed.

Line(n)     SIGKILL at the n-th line of the package that the main thread executes
Call(...)   SIGKILL as a built-in function is called, or right after it has returned, inside a function
Bytes(...)  the kernel ends the process at the n-th byte that it writes to a file, whoever writes it:
            by RLIMIT_FSIZE, whose SIGXFSZ is as sudden as SIGKILL and as exact as no signal from outside
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

lines = 0
"""Of the package, executed by the main thread since a `Line` was armed."""


@dataclass(frozen=True)
class Line:
    """The n-th line, counted from 1; -1 kills at none and counts them."""

    n: int

    def arm(self) -> None:
        """Count from here."""
        import etpp_ssl

        package = str(Path(etpp_ssl.__file__).parent)

        def line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            global lines
            if event == "line":
                lines += 1
                if lines == self.n:
                    _kill()
            return line

        def call(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
            return line if frame.f_code.co_filename.startswith(package) else None

        sys.settrace(call)


@dataclass(frozen=True)
class Call:
    """The `nth` call of built-in `name` below function `inside`."""

    name: str
    inside: str
    nth: int = 1
    after: bool = False

    def arm(self) -> None:
        """Count from here."""
        wanted, done = "c_return" if self.after else "c_call", 0

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal done
            if event == wanted and argument.__name__ == self.name and _is_inside(frame, self.inside):
                done += 1
                if done == self.nth:
                    _kill()

        sys.setprofile(profile)


@dataclass(frozen=True)
class Bytes:
    """`count` bytes into the `nth` time that `file` is written."""

    file: str
    count: int
    nth: int = 1

    def arm(self) -> None:
        """Count from here."""
        if self.file.endswith(".safetensors"):
            self._arm_tensors()
            return
        done = 0

        def opened(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if event != "open" or self.file not in os.path.basename(str(arguments[0])):
                return
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR):
                done += 1
                if done == self.nth:
                    there = Path(path)
                    appended = flags & os.O_APPEND and there.exists()
                    end = self.count + (there.stat().st_size if appended else 0)
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                    resource.setrlimit(resource.RLIMIT_FSIZE, (end, resource.RLIM_INFINITY))

        sys.addaudithook(opened)

    def _arm_tensors(self) -> None:
        """safetensors allocates a whole file, under another name, before it writes; older ones did not."""
        from safetensors.torch import save

        done = 0

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal done
            if event != "call" or frame.f_code.co_name != "save_file":
                return
            path = Path(frame.f_locals["filename"])
            if path.name == self.file:
                done += 1
                if done == self.nth:
                    path.write_bytes(save(frame.f_locals["tensors"])[: self.count])
                    _kill()

        sys.setprofile(profile)


Moment = Line | Call | Bytes
MOMENTS: dict[str, type[Moment]] = {kind.__name__: kind for kind in (Line, Call, Bytes)}


def keyed(key: str, end: int) -> int:
    """A number from 1 to `end` - 1."""
    return random.Random(key).randrange(1, end)


def disarm() -> None:
    """Count no more: in a data worker, which is not what is killed, or at the end."""
    sys.settrace(None)
    sys.setprofile(None)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_inside(frame: FrameType | None, function: str) -> bool:
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False
