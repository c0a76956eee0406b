"""`etpp prepare`: copies images to shards once, for slow file systems.

Everything is written to `DST.partial` and renamed at the end. Its `prepare.json` says which images were
converted and how, so that the same command resumes after a stop and recognises a finished DST.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import Progress

from etpp_ssl.config import Config, UserError
from etpp_ssl.data.formats import FOLDER_EXTENSIONS
from etpp_ssl.data.formats.base import MAX_PIXELS, Reading
from etpp_ssl.data.shard_writer import (
    Converter,
    RecodeConfig,
    ShardWriter,
    converted,
    remove_traces,
)
from etpp_ssl.data.sources.base import printable
from etpp_ssl.data.sources.folder import EVAL_SYNONYMS, FileListConfig, FileSource, open_folder
from etpp_ssl.data.sources.found import extension_of
from etpp_ssl.data.sources.shard_index import INDEX_FILE, open_index
from etpp_ssl.data.sources.shards import ShardSource
from etpp_ssl.files import read_text, write_text
from etpp_ssl.messages import validation_sentence

JOB_FILE = "prepare.json"
MAX_JOB_BYTES = 1 << 20
SHOWN = 50
"""Unreadable images of a split that are named; `index.json` names all."""
PROBED = 16
"""Images that are re-encoded to estimate the size of all."""
TAR_BYTES = 2048
"""What a tar adds to an image at most: two headers, a label and the padding, on average."""


class PrepareConfig(Config):
    """How to write shards."""

    recode: RecodeConfig | None = None
    """How to re-encode; None copies the bytes."""
    skip_bad: bool = False
    """Leave out images that cannot be read: later ones then move up, and the order of a run changes.
    Otherwise they keep their place, and a run replaces them as it would with the files."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=2**32)
    """Images of more pixels count as unreadable, as in `data.max_pixels`."""
    shard_mb: int | float = Field(default=1024, gt=0, le=1 << 20)
    """A shard ends with the image that reaches so many megabytes (2^20 bytes)."""
    workers: int = Field(default=1, ge=1, le=4096)
    """Images in work at once; never changes a byte."""


