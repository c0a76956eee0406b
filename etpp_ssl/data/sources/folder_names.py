"""The names of all images below a folder, and the classes that its first level names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from etpp_ssl.config import listed
from etpp_ssl.data.sources.base import printable
from etpp_ssl.data.sources.found import Found, find_images, named_by
from etpp_ssl.data.sources.kept_index import KEPT_FROM, UNSURE_NS, Advance, kept
from etpp_ssl.data.sources.names import CHUNK, Facts, Names, NamesWriter, Opened


def folder_names(
    folder: Path, extensions: frozenset[str], *, least_classes: int | None, index: str | None
) -> Names:
    """The images below a folder in the order of their paths' bytes.

    Args:
        folder: where they lie.
        extensions: of names that count as images.
        least_classes: fewer folders are not classes; None takes no folders for classes.
        index: `data.index`.

    Raises:
        OSError: if a folder cannot be read.
    """
    what = {
        "list": False,
        "path": os.path.abspath(folder),
        "extensions": sorted(extensions),
        "least_classes": least_classes,
    }

    def build(begin: Callable[[], IO[bytes] | None], state: dict[str, Any], advance: Advance) -> Names:
        file: IO[bytes] | None = None

        def count(number: int) -> None:
            nonlocal file
            advance(number)
            if number >= KEPT_FROM:
                file = begin()

        found = find_images(folder, extensions, count)
        file = begin() if index is not None else file
        writer = NamesWriter(file)
        tops = _write(found, writer)
        facts = Facts(notes=[left_out] if (left_out := found.sentence()) else [])
        labels = None
        if least_classes is not None:
            labels = _classes(found, tops, least_classes, facts)
        times = np.array([listing.changed for listing in found.folders.values()], "<i8")
        folders = b"\0".join(map(os.fsencode, found.folders))
        return writer.finish(labels, facts, {**state, "folders": len(times)}, times.tobytes() + folders)

    return kept(what, index, lambda found: _stands(folder, found), build)


def _write(found: Found, writer: NamesWriter) -> list[tuple[bytes | None, int]]:
    """Write all names; (their first level's folder or None, how many come one after another) of each run."""
    tops: list[tuple[bytes | None, int]] = []
    names: list[bytes] = []
    for prefix, ends in found.runs():
        names += [prefix + end for end in ends]
        tops.append((prefix.partition(b"/")[0] if prefix else None, len(ends)))
        if len(names) > CHUNK:
            writer.add(names)
            names = []
    writer.add(names)
    return tops


def _classes(
    found: Found, tops: list[tuple[bytes | None, int]], least: int, facts: Facts
) -> np.ndarray | None:
    """Label of each image, or None; `facts` get the classes, and what is to be said of them."""
    named = {top: None if top is None else os.fsdecode(top) for top, _ in tops}
    facts.classes = named_by({*named.values()}, least)
    top_folders = found.folders[""].folders
    if facts.classes is not None:
        empty = sorted({*top_folders}.difference(facts.classes))
        if empty:
            facts.notes.append(f"no image in the folders {listed(empty)}")
        order = {name: number for number, name in enumerate(facts.classes)}
        labels = [order[str(named[top])] for top, _ in tops]
        return np.repeat(np.array(labels, np.int32), [count for _, count in tops])
    if len(top_folders) > 1 and None in named:
        loose = min(name for name in found.folders[""].files.split(b"\0"))
        facts.notes.append(f"no labels, as {printable(os.fsdecode(loose))!r} lies beside the folders")
    return None


def _stands(folder: Path, found: Opened) -> bool:
    """Whether all folders are as they were when the names were read."""
    count = found.state["folders"]
    content = found.more.tobytes()
    times = np.frombuffer(content, "<i8", count).tolist()
    if max(times) > found.state["since"] - UNSURE_NS:
        return False
    paths = content[8 * count :].split(b"\0")
    try:
        return all(
            os.stat(os.path.join(os.fsencode(folder), path)).st_mtime_ns == time
            for path, time in zip(paths, times, strict=True)
        )
    except OSError:
        return False
