"""What `etpp prepare` stores of an image: its bytes as they are, or a smaller JPEG.

Many images in work at once, their results in order.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

from PIL import Image
from pydantic import Field

from etpp_ssl.config import Config
from etpp_ssl.data.formats.decode import EXTENSIONS, decode
from etpp_ssl.data.sources.base import UnreadableImage
from etpp_ssl.data.sources.folder import FileSource

DEFAULT_QUALITY = 92


class RecodeConfig(Config):
    """Re-encoding to RGB JPEG with full-resolution colour (4:4:4), upright, without metadata."""

    size: int | None = Field(default=None, ge=1)
    """The shorter side becomes at most this many pixels, by antialiased bicubic; None keeps all."""
    quality: int = Field(default=DEFAULT_QUALITY, ge=1, le=100)
    """JPEG quality on the scale of libjpeg."""


@dataclass(frozen=True)
class Stored:
    """One image as a shard keeps it."""

    data: bytes
    extension: str
    """With its dot, lower case."""
    fault: str | None
    """Why it cannot be read or re-encoded, if so; `data` is then the file as it is, or empty."""


class Converter:
    """Makes what is stored of each image of a source; small to pickle, for worker processes.

    Args:
        source: the images.
        recode: how to re-encode; None copies the bytes.
        check: decode bytes that are copied too, to know whether they can be.
    """

    def __init__(self, source: FileSource, recode: RecodeConfig | None, *, check: bool) -> None:
        self.source = source
        self.recode = recode
        self.check = check

    def __call__(self, index: int) -> Stored:
        """Image number `index`."""
        extension = os.path.splitext(self.source.files[index])[1].lower()
        # timm's reader of WebDataset tars looks for jpg, png and webp only.
        extension = {".jpeg": ".jpg"}.get(extension, extension)
        extension = extension if extension in EXTENSIONS else ".img"
        data = b""
        try:
            data = self.source.read(index)
            if self.recode is not None:
                return Stored(encode(decode(data, 3, self.source.max_pixels)[0], self.recode), ".jpg", None)
            if self.check:
                decode(data, self.source.in_chans, self.source.max_pixels)
        except UnreadableImage as error:
            return Stored(data, extension, str(error))
        return Stored(data, extension, None)


def encode(picture: Image.Image, recode: RecodeConfig) -> bytes:
    """A JPEG of an RGB picture.

    Raises:
        UnreadableImage: if it is larger than a JPEG can be (65,535 pixels a side).
    """
    shorter = min(picture.size)
    if recode.size is not None and recode.size < shorter:
        width, height = (max(1, round(side * recode.size / shorter)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    try:
        picture.save(buffer, "JPEG", quality=recode.quality, subsampling="4:4:4")
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"it cannot be written as JPEG ({error})") from error
    return buffer.getvalue()


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
