"""Images in files: all below a folder, with class sub-folders or without, or those that a text file lists."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from etpp_ssl.config import UserError, may_change
from etpp_ssl.data.formats.base import MAX_PIXELS, Picture, UnreadableImage
from etpp_ssl.data.formats.open import EXTENSIONS, most_bytes, open_picture
from etpp_ssl.data.sources.base import DataConfig, existing_folder, expanded, printable
from etpp_ssl.files import read_regular, read_text
from etpp_ssl.messages import shown

MAX_LIST_BYTES = 1 << 34
"""Of a list: about two hundred million names."""
EVAL_SYNONYMS = ("val", "validation", "valid", "eval", "test")


class FolderConfig(DataConfig):
    """Images below a folder.

    `root` may hold a sub-folder per split (`train`, `val`, ...), as timm expects, or be the training
    folder itself; evaluation then looks beside a folder that is called like the training split.
    """

    name: Literal["folder"] = "folder"
    root: str = may_change(...)
    """The folder; `~` and environment variables are expanded."""
    split: str = "train"
    """Sub-folder of the training images, where `root` has one."""
    eval_split: str | None = None
    """Sub-folder of the evaluation images; by default the first of val, validation, valid, eval, test."""
    labels: Literal["folders", "none"] = "folders"
    """`folders`: the first folder level names the class, if every image lies in one and there are at
    least two. `none`: no labels."""

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> FileSource:
        """Open the "train" or the "eval" split; see `DataConfig.open`."""
        folder = split_folder(split, self.root, self.split, self.eval_split)
        return open_folder(
            "data.root", folder, in_chans, labelled=self.labels == "folders", max_pixels=self.max_pixels
        )


class FileListConfig(DataConfig):
    """One image per line: a path, then optionally a tab and a class name.

    Paths are relative to `root`; empty lines and lines that start with # are skipped. Either all
    lines name a class or none does.
    """

    name: Literal["list"] = "list"
    file: str = may_change(...)
    """The list of training images; `~` and environment variables are expanded."""
    eval_file: str | None = may_change(None)
    """The list of evaluation images; its class names must be among the training list's."""
    root: str | None = may_change(None)
    """Folder that the paths are relative to; by default the folder of the list."""

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> FileSource:
        """Open the "train" or the "eval" list; see `DataConfig.open`."""
        rows = self._rows("data.file", expanded(self.file))
        train_names = {name for _, name in rows if name is not None}
        classes = sorted(train_names) or None
        path, key = expanded(self.file), "data.file"
        if split == "eval":
            if self.eval_file is None:
                raise UserError(
                    "data.eval_file is not given: evaluation needs it, or data.holdout=256 to keep "
                    "some training images for it"
                )
            path, key = expanded(self.eval_file), "data.eval_file"
            rows = self._rows(key, path)
            unknown = sorted({name for _, name in rows if name is not None} - train_names)
            if unknown:
                raise UserError(f"{key}: class {unknown[0]!r} is not in data.file")
        root = existing_folder("data.root", expanded(self.root)) if self.root else path.parent
        labels = None
        if classes is not None:
            if any(name is None for _, name in rows):
                raise UserError(f"{key} {str(path)!r} names a class on some lines but not on all")
            index = {name: i for i, name in enumerate(classes)}
            labels = [index[name] for _, name in rows if name is not None]
        return FileSource(root, [file for file, _ in rows], labels, classes, in_chans, self.max_pixels)

    @staticmethod
    def _rows(key: str, path: Path) -> list[tuple[str, str | None]]:
        try:
            text = read_text(path, MAX_LIST_BYTES, errors="surrogateescape")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{key} {str(path)!r} cannot be read: {reason}") from error
        rows: list[tuple[str, str | None]] = []
        # Not splitlines(): it also splits at characters that file names may hold.
        for line in text.split("\n"):
            # Not strip() of everything: names may begin with what is a space in some script.
            if line.strip(" \t\r") and not line.startswith("#"):
                file, _, name = line.partition("\t")
                rows.append((file.strip(" \r"), name.strip() or None))
        if not rows:
            raise UserError(f"{key} {str(path)!r} names no image")
        return rows


