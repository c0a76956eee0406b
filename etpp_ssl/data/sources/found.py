"""What lies below a folder: images, files that are not read, and folders that are not looked into."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from etpp_ssl.data.formats import EXTENSIONS, FOLDER_EXTENSIONS
from etpp_ssl.data.sources.base import printable

HIDDEN = frozenset(
    (
        "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx",
        "$recycle.bin", "system volume information", "lost+found",
    )
)  # fmt: skip
"""Folders of thumbnails, waste and metadata, in lower case, that network drives and archives put among one's
own; a name that begins with a dot is hidden anyway."""


def is_hidden_name(name: str) -> bool:
    """Whether a file or folder of this name is left out."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in HIDDEN


class Found(NamedTuple):
    """What lies below a folder."""

    files: list[str]
    """Relative paths of the images, in no order, with `/` on every system."""
    others: Counter[str]
    """Hidden images, and files that are no images and not hidden: by extension."""
    hidden: list[str]
    """Folders that were not looked into."""
    top_folders: set[str]
    """The first level's folders that were."""

    def sentence(self) -> str:
        """What was left out; empty for nothing."""
        parts = [by_extension(self.others)] if self.others.total() else []
        if self.hidden:
            more = f" and {len(self.hidden) - 3:,} more" if len(self.hidden) > 3 else ""
            parts.append(f"hidden folders {', '.join(repr(printable(f)) for f in self.hidden[:3])}{more}")
        return f"left out: {', '.join(parts)}" if parts else ""


def find_images(folder: Path, extensions: frozenset[str] = EXTENSIONS) -> Found:
    """All images below a folder; links are followed, loops are not. A folder can be one image (.zarr).

    Args:
        folder: where to look.
        extensions: of names that count as images, in lower case.

    Raises:
        OSError: if a folder below it cannot be read.
    """
    found = Found([], Counter(), [], set())
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
        folders: list[str] = []
        with os.scandir(where) as entries:
            for entry in entries:
                name = f"{current}/{entry.name}" if current else entry.name
                is_hidden = is_hidden_name(entry.name)
                extension = extension_of(name)
                if _leads_to_folder(entry) and extension not in FOLDER_EXTENSIONS:
                    (found.hidden if is_hidden else folders).append(name)
                elif extension not in extensions:
                    found.others[extension] += not is_hidden
                elif is_hidden:
                    found.others[f"hidden {extension}"] += 1
                else:
                    found.files.append(name)
        if not current:
            found.top_folders.update(folders)
        # The order of visits decides which path of a linked folder counts.
        waiting += sorted(folders, reverse=True)
    found.hidden.sort()
    return found


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself, for instance; as a file it will be said why.
        return False


def class_folders(files: list[str], least: int = 2) -> tuple[list[str] | None, list[int] | None]:
    """(class names, label per file) from the first folder level, or (None, None) if it names none.

    Args:
        files: relative paths with `/` between folders.
        least: fewer folders are not classes.
    """
    tops = [file.split("/", 1)[0] if "/" in file else None for file in files]
    classes = sorted({top for top in tops if top is not None})
    if None in tops or len(classes) < least:
        return None, None
    index = {name: i for i, name in enumerate(classes)}
    return classes, [index[top] for top in tops if top is not None]


def by_extension(counts: Counter[str]) -> str:
    """Numbers of files by extension, as `30 .heic, 5 .png`: the most frequent five, and how many others.

    Args:
        counts: by extension, in lower case with its dot; empty for files without one.
    """
    first = sorted((+counts).items(), key=lambda item: (-item[1], item[0]))[:5]
    parts = [f"{number:,} {extension or 'without extension'}" for extension, number in first]
    others = counts.total() - sum(number for _, number in first)
    return ", ".join([*parts, *([f"{others:,} others"] if others else [])])


def extension_of(name: str) -> str:
    """`.jpg` of `a/b.JPG`, `.nii.gz` of `c.nii.gz`; empty where there is none."""
    stem, extension = os.path.splitext(name.lower())
    return f".nii{extension}" if extension == ".gz" and stem.endswith(".nii") else extension
