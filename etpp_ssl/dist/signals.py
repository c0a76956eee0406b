"""SIGTERM and Ctrl-C end a run at the next step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST_SECONDS = 3.0
"""A launcher passes on what a scheduler has sent to all processes: a signal comes twice for one request."""


class Interrupted(Exception):
    """The run was asked to stop and has written its checkpoint; `exit_code` says by what."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        # 75 is EX_TEMPFAIL: a scheduler may start the same command again. 130 is a shell's Ctrl-C.
        self.exit_code = 130 if signum == signal.SIGINT else 75


class StopRequest:
    """Remembers the first signal while it is entered; one that comes seconds later acts at once.

    The handler only takes a note: it starts no collective, since SIGTERM also arrives when another
    process has died.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            self._restore()
            os.kill(os.getpid(), signum)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