class FileSource:
    """A list of files below a folder, decoded on demand.

    Args:
        folder: what the names are relative to.
        files: relative paths.
        labels: class index per file, or None.
        classes: class names, or None.
        in_chans: channels to decode to.
        max_pixels: larger images count as unreadable.
    """

    def __init__(
        self,
        folder: Path,
        files: list[str],
        labels: list[int] | None,
        classes: list[str] | None,
        in_chans: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.folder = folder
        self.files = files
        self.labels = labels
        self.classes = None if classes is None else [printable(name) for name in classes]
        self.in_chans = in_chans
        self.max_pixels = max_pixels
        self.max_bytes = most_bytes(max_pixels, in_chans)

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Picture:
        """Read a file; see `ImageSource.open`."""
        return open_picture(self.read(index), self.in_chans, self.max_pixels)

    def read(self, index: int) -> bytes:
        """A file's bytes, as they are stored.

        Raises:
            UnreadableImage: if the file cannot be read, is none (a named pipe, a device), or is larger
                than any image of so many pixels.
        """
        try:
            return read_regular(self.folder / self.files[index], self.max_bytes)
        except (OSError, ValueError) as error:
            # ValueError: a line of a list can hold a null byte.
            raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error

    def stored_size(self, index: int) -> int:
        """Bytes of a file, 0 where it cannot be read."""
        try:
            return os.stat(self.folder / self.files[index]).st_size
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


def split_folder(split: str, root: str, train_name: str, eval_name: str | None) -> Path:
    """The folder of the "train" or the "eval" split.

    Args:
        split: "train" or "eval".
        root, train_name, eval_name: a recipe's `data.root`, `data.split` and `data.eval_split`; see
            `FolderConfig`.

    Raises:
        UserError: if there is no such folder.
    """
    top = existing_folder("data.root", expanded(root))
    train = top / train_name if os.path.isdir(top / train_name) else top
    if split == "train":
        return train
    around = top if train != top else top.parent if top.name == train_name else None
    names = (eval_name,) if eval_name else EVAL_SYNONYMS
    for name in names if around else ():
        assert around is not None
        if os.path.isdir(around / name):
            return around / name
    raise UserError(
        f"data.eval_split: no evaluation images ({', '.join(names)}) beside the training images "
        f"of data.root {root!r}; data.holdout=256 keeps some of those for evaluation"
    )


def open_folder(
    key: str, folder: Path, in_chans: int, *, labelled: bool = True, max_pixels: int = MAX_PIXELS
) -> FileSource:
    """All images below one folder, in the order of their paths' bytes.

    Args:
        key: names the folder in the message.
        folder: where they lie.
        in_chans: channels to decode to.
        labelled: whether the first folder level may name classes.
        max_pixels: larger images count as unreadable.

    Raises:
        UserError: if there is no image, or a folder cannot be read: a run must not take the rest for all.
    """
    try:
        files = sorted(image_files(folder), key=os.fsencode)
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"{key}: folder {shown(os.fspath(where), 300)} cannot be read: {error.strerror}"
        ) from error
    if not files:
        raise UserError(f"{key}: no image below {str(folder)!r} (looked for {', '.join(sorted(EXTENSIONS))})")
    classes, labels = class_folders(files) if labelled else (None, None)
    return FileSource(folder, files, labels, classes, in_chans, max_pixels)


def image_files(folder: Path) -> Iterator[str]:
    """Relative paths of all images below a folder; links are followed, loops are not.

    Raises:
        OSError: if a folder below it cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    # Not os.walk: it calls itself for each level, and passes over what it cannot read.
    waiting = [""]
    while waiting:
        current = waiting.pop()
        where = os.path.join(folder, current)
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _leads_to_folder(entry):
                    folders.append(os.path.join(current, entry.name))
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    yield os.path.join(current, entry.name)
        # The order of visits decides which path of a linked folder counts.
        waiting += sorted(folders, reverse=True)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself, for instance; as a file it will be said why.
        return False


def class_folders(files: list[str]) -> tuple[list[str] | None, list[int] | None]:
    """(class names, label per file) from the first folder level, or (None, None) if it names none."""
    tops = [file.split(os.sep, 1)[0] if os.sep in file else None for file in files]
    if None in tops or len(set(tops)) < 2:
        return None, None
    classes = sorted({top for top in tops if top is not None})
    index = {name: i for i, name in enumerate(classes)}
    return classes, [index[top] for top in tops if top is not None]
