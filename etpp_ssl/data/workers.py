"""Batches from torch's `DataLoader`, and a wait for them that ends, with one sentence, when they stop coming.

The loader runs in a thread of its own, because it may block where no timeout of torch's holds: on half a
message of a worker that was killed, on the open files of a worker that hangs, in a decoder of this process.
The thread that trains only waits. Meanwhile it looks at the workers' exit codes and, when it has to say what
went wrong, at their notes of the images in work.

A data worker notes the image that it reads, hands batches over, and ends with its parent. A note has two
lines, the image that is read, empty when all are, and the batch that it is for; between two batches it is
empty. It lies in memory that all processes share, so it outlives a worker that dies, and tells which step and
images were in work.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.messages import shown_text

TICK_SECONDS = 1.0
"""Between two looks at the workers while a batch is waited for."""
DEATH_SECONDS = 5.0
"""How long a worker that has hung up may take to end."""
END_SECONDS = 10.0
"""How long the workers may take to finish what they are at when they are no longer needed."""

T = TypeVar("T")


class MonitoredLoader(Iterator[T], Generic[T]):
    """Batches in the order of their requests, up to the first error; see `load_batches`."""

    def __init__(
        self,
        builder: Dataset[T],
        requests: Iterable[BatchRequest],
        num_workers: int,
        prefetch: int,
        pin_memory: bool,
        stall_seconds: float | None,
    ) -> None:
        self._num_workers = num_workers
        self._limit = stall_seconds or float("inf")
        self._under_way: deque[BatchRequest] = deque()
        self._num_arrived = 0
        self._notes = [new_note() for _ in range(max(1, num_workers))]
        self._processes: list[BaseProcess] = []
        self._failed = False
        loader: DataLoader[T] = DataLoader(
            builder,
            sampler=_recorded(requests, self._under_way),
            batch_size=None,
            collate_fn=hand_over,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=partial(start_worker, self._notes),
            multiprocessing_context=_recording(self._processes) if num_workers else None,
        )
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._answers: SimpleQueue[T | BaseException] = SimpleQueue()
        gpu = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None
        self._thread = threading.Thread(
            target=_serve, args=(loader, self._notes[0], gpu, self._asked, self._answers), daemon=True
        )
        self._thread.start()

    def __next__(self) -> T:
        self._asked.put(True)
        answer = self._answer()
        if isinstance(answer, BaseException):
            self._failed = isinstance(answer, LoaderFault)
            raise answer
        self._under_way.popleft()
        self._num_arrived += 1
        return answer

    def close(self) -> None:
        """End the workers; what they have prepared is lost."""
        self._asked.put(False)
        # After a fault torch may wait for ever for what a dead worker holds, and while Python ends no other
        # thread runs.
        if not self._failed and not sys.is_finalizing():
            self._thread.join(END_SECONDS)
        if self._failed and not self._num_workers:
            # A decoder that still runs when Python ends may abort the process, and its exit code is lost.
            thread, error = ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)
            self._thread.join(TICK_SECONDS)
        alive = [process for process in self._processes if process.is_alive()]
        for process in alive:
            process.kill()
        for process in alive:
            # One that waits for a device cannot even be killed.
            process.join(END_SECONDS)

    def _answer(self) -> T | BaseException:
        # Of a time in which the process was suspended, one tick counts.
        waited, tick = 0.0, min(TICK_SECONDS, self._limit / 4)
        while waited < self._limit:
            dead = self._first_dead()
            if dead is not None and self._has_work(dead):
                return self._death(dead)
            try:
                answer = self._answers.get(timeout=tick)
            except Empty:
                waited += tick
                continue
            return self._explained(answer) if isinstance(answer, Exception) else answer
        awaited = self._num_arrived % len(self._notes)
        # The one whose batch comes next may wait for another, which hangs while it hands its own over.
        worker = next((w for w in (awaited, *range(len(self._notes))) if self._read_note(w)), awaited)
        return stall(self._who(worker), self._limit, self._read_note(worker), self._waited_for)

    def _explained(self, error: Exception) -> Exception:
        """What to raise for an error of torch or of the data."""
        if isinstance(error, StopIteration):
            return error
        # From a worker the message arrives with a traceback in front of it.
        text = (str(error).strip().splitlines() or [""])[-1]
        if isinstance(error, UnreadableImage | UserError):
            kind = RunFault if isinstance(error, RunFault) else UserError
            return kind("data: " + text.split(f"{type(error).__name__}: ")[-1])
        fault = machine_fault(error, self._waited_for, self._num_workers)
        if (isinstance(error, OSError | EOFError) and fault is None) or "ancdata" in text:
            # A worker that dies while it hands a batch over hangs up first, and closes its files before it
            # counts as ended.
            sentinels: dict[Any, BaseProcess] = {p.sentinel: p for p in self._processes if p.pid}
            for sentinel in wait(list(sentinels), DEATH_SECONDS):
                sentinels[sentinel].join(DEATH_SECONDS)
        dead = self._first_dead()
        if dead is not None:
            return self._death(dead)
        return fault or error

    def _first_dead(self) -> int | None:
        """A worker that has ended, one from whom a batch is awaited if there is any."""
        dead = [worker for worker, process in enumerate(self._processes) if process.exitcode is not None]
        return max(dead, key=self._has_work, default=None)

    def _death(self, worker: int) -> LoaderFault:
        code = self._processes[worker].exitcode
        assert code is not None
        return death(self._who(worker), code, self._read_note(worker), self._waited_for)

    @property
    def _waited_for(self) -> BatchRequest | None:
        return self._under_way[0] if self._under_way else None

    def _has_work(self, worker: int) -> bool:
        """Whether a batch is awaited from a worker; torch gives request i to worker i mod W."""
        return (worker - self._num_arrived) % self._num_workers < len(self._under_way)

    def _who(self, worker: int) -> str:
        return f"worker process {worker + 1} of {self._num_workers}" if self._num_workers else "the process"

    def _read_note(self, worker: int) -> str:
        text: str = self._notes[worker].value.decode(errors="replace")
        return text


def _serve(
    loader: DataLoader[T],
    note: Any,
    gpu: int | None,
    asked: SimpleQueue[bool],
    answers: SimpleQueue[T | BaseException],
) -> None:
    """What the loader's thread does: one batch whenever one is asked for, until the first error."""
    iterator: Iterator[T] | None
    use_note(note)
    try:
        if gpu is not None:
            # torch keeps the device in use thread by thread, and pins memory with it.
            torch.cuda.set_device(gpu)
        iterator = iter(loader)
        while asked.get():
            answers.put(next(iterator))
    except BaseException as error:
        if loader.num_workers:
            # The frames keep torch's iterator, which ends the workers when it is deleted.
            clear_frames(error.__traceback__)
        answers.put(error)
        # Until the loader is closed, the workers' exit codes are their own doing.
        asked.get()
    iterator = None


def _recorded(requests: Iterable[BatchRequest], under_way: deque[BatchRequest]) -> Iterator[BatchRequest]:
    for request in requests:
        under_way.append(request)
        yield request


def _recording(processes: list[BaseProcess]) -> BaseContext:
    """The context of multiprocessing that is in use, noting the processes that torch starts in it."""
    kind: Any = type(multiprocessing.get_context())

    class Recording(kind):
        def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:
            processes.append(kind.Process(*args, **kwargs))
            return processes[-1]

    context: BaseContext = Recording()
    return context


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
    # A collection writes to every object it looks at: those of the main process would be copied by pages.
    gc.freeze()
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
