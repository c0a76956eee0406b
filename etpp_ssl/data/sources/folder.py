"""Images in files: all below a folder, with class sub-folders or without, or those that a text file lists."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from etpp_ssl.config import UserError, may_change
from etpp_ssl.data.formats import extensions_of, most_bytes, open_file, read_file
from etpp_ssl.data.formats.base import Picture, Reading
from etpp_ssl.data.formats.url import check_urls, is_url
from etpp_ssl.data.sources.base import (
    DataConfig,
    existing_folder,
    expanded,
    images_of,
    no_image_of,
    printable,
)
from etpp_ssl.data.sources.folder_names import folder_names
from etpp_ssl.data.sources.found import by_extension
from etpp_ssl.data.sources.list_file import read_list
from etpp_ssl.data.sources.names import Names, label_counts
from etpp_ssl.data.sources.overviews import overviews_are_averages
from etpp_ssl.data.sources.windows import TiledConfig
from etpp_ssl.messages import shown

EVAL_SYNONYMS = ("val", "validation", "valid", "eval", "test")


class SplitFoldersConfig(DataConfig):
    """A folder of training and evaluation data; see `FolderConfig`."""

    root: str = may_change(...)
    """The folder; `~` and environment variables are expanded."""
    split: str = "train"
    """Sub-folder of the training images, where `root` has one."""
    eval_split: str | None = None
    """Sub-folder of the evaluation images; by default the first of val, validation, valid, eval, test."""

    def folder(self, split: str) -> Path:
        """That of the "train" or the "eval" split.

        Raises:
            UserError: if there is no such folder.
        """
        top = existing_folder("data.root", expanded(self.root))
        train = top / self.split if os.path.isdir(top / self.split) else top
        if split == "train":
            return train
        around = top if train != top else top.parent if top.name == self.split else None
        names = (self.eval_split,) if self.eval_split else EVAL_SYNONYMS
        for name in names if around else ():
            assert around is not None
            if os.path.isdir(around / name):
                return around / name
        raise UserError(
            f"data.eval_split: no evaluation images ({', '.join(names)}) beside the training images "
            f"of data.root {self.root!r}; data.holdout=N keeps N of the latter for evaluation"
        )


class NamedFilesConfig(TiledConfig):
    """Settings of sources whose images are files with names of their own."""

    index: str | None = may_change(None)
    """Where the names of the training images are kept once they are found: a file, which the next start maps
    into memory if nothing has changed. None: from about 131,000 images on in `~/.cache/etpp` (or
    `$XDG_CACHE_HOME/etpp`), below that nowhere. `--rescan` looks for them again."""


class FolderConfig(SplitFoldersConfig, NamedFilesConfig):
    """Images below a folder.

    `root` may hold a sub-folder per split (`train`, `val`, ...), as timm expects, or be the training
    folder itself; evaluation then looks beside a folder that is called like the training split.
    """

    name: Literal["folder"] = "folder"
    labels: Literal["folders", "none"] = "folders"
    """`folders`: the first folder level names the class, if every image lies in one and there are at
    least two (of evaluation images, one will do). `none`: no labels."""

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> FileSource:
        """Open the "train" or the "eval" split; see `DataConfig.open`."""
        source = open_folder(
            "data.root",
            self.folder(split),
            self.reading(in_chans),
            labelled=self.labels == "folders",
            least_classes=2 if split == "train" else 1,
            in_parts=self.tile is not None,
            index=self.index if split == "train" else None,
        )
        if split == "train" and self.reads_overviews:
            source.check_overviews(seed)
        return source


class FileListConfig(NamedFilesConfig):
    """One image per line: a path or URL, then optionally a tab and a class name.

    Paths are relative to `root`; URLs are opened by fsspec (`pip install 'etpp-ssl[url]'`). Empty lines and
    lines that start with # are skipped. Either all lines name a class or none does.
    """

    name: Literal["list"] = "list"
    file: str = may_change(...)
    """The list of training images; `~` and environment variables are expanded."""
    eval_file: str | None = may_change(None)
    """The list of evaluation images; its class names must be among the training list's."""
    root: str | None = may_change(None)
    """Folder, or URL, that the paths are relative to; by default the folder of the list."""

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> FileSource:
        """Open the "train" or the "eval" list; see `DataConfig.open`."""
        url = self.root if self.root and is_url(self.root) else None
        key, path = "data.file", expanded(self.file)
        names = read_list(key, path, index=self.index, url=url)
        if split == "eval":
            if self.eval_file is None:
                raise UserError(
                    "data.eval_file is not given: evaluation needs it, or data.holdout=N to keep N "
                    "training images for it"
                )
            key, path = "data.eval_file", expanded(self.eval_file)
            names = read_list(key, path, url=url, classes=names.facts.classes or [])
        has_urls = bool(names.facts.schemes)
        check_urls(key, names.facts.schemes)
        if has_urls and (self.tile is not None or self.frames == "all"):
            raise UserError(
                f"data.{'frames' if self.tile is None else 'tile'} reads parts of files, and {key} has URLs, "
                f"which are read whole: copy the files first (`etpp prepare` makes shards of whole images)"
            )
        root = path.parent
        if self.root and url is None:
            root = existing_folder("data.root", expanded(self.root))
        reading, in_parts = self.reading(in_chans), self.tile is not None
        source = FileSource(root, names, None, names.facts.classes, reading, in_parts=in_parts)
        if split == "train" and self.reads_overviews and not has_urls:
            source.check_overviews(seed)
        return source


