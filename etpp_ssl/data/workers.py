"""Batches from torch's `DataLoader`, and a wait for them that ends, with one sentence, when they stop coming.

The loader runs in a thread of its own, because it may block where no timeout of torch's holds: on half a
message of a worker that was killed, on the open files of a worker that hangs, in a decoder of this process.
The thread that trains only waits. Meanwhile it looks at the workers' exit codes and, when it has to say what
went wrong, at their notes of the images in work (`loader_faults.py`).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.loader_faults import (
    LoaderFault,
    death,
    hand_over,
    machine_fault,
    new_note,
    stall,
    start_worker,
    use_note,
)
from etpp_ssl.data.sampler import BatchRequest

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
