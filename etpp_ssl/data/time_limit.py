"""A limit on the time that a wait takes, also where the wait is deep inside somebody else's code."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

GRACE_SECONDS = 5.0
"""How late an alarm may come. Later than that, the process was suspended: the time counts anew."""


class Expired(BaseException):
    """A wait took longer than its limit.

    No `Exception`, since it can come up in the middle of a decoder, whose errors are taken for unreadable
    images.
    """


class TimeLimit:
    """Ends a wait that takes too long; `with limit:` around each wait, as often as there are any.

    In the main thread an alarm (SIGALRM) interrupts the wait, a blocked system call included, with
    `Expired`. Where that does not get through (another thread, an alarm that is somebody else's, a network
    file system that never answers, a decoder in an endless loop), a second thread prints the last words
    and ends the process with exit code 1, `GRACE_SECONDS` later. Code that never gives the interpreter
    back to other threads cannot be ended from inside.

    Args:
        seconds: the limit; time in which the process is suspended does not count.
        last_words: one sentence, asked for when the process is to end.
    """

    def __init__(self, seconds: float, last_words: Callable[[], str]) -> None:
        self.seconds = seconds
        self.last_words = last_words
        self._begin: float | None = None
        self._handler_before: Any = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="time limit", daemon=True)
            self._thread.start()
        self._begin = time.monotonic()
        if _alarm_is_free():
            self._handler_before = signal.signal(signal.SIGALRM, self._ring) or signal.SIG_DFL
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disarm()

    def close(self) -> None:
        """Let the second thread end."""
        self._disarm()
        self._closed.set()

    def _disarm(self) -> None:
        self._begin = None
        if self._handler_before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler_before)
            self._handler_before = None

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        if self._begin is None:
            return
        if time.monotonic() - self._begin > self.seconds + GRACE_SECONDS:
            self._begin = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            return
        # Whoever catches it on the way leaves the limit in force, and the second thread ends the process.
        raise Expired

    def _watch(self) -> None:
        tick = min(self.seconds, GRACE_SECONDS)
        begin, waited, now = None, 0.0, time.monotonic()
        while not self._closed.wait(tick):
            last, now = now, time.monotonic()
            if self._begin is None or self._begin != begin:
                begin, waited = self._begin, 0.0
                continue
            # Of a time in which the process was suspended, one tick counts.
            waited += min(now - last, 2 * tick)
            if waited > self.seconds + GRACE_SECONDS:
                # Past Python's own stream, whose lock the main thread may hold.
                os.write(2, f"etpp: error: {self.last_words()}\n".encode(errors="backslashreplace"))
                os._exit(1)


def _alarm_is_free() -> bool:
    return (
        threading.current_thread() is threading.main_thread()
        and hasattr(signal, "setitimer")
        and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    )
