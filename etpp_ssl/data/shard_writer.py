"""Writes one split as shards for `etpp prepare`: the images' bytes as they are, or re-encoded as JPEG.

Bytes as they are keep values of any depth. JPEG does not, and such images are refused.

The shards are the same to the byte for any number of workers, and writing resumes after a stop. Every
finished `shard-000003.tar` has its rows of the index beside it, in `shard-000003.rows.json`. The index joins
them at the end, so a folder without `index.json` is not finished.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from etpp_ssl.config import Config, UserError
from etpp_ssl.data.formats import EXTENSIONS, check_header, decode, jpeg, open_picture
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.formats.pictures import FramedPicture, frames_of
from etpp_ssl.data.sources.folder import FileSource
from etpp_ssl.data.sources.found import extension_of
from etpp_ssl.data.sources.shard_index import ShardIndex, ShardRows
from etpp_ssl.files import replaced_file, write_text

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


@dataclass(frozen=True)
class Converter:
    """Makes what is stored of each image of a source; small to pickle, for worker processes."""

    source: FileSource
    recode: RecodeConfig | None
    """How to re-encode; None copies the bytes."""
    decode: bool
    """Decode bytes that are copied, too, to know whether they can be; otherwise only headers are read."""

    def __call__(self, index: int) -> Stored:
        """Image number `index`."""
        extension = extension_of(self.source.files[index])
        # timm's reader of WebDataset tars looks for jpg, png and webp only.
        extension = ".jpg" if extension in jpeg.FORMAT.extensions else extension
        extension = extension if extension in EXTENSIONS else ".img"
        data, reading = b"", self.source.reading
        try:
            data = self.source.read(index)
            if self.recode is not None:
                _require_8_bits(data, reading)
                return Stored(encode(decode(data, reading)[0], self.recode), ".jpg", None)
            if self.decode:
                _decode_all(data, reading)
            else:
                check_header(data, reading.max_pixels, reading.reader)
        except UnreadableImage as error:
            return Stored(data, extension, str(error))
        return Stored(data, extension, None)


def _require_8_bits(data: bytes, reading: Reading) -> None:
    """Check that JPEG can hold a file's values.

    Raises:
        UnreadableImage: if they are deeper. What cannot be read at all is left to `decode`.
    """
    try:
        picture = open_picture(data, replace(reading, in_chans=0, range="raw"))
        dtype = picture.region((0, 0, 1, 1), (1, 1)).pixels.dtype if picture.deep else np.dtype(np.uint8)
    except UnreadableImage:
        return
    if dtype.itemsize > 1:
        raise UnreadableImage(
            f"its values are {dtype}, of which JPEG keeps 8 bits: without --size and --quality they are "
            f"copied whole"
        )


def _decode_all(data: bytes, reading: Reading) -> None:
    """Decode every image of a file, whatever its depth and channels.

    Raises:
        UnreadableImage: if one cannot be.
    """
    picture = open_picture(data, replace(reading, in_chans=0, range="raw", frames=True))
    for number in range(frames_of(picture)):
        one = picture.frame(number) if isinstance(picture, FramedPicture) else picture
        one.region((0, 0, *one.size), one.size)


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


AHEAD = 16
"""Images per worker that are submitted together."""

_convert_in_this_worker: Converter


@contextmanager
def converted(convert: Converter, images: range, workers: int) -> Iterator[Iterator[Stored]]:
    """What is stored of each image, in the order of the images, for any number of workers.

    Args:
        convert: makes it.
        images: numbers of the images.
        workers: images in work at once.
    """
    executor, work = _executor(convert, workers)
    step = AHEAD * workers
    parts = (images[start : start + step] for start in range(0, len(images), step))
    try:
        yield chain.from_iterable(executor.map(work, part) for part in parts)
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


class ShardWriter:
    """Writes the shards of one source.

    Args:
        folder: where to.
        source: gives names and labels.
        shard_bytes: a shard ends with the image that reaches this size.
        skip_bad: leave out images with a fault, instead of storing what there is of them.
    """

    def __init__(self, folder: Path, source: FileSource, shard_bytes: int, *, skip_bad: bool) -> None:
        self.folder = folder
        self.source = source
        self.shard_bytes = shard_bytes
        self.skip_bad = skip_bad
        self.index = ShardIndex({}, source.classes, ShardRows())
        self.next_image = 0
        """The first image that no finished shard holds or has left out."""

    def resume(self) -> None:
        """Find the shards that an earlier call has finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            tar = self._tar(len(self.index.files))
            rows = _rows_file(tar)
            if not (tar.exists() and rows.exists()):
                return
            self._add(tar, json.loads(rows.read_text(encoding="utf-8")))

    def write(self, images: Iterator[Stored], advance: Callable[[int], None]) -> None:
        """Write the images from `next_image` on, then the index.

        Args:
            images: what is stored of them, in order.
            advance: called after each with the number of images that are done.

        Raises:
            UserError: if none of them can be read.
        """
        while self.next_image < len(self.source):
            self._write_shard(images, advance)
        if len(self.index.bad) == len(self.source):
            name, reason = self.index.bad[0]
            raise UserError(
                f"SRC: none of the {len(self.source):,} images can be read, the first one {name!r}: {reason}"
            )
        self.index.save(self.folder)

    def _write_shard(self, images: Iterator[Stored], advance: Callable[[int], None]) -> None:
        number = len(self.index.files)
        target = self._tar(number)
        rows, bad, image = ShardRows(), [], self.next_image
        # All names are ours and short: the plain format, whose headers are one block each, is enough.
        with replaced_file(target) as aside:
            with tarfile.open(aside, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                while image < len(self.source) and tar.offset < self.shard_bytes:
                    stored = next(images)
                    name, label = self.source.files[image], self.source.label(image)
                    if stored.fault is not None:
                        bad.append((self.source.name(image), stored.fault))
                    if stored.fault is None or not self.skip_bad:
                        key = f"{image:09d}"
                        offset = _add_member(tar, key + stored.extension, stored.data)
                        rows.append(name, label, number, offset, len(stored.data))
                        if label >= 0:
                            _add_member(tar, key + ".cls", b"%d" % label)
                    image += 1
                    advance(image)
            content = {"end": image, "rows": asdict(rows), "bad": bad}
            write_text(_rows_file(target), json.dumps(content, separators=(",", ":")))
        self._add(target, content)

    def _add(self, tar: Path, content: dict[str, Any]) -> None:
        self.index.files[tar.name] = tar.stat().st_size
        self.index.rows.extend(ShardRows(**content["rows"]))
        self.index.bad += [(name, reason) for name, reason in content["bad"]]
        self.next_image = content["end"]

    def _tar(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.tar"


def remove_traces(folder: Path) -> None:
    """Remove what only an unfinished split needs."""
    for pattern in ("shard-*.rows.json", ".writing-*"):
        for path in folder.glob(pattern):
            path.unlink()


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file, with nothing of this machine in its header; returns where its bytes start."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset


def _rows_file(tar: Path) -> Path:
    return tar.with_suffix(".rows.json")