def prepare_shards(source: Path, destination: Path, say: Callable[[str], None], **options: Any) -> None:
    """The command: `prepare` under a progress bar, and what became of the images.

    Args:
        source: a folder of images, or a list of files.
        destination: the folder to make.
        say: told what was found, and which images cannot be read.
        options: of `from_options`.

    Raises:
        UserError: as `prepare`.
    """
    config = from_options(**options)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("prepare", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        splits = prepare(source, destination, config, advance, say)
    for split in splits:
        what = "left out" if config.skip_bad else "kept as it is"
        for name, reason in split.bad[:SHOWN]:
            say(f"etpp: {what}: {name!r}: {reason}")
        for reason, count in Counter(reason for _, reason in split.bad[SHOWN:]).most_common(SHOWN):
            say(f"etpp: {what}: {count:,} more: {reason}")
        print(
            f"{split.folder}: {split.images:,} images in {split.shards} shard{'s' * (split.shards != 1)}, "
            f"{split.size / 1e6:,.1f} MB, {len(split.bad):,} bad"
        )


def from_options(*, size: int | None, quality: int | None, **options: Any) -> PrepareConfig:
    """Settings from the command line's options; a size or a quality asks for re-encoding.

    Raises:
        UserError: naming the option, its value and what would be valid.
    """
    recode: dict[str, int] = {} if size is None else {"size": size}
    if quality is not None:
        recode["quality"] = quality
    try:
        return PrepareConfig.model_validate({"recode": recode or None, **options})
    except ValidationError as error:
        sentence = validation_sentence(error, PrepareConfig)
        key, _, rest = sentence.removeprefix("recode.").partition(" ")
        raise UserError(f"--{key.replace('_', '-')} {rest}") from None


@dataclass(frozen=True)
class Prepared:
    """A split that has been converted."""

    folder: Path
    images: int
    shards: int
    size: int
    """Bytes of all its tars."""
    bad: list[tuple[str, str]]
    """Images that could not be read or re-encoded: name and reason."""


def prepare(
    source: Path,
    destination: Path,
    config: PrepareConfig,
    advance: Callable[[int, int], None],
    say: Callable[[str], None] = lambda text: None,
) -> list[Prepared]:
    """Convert a folder, a list of files or someone's tars to shards, every image at its place.

    A folder that has `train` converts that and each of val, validation, valid, eval, test.

    Args:
        source: the folder or the list.
        destination: a folder that does not exist, is empty, or holds what this call would write.
        config: how.
        advance: called with the images done and those of all splits.
        say: told what was found.

    Returns:
        The splits, in the order of their names, training first.

    Raises:
        UserError: if there is no image, none can be read, or the destination cannot take the shards.
    """
    # "." cannot be renamed to, and afterwards is not the folder that took its place.
    destination = Path(os.path.abspath(destination))
    _check_places(source, destination)
    splits = _open_splits(source, config.max_pixels)
    for split in splits.values():
        _refuse_folders(split)
    job = _job(splits, config)
    if not _is_done(destination, job):
        try:
            with _alone(destination):
                if not _is_done(destination, job):
                    _convert(splits, destination, job, config, advance, say)
        except (OSError, UserError) as error:
            fault = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(fault, OSError):
                raise
            raise UserError(
                f"DST {str(destination)!r} cannot be written: {fault.strerror or fault}; the same command "
                f"resumes from what is there"
            ) from error
        except BrokenExecutor as error:
            raise UserError(
                "a worker process ended (out of memory?); the same command with fewer --workers resumes "
                "from what is there"
            ) from error
    return [_summary(destination / name) for name in splits]


def _check_places(source: Path, destination: Path) -> None:
    if not os.path.exists(source):
        raise UserError(f"SRC {str(source)!r} does not exist: use a folder of images or a list of them")
    inside, around = destination.resolve(), source.resolve()
    if os.path.isdir(source) and inside.is_relative_to(around):
        raise UserError(
            f"DST {str(destination)!r} lies inside SRC {str(source)!r}: choose a folder outside of it"
        )
    if os.path.exists(destination) and not os.path.isdir(destination):
        raise UserError(f"DST {str(destination)!r} is a file: choose a folder that does not exist yet")
    if os.path.ismount(destination):
        # The shards are written beside it and renamed, which cannot cross disks.
        raise UserError(f"DST {str(destination)!r} is a mount point: choose a folder inside of it")


def _open_splits(source: Path, max_pixels: int) -> dict[str, FileSource]:
    """By sub-folder of the destination; an empty name is the destination itself."""
    if not os.path.isdir(source):
        images = FileListConfig(file=str(source), max_pixels=max_pixels)
        return {"": images.open("train", in_chans=3, image_size=(1, 1), seed=0)}
    names = ["train", *EVAL_SYNONYMS] if (source / "train").is_dir() else [""]
    splits: dict[str, FileSource] = {}
    for name in names:
        folder = source / name
        if any(folder.glob("*.tar")):
            splits[name] = ShardSource(folder, open_index("SRC", folder), Reading(3, max_pixels))
        elif folder.is_dir():
            least = 1 if name in EVAL_SYNONYMS else 2
            splits[name] = open_folder("SRC", folder, Reading(3, max_pixels), least_classes=least)
    return splits


def _refuse_folders(source: FileSource) -> None:
    folder = next((file for file in source.files if extension_of(file) in FOLDER_EXTENSIONS), None)
    if folder is not None:
        raise UserError(
            f"SRC: {printable(folder)!r} is an image in a folder, which no shard can hold: data=folder reads "
            f"it where it is, and as .h5 or .npy it can be prepared"
        )


def _job(splits: dict[str, FileSource], config: PrepareConfig) -> dict[str, Any]:
    """Everything that decides the bytes which are written."""
    content = {}
    for name, source in splits.items():
        digest = hashlib.blake2b(source.fingerprint().encode(), digest_size=12)
        for index in range(len(source)):
            digest.update(b"%d\n" % source.stored_size(index))
        content[name] = digest.hexdigest()
    settings = config.model_dump(mode="json", exclude={"workers"})
    if config.max_pixels == MAX_PIXELS:
        # Folders from before the setting hold the same.
        del settings["max_pixels"]
    return {"version": 1, "source": content, **settings}


def _is_done(destination: Path, job: dict[str, Any]) -> bool:
    """Whether the destination is what the job would write.

    Raises:
        UserError: if it is something else.
    """
    if not os.path.exists(destination) or not any(destination.iterdir()):
        return False
    if _read_job(destination) == job:
        return True
    raise UserError(
        f"DST {str(destination)!r} holds other files, or shards of other images or settings: choose a "
        f"folder that does not exist yet, or remove it"
    )


def _read_job(folder: Path) -> Any:
    try:
        return json.loads(read_text(folder / JOB_FILE, MAX_JOB_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Keep out other processes, such as a second job with the same command.

    Raises:
        UserError: if one is at work. A file system without locks gives none, and no error.
    """
    lock = FileLock(destination.with_name(f".{destination.name}.lock"), timeout=0, fallback_to_soft=False)
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"DST {str(destination)!r} is being written by another process") from None
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        # Before it is released: whoever comes now finds the work done.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _convert(
    splits: dict[str, FileSource],
    destination: Path,
    job: dict[str, Any],
    config: PrepareConfig,
    advance: Callable[[int, int], None],
    say: Callable[[str], None],
) -> None:
    aside = destination.with_name(destination.name + ".partial")
    _start(aside, job)
    for source in splits.values():
        say(f"etpp: {source.describe()}")
    total = sum(len(source) for source in splits.values())
    before = 0
    for name, source in splits.items():
        if not (aside / name / INDEX_FILE).exists():
            writer = ShardWriter(aside / name, source, int(config.shard_mb * 2**20), skip_bad=config.skip_bad)
            writer.resume()
            convert = Converter(source, config.recode, decode=config.skip_bad)
            _check_space(writer, convert)
            images = range(writer.next_image, len(source))
            with converted(convert, images, config.workers) as results:
                writer.write(results, partial(_advance_from, advance, before, total))
        before += len(source)
        advance(before, total)
    for name in splits:
        remove_traces(aside / name)
    if destination.exists():
        # It is empty. Only some systems rename to what is there.
        destination.rmdir()
    os.replace(aside, destination)


def _advance_from(advance: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    advance(before + done, total)


def _start(aside: Path, job: dict[str, Any]) -> None:
    """Make the folder to write to, and clear what another job has left there."""
    if aside.exists() and _read_job(aside) != job:
        if any(aside.iterdir()) and not (aside / JOB_FILE).exists():
            raise UserError(
                f"{str(aside)!r}, where the shards are written first, holds other files: remove it"
            )
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    write_text(aside / JOB_FILE, json.dumps(job, separators=(",", ":")))


def _check_space(writer: ShardWriter, convert: Converter) -> None:
    """Refuse a disk that is too small by the sizes of the files, or of a few re-encoded images."""
    source, first = writer.source, writer.next_image
    left = range(first, len(source))
    if convert.recode is None:
        needed = sum(source.stored_size(index) for index in left)
    else:
        probed = left[:: max(1, len(left) // PROBED)]
        needed = sum(len(convert(index).data) for index in probed) * len(left) // max(1, len(probed))
    needed += len(left) * TAR_BYTES
    free = shutil.disk_usage(writer.folder).free
    if needed > free:
        raise UserError(
            f"DST: the shards need about {needed / 1e9:.2f} GB, but the disk of {str(writer.folder)!r} has "
            f"{free / 1e9:.2f} GB free"
        )


def _summary(folder: Path) -> Prepared:
    index = open_index("DST", folder)
    return Prepared(folder, len(index.rows.names), len(index.files), sum(index.files.values()), index.bad)
