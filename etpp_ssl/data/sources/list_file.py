"""Reads a list of files: a path or URL a line, then optionally a tab and a class name."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from etpp_ssl.config import NotAtHand, UserError
from etpp_ssl.data.sources.kept_index import KEPT_FROM, UNSURE_NS, Advance, kept
from etpp_ssl.data.sources.names import Facts, Names, NamesWriter, Opened
from etpp_ssl.files import open_regular

MAX_LIST_BYTES = 1 << 34
"""Of a list: about two hundred million names."""
KEPT_BYTES = 32 * KEPT_FROM
"""Of a list: about `KEPT_FROM` names."""
BLOCK = 1 << 22
"""Bytes of a list that are Python objects at a time."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""
_SCHEME = re.compile(rb"([a-z][a-z0-9+.:-]+)://", re.IGNORECASE)


def read_list(
    key: str,
    path: Path,
    *,
    index: str | None = None,
    url: str | None = None,
    classes: list[str] | None = None,
) -> Names:
    """The names and labels of a list, in its order.

    Args:
        key: of the recipe, which names the list.
        path: of the list.
        index: `data.index`, for the list whose index that is.
        url: what names that are no URLs themselves are relative to.
        classes: what labels number; None numbers the list's own class names, sorted.

    Raises:
        UserError: if it cannot be read, has no name, or names a class on some lines only or one that is not
            among `classes`.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(key, path, error) from error
    digest = None
    if classes is not None:
        digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=8).hexdigest()
    what = {"list": True, "path": os.path.abspath(path), "url": url, "classes": digest}
    stamp = [status.st_size, status.st_mtime_ns]

    def holds(found: Opened) -> bool:
        return bool(found.state["stamp"] == stamp and found.state["since"] - UNSURE_NS > stamp[1])

    def build(begin: Callable[[], IO[bytes] | None], state: dict[str, Any], advance: Advance) -> Names:
        file = begin() if status.st_size >= KEPT_BYTES or index is not None else None
        try:
            return _read(key, path, NamesWriter(file), url, classes, {**state, "stamp": stamp}, advance)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise _unreadable(key, path, error) from error

    if not stat.S_ISREG(status.st_mode) or (status.st_size < KEPT_BYTES and index is None):
        return build(lambda: None, {}, lambda count: None)
    return kept(what, index, holds, build)


def _read(
    key: str,
    path: Path,
    writer: NamesWriter,
    url: str | None,
    classes: list[str] | None,
    state: dict[str, Any],
    advance: Advance,
) -> Names:
    numbers: dict[bytes, int] = {}
    found: dict[str, int] = {}
    labels: list[np.ndarray] = []
    schemes: set[bytes] = set()
    count = num_without = num_null = 0
    prefix = None if url is None else os.fsencode(url.rstrip("/")) + b"/"
    for block in _blocks(path):
        columns = None if prefix is not None else _columns(block)
        if columns is not None:
            text, sizes, named = columns
            writer.add_text(text, sizes)
            count += len(sizes)
        else:
            names, named = _rows(block)
            if prefix is not None:
                names = [name if _SCHEME.match(name) else prefix + name for name in names]
            schemes.update(match[1] for match in map(_SCHEME.match, names) if match)
            num_null += sum(b"\0" in name for name in names)
            writer.add(names)
            count += len(names)
        for text in {*named}.difference(numbers):
            # As text: what is a space in some script is none of the class.
            name = text.decode("utf-8", "surrogateescape").strip()
            numbers[text] = found.setdefault(name, len(found))
        labels.append(np.fromiter(map(numbers.__getitem__, named), np.int32, len(named)))
        advance(count)
    if not count:
        raise UserError(f"{key} {str(path)!r} names no image")
    if num_null == count:
        raise UserError(
            f"{key} {str(path)!r} is not text in UTF-8: its lines hold null bytes, as UTF-16 without a "
            f"byte order mark does; save it as UTF-8"
        )
    whole = np.concatenate(labels)
    labels.clear()
    if "" in found:
        num_without = int((whole == found[""]).sum())
    facts = Facts(schemes=sorted(scheme.decode() for scheme in schemes))
    numbered = None
    if num_without < count or classes:
        unknown = sorted({*found}.difference(found if classes is None else classes, [""]))
        if unknown:
            raise UserError(f"{key}: class {unknown[0]!r} is not in data.file")
        if num_without:
            raise UserError(f"{key} {str(path)!r} names a class on some lines but not on all")
        facts.classes = sorted(found) if classes is None else classes
        order = {name: number for number, name in enumerate(facts.classes)}
        numbered = np.array([order[name] for name in found], np.int32)[whole]
    return writer.finish(numbered, facts, state)


def _columns(block: bytes) -> tuple[bytes, np.ndarray, list[bytes]] | None:
    """Of whole lines that have nothing to strip, to skip or to look into: names, their sizes, and classes."""
    odd = (b" ", b"\r", b"#", b"\0", b"://", b"\n\n")
    if not block or block.startswith(b"\n") or any(part in block for part in odd):
        return None
    letters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero((letters == 9) | (letters == 10))
    if (letters[ends] == 10).all():
        names = letters[letters != 10]
        sizes = np.diff(ends, prepend=-1, append=len(letters)) - 1
        return names.tobytes(), sizes, [b""] * len(sizes)
    if len(ends) % 2 == 0 or (letters[ends[::2]] != 9).any() or (letters[ends[1::2]] != 10).any():
        return None
    # Widths of the names, and of the classes with the marks on both sides.
    edges = np.concatenate([[0], ends, [len(letters)]])
    edges[2:-1:2] += 1
    widths = np.diff(edges)
    is_name = np.repeat(np.tile([True, False], len(widths) // 2), widths)
    named = letters[~is_name].tobytes()[1:].split(b"\n\t")
    return letters[is_name].tobytes(), widths[::2], named


def _rows(block: bytes) -> tuple[list[bytes], list[bytes]]:
    """The names of whole lines, and what stands behind their first tab."""
    lines = block.split(b"\n")
    rows = [line.partition(b"\t") for line in lines if line.strip(b" \t\r") and not line.startswith(b"#")]
    return [row[0].strip(b" \r") for row in rows], [row[2] for row in rows]


def _blocks(path: Path) -> Iterator[bytes]:
    """A list in UTF-8, some whole lines at a time without the last one's end."""
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if os.fstat(descriptor).st_size > MAX_LIST_BYTES:
            raise ValueError(f"it has more than {MAX_LIST_BYTES:,} bytes")
        block = file.read(BLOCK)
        # Excel and PowerShell write UTF-16. File names in UTF-8 may hold any bytes.
        marked = next((name for mark, name in _MARKS if block.startswith(mark)), None)
        if marked is not None:
            yield (block + file.read()).decode(marked).encode("utf-8", "surrogateescape")
            return
        block, rest = block.removeprefix(codecs.BOM_UTF8), b""
        # Lines end at b"\n" alone: splitlines() knows other ends, which file names may hold.
        while block:
            whole, end, last = block.rpartition(b"\n")
            if end:
                yield rest + whole
                rest = last
            else:
                rest += block
            block = file.read(BLOCK)
        yield rest


def _unreadable(key: str, path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    kind = NotAtHand if isinstance(error, FileNotFoundError) else UserError
    return kind(f"{key} {str(path)!r} cannot be read: {reason}")
