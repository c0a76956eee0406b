"""What a data worker process does when it starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import TracebackType

from etpp_ssl.data.reading import ReadingBoard, use_board


def start_worker(board: ReadingBoard, worker: int) -> None:
    """Called by torch's loader in each worker.

    Args:
        board: where the worker says which image it is reading.
        worker: its number.
    """
    use_board(board, worker)
    sys.excepthook = _quiet_if_main_has_left
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process still needs its
    # batches to finish the step, and stops the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it: there a SIGTERM ends the workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main, daemon=True).start()


def _quiet_if_main_has_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # multiprocessing's thread that hands files over reports here when the main process, which then says
    # itself why, hangs up in the middle.
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_with_main() -> None:
    # Ignoring SIGTERM altogether would make Python wait for the workers for ever when it exits.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
