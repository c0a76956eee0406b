"""What a user is told when batches stop coming: who failed, and which images were in hand."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from etpp_ssl.config import RunFault, UserError, listed
from etpp_ssl.data.reading import Reading
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.data.sources.base import UnreadableImage

GO_ON = "the same command goes on from its last checkpoint, if it writes any"
SHARED_MEMORY = "/dev/shm"
_NO_FILES = ("Communication with the workers is no longer possible", "items of ancdata")
_NO_ROOM = ("shared memory", "No space left on device", "unable to mmap")


class LoaderFault(RunFault):
    """Batches have stopped coming, for no fault of the data's."""


@dataclass(frozen=True)
class Scene:
    """What is known at the moment of a fault."""

    waited_for: BatchRequest | None
    """The oldest request whose batch has not come; None if nothing was asked for yet."""
    who: str
    """Who it is about: `worker process 1 of 4`, or `the process`."""
    in_hand: BatchRequest | None
    """The request that this one is at work on."""
    reading: Reading | None
    """The image that it is reading."""
    name: Callable[[int], str] | None
    """From an image's index to its name; None for images without indices, as of a stream."""


def worker_died(scene: Scene, exit_code: int) -> LoaderFault:
    """A worker process ended before its work was done.

    Args:
        scene: with the worker.
        exit_code: as `multiprocessing` has it: a signal is a negative number.
    """
    waiting = "" if scene.waited_for is scene.in_hand else _waiting(scene)
    return LoaderFault(f"data: {scene.who} {_fate(exit_code)} {_work(scene)}{waiting}; {GO_ON}")


def loader_stalled(scene: Scene, seconds: float) -> LoaderFault:
    """The batch that is waited for has not come within `data.stall_seconds`."""
    assert scene.waited_for is not None
    batch = described(scene.waited_for, scene.name)
    return LoaderFault(
        f"data: no batch within data.stall_seconds {seconds:g} for {batch}: {scene.who} is "
        f"{_reading(scene) or 'not reading an image'}; {GO_ON}"
    )


def handover_failed(error: Exception, scene: Scene, num_workers: int) -> LoaderFault | None:
    """Batches cannot come from the workers, for a reason that lies in the machine.

    Args:
        error: what torch's loader raised.
        scene: with any worker.
        num_workers: of the loader.

    Returns:
        None for any other error.
    """
    # From a worker the message arrives with a traceback in front of it.
    text, waiting = (str(error).strip().splitlines() or [""])[-1], _waiting(scene)
    code = error.errno if isinstance(error, OSError) and num_workers else None
    no_room = isinstance(error, RuntimeError) and any(words in text for words in _NO_ROOM)
    if no_room or code == errno.ENOSPC:
        return LoaderFault(
            f"data: {_shared_memory()} has no room for what the workers hand over{waiting}: {_more_room()}; "
            f"{GO_ON}"
        )
    if code == errno.EMFILE or any(words in text for words in _NO_FILES):
        return LoaderFault(
            f"data: too many open files for the workers' batches{waiting}: raise the limit (ulimit -n), or "
            f"lower data.num_workers or data.prefetch; {GO_ON}"
        )
    if code in (errno.EAGAIN, errno.ENOMEM):
        return LoaderFault(
            f"data: {num_workers} worker processes cannot be started ({os.strerror(code)}): lower "
            f"data.num_workers; {GO_ON}"
        )
    if "Pin memory thread" in text:
        return LoaderFault(f"data: the thread that pins batches for the GPU ended{waiting}; {GO_ON}")
    return None


def described(request: BatchRequest, name: Callable[[int], str] | None) -> str:
    """Where in the run a request belongs, the numbers of its samples and, if known, its images' names."""
    numbers = f"{place(request)}, samples {listed([str(position) for position in request.positions])}"
    if name is None:
        return numbers
    return f"{numbers} ({listed([repr(safe_name(name, index)) for index in request.indices])})"


@contextmanager
def named_errors(
    request: BatchRequest, position: int, index: int, name: Callable[[int], str]
) -> Iterator[None]:
    """An unknown error inside keeps its traceback, and gets a line that says which image it is about."""
    try:
        yield
    except (UnreadableImage, UserError):
        raise
    except Exception as error:
        image = repr(safe_name(name, index))
        error.add_note(f"etpp: it was raised for image {image} (sample {position} of {place(request)})")
        raise


def place(request: BatchRequest) -> str:
    """`step 12`, or in an evaluation `evaluation batch 12`."""
    return f"{'step' if request.progress < 1 else 'evaluation batch'} {request.step}"


def safe_name(name: Callable[[int], str], index: int) -> str:
    """An image's name, or its number where the name is not to be had."""
    try:
        return name(index)
    except Exception:
        # Asked for on the way out of an error, which may well be the data set's own.
        return f"image {index}"


def _fate(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if name == "SIGKILL":
        return "was killed by SIGKILL, probably out of memory (lower data.num_workers or data.prefetch),"
    if name == "SIGBUS":
        return f"was killed by SIGBUS, probably because {_shared_memory()} is full ({_more_room()}),"
    return f"was killed by {name}"


def _work(scene: Scene) -> str:
    if scene.in_hand is None:
        return "before it had work"
    reading = _reading(scene)
    when = f"when it was {reading}, " if reading else ""
    return f"{when}at work on {described(scene.in_hand, scene.name)}"


def _reading(scene: Scene) -> str:
    if scene.reading is None:
        return ""
    return f"reading image {scene.reading.name!r} (sample {scene.reading.position})"


def _waiting(scene: Scene) -> str:
    return f", while {place(scene.waited_for)} was waited for" if scene.waited_for is not None else ""


def _shared_memory() -> str:
    try:
        room = os.statvfs(SHARED_MEMORY)
    except OSError:
        return "shared memory"
    megabytes = room.f_frsize / 1e6
    return (
        f"shared memory ({SHARED_MEMORY}, {room.f_blocks * megabytes:,.0f} MB, "
        f"{room.f_bavail * megabytes:,.0f} MB free)"
    )


def _more_room() -> str:
    return "lower data.num_workers or data.prefetch, or give a container more (docker run --shm-size=8g)"
