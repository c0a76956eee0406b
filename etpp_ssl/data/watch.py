"""Waiting for batches: a worker that dies or stalls, or has no room for its batch, ends the wait by name."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext, suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch._C import _remove_worker_pids, _set_worker_pids
from torch.utils.data import DataLoader, Dataset, Sampler

from etpp_ssl.data import loader_faults
from etpp_ssl.data.loader_faults import LoaderFault, Scene
from etpp_ssl.data.reading import ReadingBoard, use_board
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.data.time_limit import Expired, TimeLimit
from etpp_ssl.data.worker import start_worker

DEATH_SECONDS = 2.0
"""Until a worker that has hung up counts as alive."""
KILL_SECONDS = 5.0
"""Until a worker that was killed is left alone."""
SHUT_DOWN_SECONDS = 10.0
"""Until a loader that has failed is left alone: its threads may wait for what a dead worker holds."""

T = TypeVar("T")


class Requests(Sampler[BatchRequest]):
    """A loader's requests, and which of them have gone out without a batch coming back.

    Args:
        requests: what to build.
    """

    def __init__(self, requests: Iterable[BatchRequest]) -> None:
        self.requests = requests
        self.under_way: deque[tuple[int, BatchRequest]] = deque()
        """With their numbers, the oldest first."""

    def __iter__(self) -> Iterator[BatchRequest]:
        for number, request in enumerate(self.requests):
            self.under_way.append((number, request))
            yield request

    def arrived(self) -> None:
        """The oldest one's batch is here."""
        self.under_way.popleft()

    @property
    def oldest(self) -> BatchRequest | None:
        """The request whose batch comes next."""
        return self.under_way[0][1] if self.under_way else None


