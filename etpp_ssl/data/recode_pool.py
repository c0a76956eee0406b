"""Many images in work at once, their results in order."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from etpp_ssl.data.recode import Converter, Stored

AHEAD = 8
"""Images per worker that are submitted before the first result is taken."""

_convert_in_this_worker: Converter


@contextmanager
def converted(convert: Converter, images: range, workers: int) -> Iterator[Iterator[Stored]]:
    """What is stored of each image, in their order, for any number of workers.

    Args:
        convert: makes it.
        images: numbers of the images.
        workers: images in work at once.
    """
    executor, work = _executor(convert, workers)
    try:
        yield _in_order(executor, work, images, AHEAD * workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _executor(convert: Converter, workers: int) -> tuple[Executor, Callable[[int], Stored]]:
    """Threads to copy bytes, which wait for the disk; processes to encode, which holds Python's lock."""
    if convert.recode is None or workers == 1:
        return ThreadPoolExecutor(workers), convert
    # Not a fork: the progress bar has a thread, and its locks would be copied as they stand.
    processes = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(convert,)
    )
    return processes, _convert_in_worker


def _start_worker(convert: Converter) -> None:
    global _convert_in_this_worker
    # Ctrl-C reaches the whole process group; the main process stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main, daemon=True).start()
    _convert_in_this_worker = convert


def _end_with_main() -> None:
    # A main process that is killed tells its workers nothing, and they would wait for ever.
    main = parent_process()
    assert main is not None
    main.join()
    os._exit(1)


def _convert_in_worker(index: int) -> Stored:
    return _convert_in_this_worker(index)


def _in_order(
    executor: Executor, work: Callable[[int], Stored], images: range, ahead: int
) -> Iterator[Stored]:
    waiting: deque[Future[Stored]] = deque()
    for image in images:
        waiting.append(executor.submit(work, image))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
