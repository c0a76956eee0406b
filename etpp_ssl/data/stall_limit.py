"""A limit on how long the building of a batch in this process may take, deep inside a decoder too."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

TICK_SECONDS = 1.0
"""Between two looks at the clock."""
GRACE_SECONDS = 5.0
"""How long an interrupted wait may take to end."""


class Expired(BaseException):
    """A wait took longer than its limit. Not an `Exception`: in a decoder, those make an image unreadable."""


class StallLimit:
    """Ends a wait that takes too long: `with limit:` around each wait, one at a time.

    A thread counts the time and interrupts the main thread, blocked system calls included, with `Expired`.
    Where that has no effect for `GRACE_SECONDS` (another thread waits, a network file system never answers, a
    decoder is in an endless loop), the process ends with exit code 1. Code that never lets another thread
    run cannot be ended.

    Args:
        seconds: the limit. Time in which the process is suspended does not count.
        sentence: asked for when the process ends, and printed.
    """

    def __init__(self, seconds: float, sentence: Callable[[], str]) -> None:
        self._seconds = seconds
        self._sentence = sentence
        self._wait: object | None = None
        self._expired: object | None = None
        self._handler: Any = None
        self._closed = threading.Event()
        threading.Thread(target=self._count, name="stall limit", daemon=True).start()

    def __enter__(self) -> None:
        self._wait = object()
        if threading.current_thread() is threading.main_thread():
            # SIGURG does nothing where it comes too late and finds no handler.
            self._handler = signal.signal(signal.SIGURG, self._interrupt)

    def __exit__(self, *error: object) -> None:
        self._wait = None
        if self._handler is not None:
            signal.signal(signal.SIGURG, self._handler)
            self._handler = None

    def close(self) -> None:
        """Let the thread end."""
        self._closed.set()

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._wait is not None and self._wait is self._expired:
            raise Expired
        if callable(self._handler):
            self._handler(signum, frame)

    def _count(self) -> None:
        tick, wait, waited = min(self._seconds, TICK_SECONDS), None, 0.0
        while not self._closed.wait(tick):
            # Of a time in which the process was suspended, one tick counts.
            waited = waited + tick if self._wait is wait else 0.0
            wait = self._wait
            if wait is None or waited < self._seconds:
                continue
            if waited >= self._seconds + GRACE_SECONDS:
                # Not through Python's own stream, whose lock the main thread may hold.
                os.write(2, f"etpp: error: {self._sentence()}\n".encode(errors="backslashreplace"))
                os._exit(1)
            if self._handler is not None and self._expired is not wait:
                self._expired = wait
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
