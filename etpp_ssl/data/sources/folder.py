"""Images in files: all below a folder, with class sub-folders or without, or those that a text file lists."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from etpp_ssl.config import NotAtHand, UserError, listed, may_change
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
from etpp_ssl.data.sources.found import by_extension, class_folders, extension_of, find_images
from etpp_ssl.data.sources.overviews import overviews_are_averages
from etpp_ssl.data.sources.windows import TiledConfig
from etpp_ssl.files import read_regular
from etpp_ssl.messages import shown

MAX_LIST_BYTES = 1 << 34
"""Of a list: about two hundred million names."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
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


class FolderConfig(SplitFoldersConfig, TiledConfig):
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
        )
        if split == "train" and self.reads_overviews:
            source.check_overviews(seed)
        return source


class FileListConfig(TiledConfig):
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
        rows = self._rows("data.file", expanded(self.file))
        train_names = {name for _, name in rows if name is not None}
        classes = sorted(train_names) or None
        path, key = expanded(self.file), "data.file"
        if split == "eval":
            if self.eval_file is None:
                raise UserError(
                    "data.eval_file is not given: evaluation needs it, or data.holdout=N to keep N "
                    "training images for it"
                )
            path, key = expanded(self.eval_file), "data.eval_file"
            rows = self._rows(key, path)
            unknown = sorted({name for _, name in rows if name is not None} - train_names)
            if unknown:
                raise UserError(f"{key}: class {unknown[0]!r} is not in data.file")
        files, root = [file for file, _ in rows], path.parent
        if self.root and is_url(self.root):
            files = [file if is_url(file) else f"{self.root.rstrip('/')}/{file}" for file in files]
        elif self.root:
            root = existing_folder("data.root", expanded(self.root))
        has_urls = check_urls(key, files)
        if has_urls and (self.tile is not None or self.frames == "all"):
            raise UserError(
                f"data.{'frames' if self.tile is None else 'tile'} reads parts of files, and {key} has URLs, "
                f"which are read whole: copy the files first (`etpp prepare` makes shards of whole images)"
            )
        labels = None
        if classes is not None:
            if any(name is None for _, name in rows):
                raise UserError(f"{key} {str(path)!r} names a class on some lines but not on all")
            index = {name: i for i, name in enumerate(classes)}
            labels = [index[name] for _, name in rows if name is not None]
        reading, in_parts = self.reading(in_chans), self.tile is not None
        source = FileSource(root, files, labels, classes, reading, in_parts=in_parts)
        if split == "train" and self.reads_overviews and not has_urls:
            source.check_overviews(seed)
        return source

    @staticmethod
    def _rows(key: str, path: Path) -> list[tuple[str, str | None]]:
        try:
            data = read_regular(path, MAX_LIST_BYTES)
            # Excel and PowerShell write UTF-16. File names in UTF-8 may hold any bytes.
            marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
            text = data.decode(marked) if marked else data.decode("utf-8-sig", "surrogateescape")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            kind = NotAtHand if isinstance(error, FileNotFoundError) else UserError
            raise kind(f"{key} {str(path)!r} cannot be read: {reason}") from error
        rows: list[tuple[str, str | None]] = []
        # Not splitlines(): it also splits at characters that file names may hold.
        for line in text.split("\n"):
            # Not strip() of everything: names may begin with what is a space in some script.
            if line.strip(" \t\r") and not line.startswith("#"):
                file, _, name = line.partition("\t")
                rows.append((file.strip(" \r"), name.strip() or None))
        if not rows:
            raise UserError(f"{key} {str(path)!r} names no image")
        if all("\0" in file for file, _ in rows):
            raise UserError(
                f"{key} {str(path)!r} is not text in UTF-8: its lines hold null bytes, as UTF-16 without a "
                f"byte order mark does; save it as UTF-8"
            )
        return rows


class FileSource:
    """A list of files below a folder, decoded on demand.

    Args:
        folder: what the names are relative to.
        files: relative paths, or URLs.
        labels: class index per file, or None.
        classes: class names, or None.
        reading: how they become pictures.
        notes: what else there is to say of them.
        in_parts: whether they are shown window by window; see `etpp_ssl.data.formats.open_file`.
    """

    def __init__(
        self,
        folder: Path,
        files: list[str],
        labels: list[int] | None,
        classes: list[str] | None,
        reading: Reading,
        notes: Sequence[str] = (),
        in_parts: bool = False,
    ) -> None:
        self.folder = folder
        self.files = files
        self.labels = labels
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
        return -1 if self.labels is None else self.labels[index]

    def all_labels(self) -> list[int]:
        """See `ImageSource.all_labels`."""
        return [-1] * len(self) if self.labels is None else list(self.labels)

    def name(self, index: int) -> str:
        """Relative path, as a log can show it."""
        return printable(self.files[index])

    def fingerprint(self) -> str:
        """Hash of names and labels; the folder may move, its content may not change."""
        digest = hashlib.blake2b(digest_size=12)
        for index, file in enumerate(self.files):
            digest.update(os.fsencode(file) + b"\0%d\n" % self.label(index))
        return digest.hexdigest()

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
        kinds = by_extension(Counter(map(extension_of, self.files)))
        count = len(self.classes or ())
        labels = f"{count:,} class{'' if count == 1 else 'es'}" if count else "no labels"
        notes, seen = list(self.notes), set(self.labels or ())
        without = [name for label, name in enumerate(self.classes or ()) if label not in seen]
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
) -> FileSource:
    """All images below one folder, in the order of their paths' bytes.

    Args:
        key: names the folder in the message.
        folder: where they lie.
        reading: how the files become pictures.
        labelled: whether the first folder level may name classes.
        least_classes: fewer folders are not classes.
        in_parts: see `FileSource`.

    Raises:
        UserError: if there is no image, or a folder cannot be read: a run must not take the rest for all.
    """
    extensions = extensions_of(reading.reader)
    try:
        found = find_images(folder, extensions)
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"{key}: folder {shown(os.fspath(where), 300)} cannot be read: {error.strerror}"
        ) from error
    files = sorted(found.files, key=os.fsencode)
    left_out = found.sentence()
    if not files:
        raise UserError(
            f"{key}: no image below {str(folder)!r} ({left_out or 'it is empty'}; looked for "
            f"{', '.join(sorted(extensions))})"
        )
    classes, labels = class_folders(files, least_classes) if labelled else (None, None)
    notes = [left_out] if left_out else []
    if classes is not None:
        empty = sorted(found.top_folders.difference(classes))
        if empty:
            notes.append(f"no image in the folders {listed(empty)}")
    elif labelled and len(found.top_folders) > 1:
        loose = next((printable(file) for file in files if "/" not in file), None)
        if loose is not None:
            notes.append(f"no labels, as {loose!r} lies beside the folders")
    return FileSource(folder, files, labels, classes, reading, notes, in_parts)
