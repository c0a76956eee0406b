"""What can go wrong while batches are built, and the sentences that say so.

A data worker notes the image that it reads, hands batches over, and ends with its parent. A note has two
lines, the image that is read, empty when all are, and the batch that it is for; between two batches it is
empty. It lies in memory that all processes share, so it outlives a worker that dies, and tells which step and
images were in work.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import get_worker_info

from etpp_ssl.config import RunFault
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.messages import shown_text

RESUME = "the same command resumes from its last checkpoint, if it writes any"
SHARED_MEMORY = "/dev/shm"
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
    work = [f"when it was {reading}"] if reading else []
    work += [f"at work on {batch}"] if batch else ["when it was not reading an image"]
    waiting = "" if _is_for(batch, waited_for) else _waiting(waited_for)
    return LoaderFault(f"{who} {_fate(exit_code)} {', '.join(work)}{waiting}")


def stall(who: str, seconds: float, note: str, waited_for: BatchRequest | None) -> LoaderFault:
    """No batch came within `data.stall_seconds`; see `death`."""
    reading, _, batch = note.partition("\n")
    work = reading or "not reading an image"
    awaited = "the first batch" if waited_for is None else waited_for.described()
    if _is_for(batch, waited_for):
        awaited = batch
    elif batch:
        work += f", at work on {batch}"
    return LoaderFault(f"no batch within data.stall_seconds {seconds:g} for {awaited}: {who} is {work}")


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
    elif text.startswith("Pin memory thread"):
        reason = f"the thread that pins batches for the GPU ended{waiting}"
    else:
        return None
    return LoaderFault(reason)


def _is_for(batch: str, request: BatchRequest | None) -> bool:
    return request is not None and batch.startswith(f"{request.place},")


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
_of_thread = threading.local()


def new_note() -> Any:
    """An empty note for one process, a ctypes array."""
    return RawArray("c", NOTE_BYTES)


def use_note(memory: Any) -> None:
    """From now on `note` of this thread writes to this shared array of `NOTE_BYTES`."""
    _of_thread.memory = memory


def note_reading(sample_id: int, name: str, batch: str) -> None:
    """Note what this thread is about to read, for whoever waits for its batch.

    Args:
        sample_id: the number of the sample that the image is for.
        name: of the image; not the sample's own where that is unreadable.
        batch: what the image's batch is called (`BatchRequest.described`).
    """
    note(f"reading image {shown_text(name)!r} (sample {sample_id})\n{batch}")


def note(text: str) -> None:
    """Note what this thread is doing; "" between two batches."""
    memory = getattr(_of_thread, "memory", None)
    if memory is not None:
        memory.value = text.encode(errors="replace")[: NOTE_BYTES - 1]


def hand_over(batch: Any) -> Any:
    """The batch as it leaves the process that built it: from a worker, in shared memory."""
    # A worker's queue would move the tensors there by itself, in a thread whose errors get lost, and the
    # batch with them.
    handed_over = batch if get_worker_info() is None else batch.share_memory()
    note("")
    return handed_over


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