class Watch(Iterator[T], Generic[T]):
    """A torch loader's batches in the order of their requests, or one sentence about what went wrong.

    Args:
        builder: builds the batches; see `batch_loader`.
        requests: what to build.
        num_workers: worker processes; 0 builds in this process.
        prefetch: batches that each worker keeps ready.
        pin_memory: whether the batches go to a GPU.
        hand_over: called on each batch in the process that built it.
        stall_seconds: how long to wait for a batch at most; None waits for ever.

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
        hand_over: Callable[[Any], Any],
        stall_seconds: float | None,
    ) -> None:
        self._name: Callable[[int], str] | None = getattr(builder, "image_name", None)
        self._requests = Requests(requests)
        self._num_workers = num_workers
        self._processes: list[BaseProcess] = []
        self._board = ReadingBoard(max(1, num_workers))
        self._failure: LoaderFault | None = None
        self._limit = None
        if stall_seconds is not None:
            self._limit = TimeLimit(stall_seconds, lambda: str(self._stalled()))
        self._loader: DataLoader[T] = DataLoader(
            builder,
            sampler=self._requests,
            batch_size=None,
            collate_fn=hand_over,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=partial(start_worker, self._board),
            multiprocessing_context=_recording(self._processes) if num_workers else None,
        )
        self._iterator: Any = None

    def __next__(self) -> T:
        try:
            if self._iterator is None:
                self._iterator = self._opened()
            batch: T = self._waited_for()
        except StopIteration:
            raise
        except Expired:
            self._failure = self._stalled()
            raise self._failure from None
        except Exception as error:
            self._failure = self._fault(error)
            if self._failure is None:
                raise
            raise self._failure from None
        self._requests.arrived()
        return batch

    def close(self) -> None:
        """End the workers; what they have prepared is lost."""
        if self._limit is not None:
            self._limit.close()
        # An exception from a worker holds its traceback in a cycle. Left to the garbage collector, torch
        # can no longer tell the workers to end, and waits five seconds for each before it kills them.
        shut_down = getattr(self._iterator, "_shutdown_workers", None)
        if self._failure is not None:
            # They may be stuck, or wait for a lock that a dead one holds, and so may torch's threads.
            self._kill()
            if shut_down is not None:
                patience = TimeLimit(SHUT_DOWN_SECONDS, partial(str, self._failure))
                with suppress(Expired), closing(patience), patience:
                    shut_down()
        elif shut_down is not None:
            shut_down()
        self._kill()

    def _opened(self) -> Any:
        iterator: Any = iter(self._loader)
        if self._num_workers:
            # torch's handler of SIGCHLD raises wherever the main thread happens to be: in a decoder, where
            # any error makes an image unreadable, or in the middle of a checkpoint. It is to know of the
            # workers only while their batch is waited for.
            _remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        return iterator

    def _waited_for(self) -> T:
        with self._limit or nullcontext():
            if not self._num_workers:
                use_board(self._board, 0)
                return self._next()
            key = id(self._iterator)
            _set_worker_pids(key, tuple(p.pid for p in self._processes if p.pid))
            try:
                if any(self._under_way(worker) for worker in self._dead()):
                    raise _WorkerDied
                return self._next()
            finally:
                _remove_worker_pids(key)

    def _next(self) -> T:
        batch: T = next(self._iterator)
        return batch

    def _fault(self, error: Exception) -> LoaderFault | None:
        """What to say instead of an error; None for one that comes from the data."""
        if isinstance(error, OSError | EOFError) or "ancdata" in str(error):
            self._await_death()
        dead = self._dead()
        if dead:
            worker = next((worker for worker in dead if self._under_way(worker)), next(iter(dead)))
            return loader_faults.worker_died(self._scene(worker), dead[worker])
        return loader_faults.handover_failed(error, self._scene(self._next_worker()), self._num_workers)

    def _await_death(self) -> None:
        # A worker that dies while it hands a batch over hangs up first, and closes its files before it counts
        # as ended.
        sentinels = {process.sentinel: process for process in self._processes if process.pid}
        if sentinels:
            for sentinel in wait(list(sentinels), DEATH_SECONDS):
                sentinels[sentinel].join(DEATH_SECONDS)  # type: ignore[index]

    def _stalled(self) -> LoaderFault:
        assert self._limit is not None
        return loader_faults.loader_stalled(self._scene(self._next_worker()), self._limit.seconds)

    def _scene(self, worker: int) -> Scene:
        under_way, reading = self._under_way(worker), self._board.read(worker)
        # What the worker has finished may still be on its way.
        at_work = [r for r in under_way if reading is not None and reading.position in r.positions]
        who = f"worker process {worker + 1} of {self._num_workers}" if self._num_workers else "the process"
        return Scene(
            waited_for=self._requests.oldest,
            who=who,
            in_hand=next(iter(at_work or under_way), None),
            reading=reading,
            name=self._name,
        )

    def _next_worker(self) -> int:
        """The one whose batch comes next."""
        under_way = self._requests.under_way
        return under_way[0][0] % self._num_workers if under_way and self._num_workers else 0

    def _under_way(self, worker: int) -> list[BatchRequest]:
        """What a worker has to do, the oldest first; torch gives request i to worker i mod W."""
        under_way = self._requests.under_way
        return [request for number, request in under_way if number % max(1, self._num_workers) == worker]

    def _dead(self) -> dict[int, int]:
        """The exit codes of workers that have ended."""
        codes = [process.exitcode for process in self._processes]
        return {worker: code for worker, code in enumerate(codes) if code is not None}

    def _kill(self) -> None:
        alive = [process for process in self._processes if process.is_alive()]
        for process in alive:
            process.kill()
        for process in alive:
            # One that waits for a device cannot even be killed.
            process.join(KILL_SECONDS)


class _WorkerDied(Exception):
    pass


def _recording(processes: list[BaseProcess]) -> BaseContext:
    """The context of multiprocessing that is in use, noting the processes that torch starts in it.

    torch's own list is out of reach if a worker dies while the loader is being opened.
    """
    kind: Any = type(multiprocessing.get_context())

    class Recording(kind):
        def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:
            process: BaseProcess = kind.Process(*args, **kwargs)
            processes.append(process)
            return process

    context: BaseContext = Recording()
    return context
