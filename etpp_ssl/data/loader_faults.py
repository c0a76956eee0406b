"""Sentences for users whose batches stop coming: what failed, and which step and images were in work.

A process's note has two lines, the image that it is reading and the batch that the image is for, or is empty.
"""

from __future__ import annotations

import errno
import os
import signal

from etpp_ssl.config import RunFault
from etpp_ssl.data.sampler import BatchRequest

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
