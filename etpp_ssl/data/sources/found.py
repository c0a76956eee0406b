"""What lies below a folder: images, files that are not read, and folders that are not looked into."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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


LAST_PARTS = {
    ending[ending.rfind(".") :] for ending in EXTENSIONS | FOLDER_EXTENSIONS if ending.count(".") > 1
}
"""Of extensions with two dots: what ends so may have one or the other."""
LISTINGS = 8
"""Folders that are listed at a time."""


class Found:
    """What lies below a folder.

    Of its files each folder keeps one string of bytes: Python's strings of all paths would take gigabytes.
    """

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()
        """Hidden images, and files that are no images and not hidden: by extension."""
        self.hidden: list[str] = []
        """Folders that were not looked into."""
        self.folders: dict[str, Listing] = {}
        """Those that were, by their relative path, with `/` on every system."""

    def runs(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """All images in the order of their paths' bytes: what the next paths begin with, and their ends."""
        waiting = [self._pieces("")]
        while waiting:
            piece = next(waiting[-1], None)
            if piece is None:
                waiting.pop()
            elif isinstance(piece, str):
                waiting.append(self._pieces(piece))
            else:
                yield piece

    def paths(self) -> list[str]:
        """All images in the order of their paths' bytes."""
        return [os.fsdecode(prefix + name) for prefix, names in self.runs() for name in names]

    def _pieces(self, folder: str) -> Iterator[tuple[bytes, list[bytes]] | str]:
        """A folder's images, with its folders where they come among them."""
        listing, prefix = self.folders[folder], os.fsencode(f"{folder}/" if folder else "")
        names = listing.files.split(b"\0") if listing.files else []
        # A file comes before the content of a folder whose name with its slash is greater.
        seen = self.folders.keys() & listing.folders
        inside = sorted((os.fsencode(below) + b"/", below) for below in seen)
        done = 0
        for path, below in inside:
            place = bisect_left(names, path[len(prefix) :])
            if done < place:
                yield prefix, names[done:place]
            done = place
            yield below
        if done < len(names):
            yield prefix, names[done:]

    def sentence(self) -> str:
        """What was left out; empty for nothing."""
        parts = [by_extension(self.others)] if self.others.total() else []
        if self.hidden:
            more = f" and {len(self.hidden) - 3:,} more" if len(self.hidden) > 3 else ""
            parts.append(f"hidden folders {', '.join(repr(printable(f)) for f in self.hidden[:3])}{more}")
        return f"left out: {', '.join(parts)}" if parts else ""


class Listing(NamedTuple):
    """What one folder holds."""

    identity: tuple[int, int]
    """Device and inode."""
    changed: int
    """When an entry was last added, removed or renamed, in ns, as of before it was listed."""
    files: bytes
    """Names of the images, sorted, with null bytes in between."""
    num_files: int
    folders: list[str]
    """Relative paths of the folders in it that are not hidden, sorted."""
    hidden: list[str]
    others: Counter[str]


def find_images(
    folder: Path,
    extensions: frozenset[str] = EXTENSIONS,
    advance: Callable[[int], None] = lambda count: None,
) -> Found:
    """All images below a folder; links are followed, loops are not. A folder can be one image (.zarr).

    Folders are listed by several threads: on a network drive each listing is a wait.

    Args:
        folder: where to look.
        extensions: of names that count as images, in lower case.
        advance: told how many have been found.

    Raises:
        OSError: if a folder below it cannot be read.
    """
    found, count = Found(), 0
    seen: set[tuple[int, int]] = set()
    look = partial(_list, folder, extensions)
    pool = ThreadPoolExecutor(LISTINGS)
    try:
        # Not os.walk: it calls itself for each level, and passes over what it cannot read.
        waiting: list[tuple[str, Callable[[], Listing]]] = [("", partial(look, ""))]
        while waiting:
            current, listed = waiting.pop()
            listing = listed()
            if listing.identity in seen:
                continue
            seen.add(listing.identity)
            found.folders[current] = listing
            found.others.update(listing.others)
            found.hidden += listing.hidden
            count += listing.num_files
            advance(count)
            # The order of visits decides which path of a linked folder counts.
            waiting += [(below, pool.submit(look, below).result) for below in listing.folders[::-1]]
    finally:
        pool.shutdown(cancel_futures=True)
    found.hidden.sort()
    return found


def _list(top: Path, extensions: frozenset[str], current: str) -> Listing:
    where = os.path.join(top, current)
    status = os.stat(where)
    files: list[bytes] = []
    folders: list[str] = []
    hidden: list[str] = []
    others: Counter[str] = Counter()
    known: dict[str, str] = {}
    with os.scandir(where) as entries:
        for entry in entries:
            name = entry.name
            is_hidden = is_hidden_name(name)
            ending = name[name.rfind(".") :]
            # Most files of a folder end alike.
            extension = known.get(ending)
            if extension is None or is_hidden:
                extension = extension_of(name)
                plain = ending.startswith(".") and ending != name and extension == ending.lower()
                if plain and extension not in LAST_PARTS:
                    known[ending] = extension
            if _leads_to_folder(entry) and extension not in FOLDER_EXTENSIONS:
                (hidden if is_hidden else folders).append(f"{current}/{name}" if current else name)
            elif extension not in extensions:
                others[extension] += not is_hidden
            elif is_hidden:
                others[f"hidden {extension}"] += 1
            else:
                files.append(os.fsencode(name))
    files.sort()
    identity = status.st_dev, status.st_ino
    text = b"\0".join(files)
    return Listing(identity, status.st_mtime_ns, text, len(files), sorted(folders), hidden, others)


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
    classes = named_by({*tops}, least)
    if classes is None:
        return None, None
    index = {name: i for i, name in enumerate(classes)}
    return classes, [index[top] for top in tops if top is not None]


def named_by(tops: set[str | None], least: int) -> list[str] | None:
    """Class names from the first level's folders that hold images, None for images beside them."""
    if None in tops or len(tops) < least:
        return None
    return sorted(top for top in tops if top is not None)


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
