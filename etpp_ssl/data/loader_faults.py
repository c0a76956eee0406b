"""What can go wrong while batches are built, and the sentences that say so.

A data worker notes the image that it reads, hands batches over, and ends with its parent; a limit holds where
this process builds batches itself, deep inside a decoder, too. A note has two lines, the image that is read
and the batch that it is for, or is empty. It lies in memory that all processes share, so it outlives a worker
that dies, and tells which step and images were in work.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info

from etpp_ssl.config import RunFault
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.messages import shown_text

RESUME = "the same command resumes from its last checkpoint, if it writes any"
SHARED_MEMORY = "/dev/shm"
PIN_THREAD = "the thread that pins batches for the GPU ended"
MORE_ROOM = "lower data.num_workers or data.prefetch, or give a container more (docker run --shm-size=8g)"
_NO_ROOM = ("shared memory", "No space left on device", "unable to mmap")
_NO_FILES = ("Communication with the workers is no longer possible", "items of ancdata")


class LoaderFault(RunFault):
    """Batches have stopped coming, for a reason outside of the data."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"data: {reason}; {RESUME}")


def death(who: str, exit_code: int, note: str, waited_for: BatchRequest | None) -> LoaderFault:
    """A worker process ended before its work was done.

    Args:
        who: the worker.
        exit_code: as `multiprocessing` has it: a signal is a negative number.
        note: the worker's.
        waited_for: the request whose batch comes next.
    """
    reading, _, batch = note.partition("\n")
    work = f"when it was {reading}, at work on {batch}" if reading else "when it was not reading an image"
    elsewhere = waited_for is not None and not batch.startswith(f"{waited_for.place},")
    return LoaderFault(f"{who} {_fate(exit_code)} {work}{_waiting(waited_for) if elsewhere else ''}")


def stall(who: str, seconds: float, note: str, waited_for: BatchRequest | None) -> LoaderFault:
    """No batch came within `data.stall_seconds` from the process that builds the next one; see `death`."""
    reading, _, batch = note.partition("\n")
    batch = batch or ("the first batch" if waited_for is None else waited_for.described())
    return LoaderFault(
        f"no batch within data.stall_seconds {seconds:g} for {batch}: {who} is "
        f"{reading or 'not reading an image'}"
    )


def machine_fault(error: Exception, waited_for: BatchRequest | None, num_workers: int) -> LoaderFault | None:
    """The machine lacks what the workers need, if `error` says so; None for an error of another kind."""
    # From a worker the message arrives with a traceback in front of it.
    text, waiting = (str(error).strip().splitlines() or [""])[-1], _waiting(waited_for)
    code = error.errno if isinstance(error, OSError) and num_workers else None
    no_room = isinstance(error, RuntimeError) and any(words in text for words in _NO_ROOM)
    if no_room or code == errno.ENOSPC:
        reason = f"{_shared_memory()} has no room for what the workers hand over{waiting}: {MORE_ROOM}"
    elif code == errno.EMFILE or any(words in text for words in _NO_FILES):
        reason = (
            f"too many open files for the workers' batches{waiting}: raise the limit (ulimit -n), or lower "
            f"data.num_workers or data.prefetch"
        )
    elif code in (errno.EAGAIN, errno.ENOMEM):
        reason = (
            f"{num_workers} worker processes cannot be started ({os.strerror(code)}): lower data.num_workers"
        )
    elif text == PIN_THREAD:
        reason = f"{PIN_THREAD}{waiting}"
    else:
        return None
    return LoaderFault(reason)


def _waiting(request: BatchRequest | None) -> str:
    return f", while {request.place} was waited for" if request is not None else ""


def _fate(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if name == "SIGKILL":
        name += ", probably out of memory (lower data.num_workers or data.prefetch),"
    elif name == "SIGBUS":
        name += f", probably because {_shared_memory()} is full ({MORE_ROOM}),"
    return f"was killed by {name}"


def _shared_memory() -> str:
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError:
        return "shared memory"
    total, free = (f"{blocks * room.f_frsize / 1e6:,.0f} MB" for blocks in (room.f_blocks, room.f_bavail))
    return f"shared memory ({SHARED_MEMORY}, {total}, {free} free)"


NOTE_BYTES = 8192
_note: Any = None


def new_note() -> Any:
    """An empty note for one process, a ctypes array."""
    return RawArray("c", NOTE_BYTES)


def use_note(memory: Any) -> None:
    """From now on `note` writes to this shared array of `NOTE_BYTES`."""
    global _note
    _note = memory


def note_reading(sample_id: int, name: str, batch: str) -> None:
    """Note what this process is about to read, for whoever waits for its batch.

    Args:
        sample_id: the number of the sample that the image is for.
        name: of the image; not the sample's own where that is unreadable.
        batch: what the image's batch is called (`BatchRequest.described`).
    """
    note(f"reading image {shown_text(name)!r} (sample {sample_id})\n{batch}")


def note(text: str) -> None:
    """Note what this process is doing; "" between two batches."""
    if _note is not None:
        _note.value = text.encode(errors="replace")[: NOTE_BYTES - 1]


def hand_over(batch: Any) -> Any:
    """The batch as it leaves the process that built it: from a worker, in shared memory."""
    # A worker's queue would move the tensors there by itself, in a thread whose errors get lost, and the
    # batch with them.
    return batch if get_worker_info() is None else batch.share_memory()


def start_worker(notes: list[Any], worker: int) -> None:
    """Called by torch's loader in each worker; `notes` are those of all workers."""
    use_note(notes[worker])
    sys.excepthook = _quiet_if_main_has_left
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process still needs its
    # batches to finish the step, and ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it: there a SIGTERM ends the workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main, daemon=True).start()


def _quiet_if_main_has_left(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # multiprocessing's thread that hands files over reports here when the main process hangs up.
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_with_main() -> None:
    # Ignoring SIGTERM altogether would make Python wait for the workers for ever when it exits.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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
