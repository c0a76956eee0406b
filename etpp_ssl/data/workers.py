"""Batches from worker processes: a wait for them that ends, with one sentence, when a worker dies or stalls.

torch's `DataLoader` runs the workers and limits the wait. Added here are the workers' exit codes and their
notes of the images in work (`worker.py`). No private name of torch is used.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from traceback import clear_frames
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from etpp_ssl.data.loader_faults import (
    PIN_THREAD,
    Expired,
    LoaderFault,
    StallLimit,
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
DEATH_SECONDS = 2.0
"""How long a worker that has hung up may take to end."""
END_SECONDS = 10.0
"""How long torch may take to end its workers and threads: a dead worker may hold what they wait for."""

T = TypeVar("T")


class MonitoredLoader(Iterator[T], Generic[T]):
    """Batches in the order of their requests, or one sentence about what went wrong.

    Args:
        builder, requests, num_workers, prefetch, pin_memory, stall_seconds: see `load_batches`.

    Raises:
        LoaderFault: when iterated over, if a worker ends before its time, no batch comes within
            `stall_seconds`, there is no room in shared memory, or the system refuses a process or a file.
    """

    def __init__(
        self,
        builder: Dataset[T],
        requests: Iterable[BatchRequest],
        *,
        num_workers: int,
        prefetch: int,
        pin_memory: bool,
        stall_seconds: float | None,
    ) -> None:
        self._num_workers = num_workers
        self._stall_seconds = stall_seconds
        self._tick = min(TICK_SECONDS, stall_seconds or TICK_SECONDS)
        self._under_way: deque[BatchRequest] = deque()
        self._num_arrived = 0
        self._notes = [new_note() for _ in range(max(1, num_workers))]
        self._processes: list[BaseProcess] = []
        self._pin_threads: list[threading.Thread] = []
        self._iterator: Iterator[T] | None = None
        self._failed = False
        self._limit: StallLimit | None = None
        if stall_seconds is not None and not num_workers:
            self._limit = StallLimit(stall_seconds, lambda: str(self._stalled()))
        self._loader: DataLoader[T] = DataLoader(
            builder,
            sampler=_recorded(requests, self._under_way),
            batch_size=None,
            collate_fn=hand_over,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            timeout=self._tick if num_workers else 0,
            worker_init_fn=partial(start_worker, self._notes),
            multiprocessing_context=_recording(self._processes) if num_workers else None,
        )

    def __next__(self) -> T:
        try:
            if self._iterator is None:
                self._open()
            batch = self._from_workers() if self._num_workers else self._built_here()
        except StopIteration:
            raise
        except BaseException as error:
            # The frames keep torch's iterator, which ends the workers when it is deleted.
            clear_frames(error.__traceback__)
            fault = self._fault(error)
            self._failed = fault is not None
            if fault is None:
                raise
            raise fault from None
        self._under_way.popleft()
        self._num_arrived += 1
        return batch

    def close(self) -> None:
        """End the workers; what they have prepared is lost."""
        if self._limit is not None:
            self._limit.close()
        iterator, self._iterator = [self._iterator], None
        # While Python ends, no thread can be started, and torch waits for nothing.
        if (self._failed or any(self._dead().values())) and not sys.is_finalizing():
            self._kill()
            # torch waits here for its threads, and for locks that a dead worker may hold for ever.
            end = threading.Thread(target=iterator.clear, daemon=True)
            end.start()
            end.join(END_SECONDS)
        iterator.clear()
        self._kill()

    def _kill(self) -> None:
        alive = [process for process in self._processes if process.is_alive()]
        for process in alive:
            process.kill()
        for process in alive:
            # One that waits for a device cannot even be killed.
            process.join(END_SECONDS)

    def _open(self) -> None:
        handler, threads = signal.getsignal(signal.SIGCHLD), threading.enumerate()
        try:
            self._iterator = iter(self._loader)
        finally:
            # When a worker dies, torch's handler raises wherever the main thread is: in a decoder, where any
            # error makes an image unreadable, or in the middle of a checkpoint.
            if signal.getsignal(signal.SIGCHLD) is not handler:
                signal.signal(signal.SIGCHLD, handler)
        # With a timeout, torch does not notice that this thread has ended.
        new = set(threading.enumerate()).difference(threads)
        self._pin_threads = [thread for thread in new if "pin_memory" in thread.name]

    def _built_here(self) -> T:
        use_note(self._notes[0])
        with self._limit or nullcontext():
            return self._next()

    def _from_workers(self) -> T:
        waited = 0.0
        while True:
            if any(self._has_work(worker) for worker in self._dead()):
                raise ChildProcessError
            if not all(thread.is_alive() for thread in self._pin_threads):
                raise RuntimeError(PIN_THREAD)
            try:
                return self._next()
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            # Of a time in which the process was suspended, one tick counts.
            waited += self._tick
            if self._stall_seconds is not None and waited >= self._stall_seconds:
                raise Expired

    def _next(self) -> T:
        assert self._iterator is not None
        return next(self._iterator)

    def _fault(self, error: BaseException) -> LoaderFault | None:
        """What to say instead of an error; None for one that is not the loader's."""
        if isinstance(error, Expired):
            return self._stalled()
        if not isinstance(error, Exception):
            return None
        if isinstance(error, OSError | EOFError) or "ancdata" in str(error):
            # A worker that dies while it hands a batch over hangs up first, and closes its files before it
            # counts as ended.
            sentinels: dict[Any, BaseProcess] = {p.sentinel: p for p in self._processes if p.pid}
            for sentinel in wait(list(sentinels), DEATH_SECONDS):
                sentinels[sentinel].join(DEATH_SECONDS)
        for worker, code in self._dead().items():
            return death(self._who(worker), code, self._read_note(worker), self._waited_for)
        return machine_fault(error, self._waited_for, self._num_workers)

    def _stalled(self) -> LoaderFault:
        worker = self._num_arrived % max(1, self._num_workers)
        return stall(self._who(worker), self._stall_seconds or 0, self._read_note(worker), self._waited_for)

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

    def _dead(self) -> dict[int, int]:
        """The exit codes of workers that have ended, those from whom a batch is awaited first."""
        codes = {worker: process.exitcode for worker, process in enumerate(self._processes)}
        awaited = sorted(codes, key=self._has_work, reverse=True)
        return {worker: code for worker in awaited if (code := codes[worker]) is not None}


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