class FileSource:
    """A list of files below a folder, decoded on demand.

    Args:
        folder: what the names are relative to.
        files: relative paths, or URLs; `Names` have their labels with them.
        labels: class index per file, or None.
        classes: class names, or None.
        reading: how they become pictures.
        notes: what else there is to say of them.
        in_parts: whether they are shown window by window; see `etpp_ssl.data.formats.open_file`.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        labels: Sequence[int] | None,
        classes: list[str] | None,
        reading: Reading,
        notes: Sequence[str] = (),
        in_parts: bool = False,
    ) -> None:
        self.folder = folder
        self.files = files if isinstance(files, Names) else Names.of(files, labels)
        self.classes = None if classes is None else [printable(name) for name in classes]
        self.reading = reading
        self.notes = notes
        self.in_parts = in_parts

    @property
    def max_bytes(self) -> int:
        """Of a file."""
        return most_bytes(self.reading)

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Picture:
        """Read a file, or its header; see `ImageSource.open`."""
        return open_file(self.path(index), self.reading, in_parts=self.in_parts)

    def path(self, index: int) -> str | Path:
        """Where a file lies, or its URL."""
        file = self.files[index]
        return file if is_url(file) else self.folder / file

    def check_overviews(self, seed: int) -> None:
        """Let regions come from the files' overviews if those of a keyed sample are averages."""
        without, self.reading = self.reading, replace(self.reading, overviews=True)
        averages = overviews_are_averages(self.open, len(self), seed)
        if averages is not None:
            what = "serve small crops" if averages else "are not read: they are no averages of the pixels"
            self.notes = (*self.notes, f"their overviews {what}")
        if not averages:
            self.reading = without

    def read(self, index: int) -> bytes:
        """A file's bytes, as they are stored; see `etpp_ssl.data.formats.read_file`."""
        return read_file(self.path(index), self.max_bytes)

    def stored_size(self, index: int) -> int:
        """Bytes of a file, 0 where it cannot be read."""
        try:
            return os.stat(self.path(index)).st_size
        except (OSError, ValueError):
            return 0

    def label(self, index: int) -> int:
        """Class index, or -1."""
        return self.files.label(index)

    def all_labels(self) -> np.ndarray:
        """See `ImageSource.all_labels`."""
        return np.full(len(self), -1, np.int8) if self.files.labels is None else self.files.labels

    def name(self, index: int) -> str:
        """Relative path, as a log can show it."""
        return printable(self.files[index])

    def fingerprint(self) -> str:
        """Hash of names and labels; the folder may move, its content may not change."""
        return self.files.facts.fingerprint

    def stamp(self) -> str | None:
        """Hash of what tells that no file has changed: sizes and times. None where an image is a folder."""
        digest = hashlib.blake2b(
            repr((self.folder.absolute(), self.reading)).encode(errors="surrogateescape")
        )
        for index, file in enumerate(self.files):
            try:
                status = os.stat(self.path(index))
            except (OSError, ValueError):
                return None
            if stat.S_ISDIR(status.st_mode):
                return None
            digest.update(os.fsencode(file) + b"\0%d %d\n" % (status.st_size, status.st_mtime_ns))
        return digest.hexdigest()

    def describe(self) -> str:
        """Their number, folder, extensions and classes, and what was left out."""
        kinds = by_extension(Counter(self.files.facts.extensions))
        count = len(self.classes or ())
        labels = f"{count:,} class{'' if count == 1 else 'es'}" if count else "no labels"
        notes = list(self.notes)
        if self.classes and self.files.labels is not None:
            found = label_counts(self.files.labels, count)
            without = [name for name, number in zip(self.classes, found, strict=True) if not number]
            if without:
                notes.append(no_image_of(without))
        place = printable(str(self.folder))
        return "; ".join([f"{images_of(len(self))} in {place!r} ({kinds}; {labels})", *notes])


def open_folder(
    key: str,
    folder: Path,
    reading: Reading,
    *,
    labelled: bool = True,
    least_classes: int = 2,
    in_parts: bool = False,
    index: str | None = None,
) -> FileSource:
    """All images below one folder, in the order of their paths' bytes.

    Args:
        key: names the folder in the message.
        folder: where they lie.
        reading: how the files become pictures.
        labelled: whether the first folder level may name classes.
        least_classes: fewer folders are not classes.
        in_parts: see `FileSource`.
        index: `data.index`.

    Raises:
        UserError: if there is no image, or a folder cannot be read: a run must not take the rest for all.
    """
    extensions = extensions_of(reading.reader)
    try:
        names = folder_names(
            folder, extensions, least_classes=least_classes if labelled else None, index=index
        )
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"{key}: folder {shown(os.fspath(where), 300)} cannot be read: {error.strerror}"
        ) from error
    facts = names.facts
    if not names:
        raise UserError(
            f"{key}: no image below {str(folder)!r} ({'; '.join(facts.notes) or 'it is empty'}; looked for "
            f"{', '.join(sorted(extensions))})"
        )
    return FileSource(folder, names, None, facts.classes, reading, facts.notes, in_parts)
