"""Where the index of a data set's names is kept, who builds it, and whether it still holds.

One process of a machine builds it, under a lock, and the others map the same file. An index is used only
while what it was built from stands unchanged: the list's size and time, or the times of all folders. Sets of
fewer than `KEPT_FROM` names are read faster than this pays for, and leave nothing behind.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import expanded, printable
from etpp_ssl.data.sources.names import Names, Opened, Unkept
from etpp_ssl.files import replaced_file

KEPT_FROM = 1 << 17
"""Names; of fewer no index is kept unless `data.index` says where."""
UNSURE_NS = 2 * 10**9
"""What changed so shortly before it was read may have changed since under the same time."""
PATIENCE_SECONDS = 10.0
"""How long the other processes of a machine leave the building to the first, if it has not begun."""
SAID_EVERY_SECONDS = 10.0

_anew: set[str] | None = None
"""Index files that were built since `rescan`; None without it."""


def rescan() -> None:
    """From now on this process uses only indexes that are built after this call, by it or its siblings."""
    global _anew
    _anew = set()


class _Built(Exception):
    """Another process has built it."""


def kept(
    what: dict[str, Any],
    given: str | None,
    holds: Callable[[Opened], bool],
    build: Callable[[Callable[[], IO[bytes] | None], dict[str, Any], Advance], Names],
) -> Names:
    """The names of a data set, from its index where that holds.

    Args:
        what: says which data set it is, for JSON.
        given: `data.index`.
        holds: whether an index of that data set is still right.
        build: reads the names; given a function to call once there are `KEPT_FROM` of them, which returns
            the file to write them to, or None; what it shall write as their state; and a function that is
            told how many there are.

    Raises:
        UserError: if `data.index` is another file, or the index of other data.
    """
    file = _place(what, given)
    while True:
        found = _usable(file, what, given, holds)
        if found is not None:
            return found.names
        names: Names | None = None
        try:
            with ExitStack() as stack:
                writing = _Writing(file, what, given, holds, stack)
                with _progress() as advance:
                    if given is not None:
                        writing.begin()
                    names = build(writing.begin, writing.state, advance)
            if writing.file is None or file is None:
                return names
            # Its pages were touched all over; a new map starts with none.
            names = None
            _return_memory()
            if _anew is not None:
                _anew.add(str(file))
            return Opened(file).names
        except _Built:
            continue
        except (Unkept, UserError) as error:
            if isinstance(error, UserError) and names is None:
                raise
            _say(f"data: the index of names cannot be kept ({error}); each start reads them anew")
            file = given = None


Advance = Callable[[int], None]


class _Writing:
    """The writing of one index; see `kept`."""

    def __init__(
        self,
        file: Path | None,
        what: dict[str, Any],
        given: str | None,
        holds: Callable[[Opened], bool],
        stack: ExitStack,
    ) -> None:
        self._at = file
        self._check = lambda: _usable(file, what, given, holds) is not None
        self._stack = stack
        self.state: dict[str, Any] = {"what": what, "launcher": os.getppid(), "since": time.time_ns()}
        self.file: IO[bytes] | None = None
        self._begun = False

    def begin(self) -> IO[bytes] | None:
        """The file to write to, once this process may; None where none is kept."""
        if self._begun or self._at is None:
            return self.file
        self._begun = True
        try:
            self._at.parent.mkdir(parents=True, exist_ok=True)
            self._lock(self._at)
            for killed in self._at.parent.glob(f".writing-{glob.escape(self._at.name)}-*"):
                killed.unlink(missing_ok=True)
            aside = self._stack.enter_context(replaced_file(self._at))
            self.file = self._stack.enter_context(aside.open("w+b"))
        except OSError as error:
            raise Unkept(f"{str(self._at)!r}: {error.strerror or error}") from error
        return self.file

    def _lock(self, file: Path) -> None:
        lock = FileLock(file.with_name(f".{file.name}.lock"), fallback_to_soft=False)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        said, patience = False, PATIENCE_SECONDS if local_rank else 0.0
        begun = free_since = time.monotonic()
        while True:
            if self._check():
                raise _Built
            try:
                if not patience or time.monotonic() - free_since > patience:
                    lock.acquire(timeout=0)
                    break
                with lock.acquire(timeout=0):
                    pass
            except Timeout:
                free_since = time.monotonic()
                # For a moment it may be held by a process that only looks whether it is.
                if not said and local_rank < 2 and free_since - begun > 1:
                    said = True
                    _say("data: waiting for the process that reads the names of all images", always=True)
            except NotImplementedError:
                return  # A file system without locks.
            time.sleep(0.2)
        self._stack.callback(_unlock, lock)
        if self._check():
            raise _Built


def _return_memory() -> None:
    """Give the system back what building took; glibc keeps what lies below anything still in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _unlock(lock: FileLock) -> None:
    with suppress(OSError):
        # Who waits for it looks at the index first, so that a lock of a new file harms nobody.
        os.unlink(lock.lock_file)
    lock.release()


def _place(what: dict[str, Any], given: str | None) -> Path | None:
    if given is not None:
        return Path(os.path.abspath(expanded(given)))
    cache = os.environ.get("XDG_CACHE_HOME", "")
    around = Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"))
    if not around.is_absolute():
        return None
    key = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in printable(Path(what["path"]).name))[:40]
    return around / "etpp" / "names" / f"{stem}-{key}.index"


def _usable(
    file: Path | None, what: dict[str, Any], given: str | None, holds: Callable[[Opened], bool]
) -> Opened | None:
    """The index, if it is there and right.

    Raises:
        UserError: if `data.index` is something else.
    """
    if file is None or not file.exists():
        return None
    try:
        found = Opened(file)
        other = found.state["what"] != what and found.state["what"].get("path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if given is None:
            return None  # Ours, of another version or damaged; it is written anew.
        raise UserError(
            f"data.index {given!r} is a file, but not an index of names ({error}): choose another name"
        ) from error
    if other:
        if given is None:
            return None
        raise UserError(
            f"data.index {given!r} is the index of other data ({printable(str(other))!r}): choose another "
            f"name"
        )
    # The processes of one launch build it anew once.
    by_sibling = os.environ.get("LOCAL_RANK", "0") != "0" and found.state["launcher"] == os.getppid()
    if _anew is not None and str(file) not in _anew and not by_sibling:
        return None
    return found if holds(found) else None


@contextmanager
def _progress() -> Iterator[Advance]:
    """Called with the number of names so far; on a terminal a bar, elsewhere a line now and then."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield lambda count: None
        return
    said = begun = time.monotonic()
    bar: Progress | None = None
    task = TaskID(0)

    def advance(count: int) -> None:
        nonlocal said, bar, task
        now = time.monotonic()
        if sys.stderr.isatty():
            # Small sets are read before it would be seen.
            if bar is None and now - begun > 1:
                columns = (
                    TextColumn("data: {task.completed:,} names read"),
                    BarColumn(),
                    TimeElapsedColumn(),
                )
                bar = Progress(*columns, console=Console(stderr=True), transient=True)
                task = bar.add_task("names", total=None)
                bar.start()
            if bar is not None:
                bar.update(task, completed=count)
        elif now - said > SAID_EVERY_SECONDS:
            said = now
            _say(f"data: {count:,} names read")

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _say(text: str, *, always: bool = False) -> None:
    if always or os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
