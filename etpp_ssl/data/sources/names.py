"""Names and labels of many images as arrays, in memory or mapped from an index file.

Nothing per image is a Python object until it is asked for: at 14 million files, Python's strings and numbers
take 3 GB, and every data worker copies their pages as reference counts change.

    index file:  names | where each ends (uint32 or uint64) | labels (int8 to int32) | JSON | trailer

Legend: N images.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, overload
from weakref import finalize

import numpy as np

from etpp_ssl.data.sources.found import extension_of
from etpp_ssl.files import open_regular

CHUNK = 1 << 17
"""Names that are Python objects at a time while all are gone through."""
FORMAT = "etpp-names"
VERSION = 1
_TRAILER = struct.Struct("<QQ16s")
"""Where the JSON begins, its length, the mark."""
_MARK = b"etpp names 1\n\0\0\0"
_TAIL = 8
"""Bytes at the end of a name that tell its extension, if there is a dot in them behind the first."""


@dataclass
class Facts:
    """What is known of all names together."""

    fingerprint: str = ""
    """Hash of names and labels; see `FileSource.fingerprint`."""
    classes: list[str] | None = None
    """In the order of the labels."""
    extensions: dict[str, int] = field(default_factory=dict)
    """Names by extension."""
    notes: list[str] = field(default_factory=list)
    """What else there is to say of them."""
    schemes: list[str] = field(default_factory=list)
    """Of URLs among the names."""


class Names(Sequence[str]):
    """Names of N images with their labels.

    Args:
        text: the names' bytes, one behind the other.
        ends: unsigned (N,), where each ends in `text`.
        labels: signed (N,), class of each, -1 without; or None.
        facts: of all of them; None where they are to be found out.
        stored: the same in an index file, for one name at a time.
    """

    def __init__(
        self,
        text: bytes | mmap.mmap,
        ends: np.ndarray,
        labels: np.ndarray | None,
        facts: Facts | None = None,
        stored: _Stored | None = None,
    ) -> None:
        self.text = text
        self.ends = ends
        self.labels = labels
        self._stored = stored
        self._facts = facts

    @classmethod
    def of(cls, names: Iterable[str], labels: Sequence[int] | np.ndarray | None = None) -> Names:
        """Of Python's strings."""
        parts = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(b"".join(parts), _small_ends(ends), None if labels is None else small_labels(labels))

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, index: int) -> bytes:
        """A name as the file system has it, 0 <= index < N."""
        if self._stored is not None:
            return self._stored.name(index)
        return self.text[self.ends.item(index - 1) if index else 0 : self.ends.item(index)]

    def label(self, index: int) -> int:
        """A name's class, -1 without; 0 <= index < N."""
        if self.labels is None:
            return -1
        if self._stored is not None:
            return self._stored.label(index)
        label: int = self.labels.item(index)
        return label

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        return os.fsdecode(self.raw(number))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self is other or (
                np.array_equal(self.ends, other.ends) and all(map(_same, self.chunks(), other.chunks()))
            )
        return isinstance(other, list) and len(other) == len(self) and list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def chunks(self) -> Iterator[list[bytes]]:
        """All names as the file system has them, so many at a time that their objects take little."""
        for first in range(0, len(self), CHUNK):
            ends = self.ends[first : first + CHUNK].tolist()
            start = self.ends.item(first - 1) if first else 0
            text = self.text[start : ends[-1]]
            begins = [start, *ends[:-1]]
            yield [text[begin - start : end - start] for begin, end in zip(begins, ends, strict=True)]

    @property
    def facts(self) -> Facts:
        """What is known of all, found out once."""
        if self._facts is None:
            self._facts = Facts(extensions=dict(count_extensions(self.chunks())))
            self._facts.fingerprint = self.fingerprint()
        return self._facts

    def fingerprint(self) -> str:
        """Hash of every name and its label."""
        digest = hashlib.blake2b(digest_size=12)
        most = -1 if self.labels is None else int(self.labels.max(initial=-1))
        # What stands behind a name, by its label; that of -1 is the last.
        behind = np.array([b"\0%d\n" % label for label in [*range(most + 1), -1]])
        sizes_of, letters_of = np.char.str_len(behind), behind.view(np.uint8).reshape(len(behind), -1)
        inside = np.arange(letters_of.shape[1]) < sizes_of[:, None]
        for first in range(0, len(self), CHUNK):
            ends = self.ends[first : first + CHUNK].astype(np.int64)
            start = self.ends.item(first - 1) if first else 0
            label = np.full(len(ends), -1) if self.labels is None else self.labels[first : first + CHUNK]
            sizes = np.stack([np.diff(ends, prepend=start), sizes_of[label]], axis=1)
            is_name = np.repeat(np.tile([True, False], len(ends)), sizes.ravel())
            text = np.empty(len(is_name), np.uint8)
            text[is_name] = np.frombuffer(self.text[start : int(ends[-1])], np.uint8)
            text[~is_name] = letters_of[label][inside[label]]
            digest.update(text.data)
        return digest.hexdigest()

    def __reduce__(self) -> Any:
        # A worker that is started anew maps the file for itself; its pages are shared.
        if self._stored is not None:
            return _opened_again, (self._stored.path, self.facts.fingerprint)
        return Names, (self.text, self.ends, self.labels, self._facts)


class Unkept(Exception):
    """An index file cannot be written; the argument says why."""


class NamesWriter:
    """Writes an index file: the names as they come, then everything else.

    Args:
        file: open for writing and reading, empty; None keeps the names in memory.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self._parts: list[bytes] = []
        self._size = 0
        self._ends: list[np.ndarray] = []
        self._counts: Counter[str] = Counter()

    def add(self, names: list[bytes]) -> None:
        """Write the next names."""
        sizes = np.fromiter(map(len, names), np.int64, len(names))
        self._add(b"".join(names), sizes, count_extensions([names]))

    def add_text(self, text: bytes, sizes: np.ndarray) -> None:
        """Write the next names, which lie one behind the other."""
        ends = np.cumsum(sizes)
        self._add(text, sizes, _extensions_in(text, ends))

    def _add(self, text: bytes, sizes: np.ndarray, extensions: Counter[str]) -> None:
        ends = np.cumsum(sizes) + self._size
        self._ends.append(ends if self._size + len(text) >= 1 << 32 else ends.astype(np.uint32))
        self._size += len(text)
        self._counts += extensions
        if self._file is None:
            self._parts.append(text)
        else:
            self._put(text)

    def _put(self, data: Any) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise Unkept(f"{self._file.name!r}: {error.strerror or error}") from error

    def finish(
        self, labels: np.ndarray | None, facts: Facts, state: dict[str, Any], more: bytes = b""
    ) -> Names:
        """The names, with the file complete but for its flush.

        Args:
            labels: class of each, or None.
            facts: whose fingerprint and extensions are filled in.
            state: what the names were found in, for JSON; see `opened`.
            more: the same, what is not for JSON.
        """
        ends = _small_ends(np.concatenate(self._ends) if self._ends else np.empty(0, np.int64))
        self._ends.clear()
        labels = None if labels is None else small_labels(labels)
        if self._file is None:
            text: bytes | mmap.mmap = b"".join(self._parts)
        else:
            self._put(b"\0")  # An empty file cannot be mapped, and this flushes what is left.
            self._file.flush()
            text = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        names = Names(text, ends, labels, facts)
        facts.extensions = dict(self._counts)
        facts.fingerprint = names.fingerprint()
        if self._file is not None:
            self._write_rest(names, state, more)
        return names

    def _write_rest(self, names: Names, state: dict[str, Any], more: bytes) -> None:
        assert self._file is not None
        places = {}
        for what, part in (
            ("ends", names.ends),
            ("labels", names.labels),
            ("more", np.frombuffer(more, np.uint8)),
        ):
            if part is not None:
                self._put(b"\0" * (-self._file.tell() % 16))
                part = part.astype(part.dtype.newbyteorder("<"), copy=False)
                places[what] = [self._file.tell(), len(part), part.dtype.str]
                self._put(part.data)
        head = {"format": FORMAT, "version": VERSION, "state": state, "facts": asdict(names.facts), **places}
        encoded, place = json.dumps(head).encode(), self._file.tell()
        self._put(encoded + _TRAILER.pack(place, len(encoded), _MARK))


class Opened:
    """An index file, mapped.

    Args:
        file: to open.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no whole index of this version.
    """

    def __init__(self, file: Path) -> None:
        opened = open_regular(file)
        finalize(self, os.close, opened)
        size = os.fstat(opened).st_size
        if size < _TRAILER.size:
            raise ValueError("it is too short")
        mapped = mmap.mmap(opened, 0, access=mmap.ACCESS_READ)
        place, length, mark = _TRAILER.unpack(mapped[-_TRAILER.size :])
        if mark != _MARK or place + length + _TRAILER.size != size:
            raise ValueError("its end is not that of an index of names")
        head = json.loads(mapped[place : place + length])
        if head["format"] != FORMAT or head["version"] != VERSION:
            raise ValueError(f"it has format {head['format']!r} version {head['version']!r}")
        arrays = {
            what: np.frombuffer(mapped, np.dtype(kind), count, start)
            for what, (start, count, kind) in ((w, head[w]) for w in ("ends", "labels", "more") if w in head)
        }
        self.state: dict[str, Any] = head["state"]
        """What the names were found in."""
        self.more = arrays["more"]
        """uint8, the same."""
        stored = None
        if hasattr(os, "pread"):  # Windows lacks it.
            stored = _Stored(file, opened, _place(head, "ends"), _place(head, "labels"))
        self.names = Names(mapped, arrays["ends"], arrays.get("labels"), Facts(**head["facts"]), stored)


class _Stored:
    """Names and labels, read from an index file one by one.

    Pages of a map that one process alone has touched count as its own, and each touch brings 64 kB along: a
    data worker would seem to hold the whole file.
    """

    def __init__(self, path: Path, descriptor: int, ends: tuple[int, int], labels: tuple[int, int]) -> None:
        self.path = path
        self._file = os.dup(descriptor)
        finalize(self, os.close, self._file)
        (self._ends, self._end_bytes), (self._labels, self._label_bytes) = ends, labels

    def name(self, index: int) -> bytes:
        """A name's bytes."""
        size = self._end_bytes
        if index:
            both = os.pread(self._file, 2 * size, self._ends + (index - 1) * size)
            start = int.from_bytes(both[:size], "little")
        else:
            both, start = os.pread(self._file, size, self._ends), 0
        return os.pread(self._file, int.from_bytes(both[-size:], "little") - start, start)

    def label(self, index: int) -> int:
        """A name's class."""
        size = self._label_bytes
        return int.from_bytes(os.pread(self._file, size, self._labels + index * size), "little", signed=True)


def _place(head: dict[str, Any], what: str) -> tuple[int, int]:
    """Where an array begins, and the bytes of an entry."""
    start, _, kind = head.get(what, (0, 0, "u1"))
    return start, np.dtype(kind).itemsize


def count_extensions(chunks: Iterable[list[bytes]]) -> Counter[str]:
    """Numbers of names by extension; see `extension_of`."""
    counts: Counter[str] = Counter()
    for names in chunks:
        unclear = set()
        for tail, number in Counter([name[-_TAIL:] for name in names]).items():
            if tail.rfind(b".") > 0 and tail[-3:].lower() != b".gz":
                counts[extension_of(os.fsdecode(tail))] += number
            else:
                unclear.add(tail)
        if unclear:
            counts.update(extension_of(os.fsdecode(n)) for n in names if n[-_TAIL:] in unclear)
    return counts


def _extensions_in(text: bytes, ends: np.ndarray) -> Counter[str]:
    """The same of names that lie one behind the other. Most end as the first one does."""
    ending = text[: ends[0]][-_TAIL:]
    ending = ending[ending.rfind(b".") :]
    begins = np.concatenate([[0], ends[:-1]])
    likewise = np.zeros(len(ends), bool)
    if 1 < len(ending) < _TAIL and ending.startswith(b".") and ending.lower() != b".gz":
        letters = np.frombuffer(text, np.uint8)
        likewise = ends - begins > len(ending)
        # A name that is nothing but an ending, in any folder, has none.
        likewise &= letters[np.maximum(ends - len(ending) - 1, 0)] != ord("/")
        for place, letter in enumerate(ending, -len(ending)):
            likewise &= letters[np.maximum(ends + place, 0)] == letter
    others = [text[begins[i] : ends[i]] for i in np.flatnonzero(~likewise).tolist()]
    counts = count_extensions([others])
    if likewise.any():
        counts[ending.decode("utf-8", "surrogateescape").lower()] += int(likewise.sum())
    return counts


def label_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Images of each class, int64 (num_classes,), of labels in [0, num_classes)."""
    counts = np.zeros(num_classes, np.int64)
    for first in range(0, len(labels), CHUNK):  # bincount makes int64 of them.
        counts += np.bincount(labels[first : first + CHUNK], minlength=num_classes)
    return counts


def small_labels(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels from -1 on in the smallest signed type that holds them, (N,)."""
    values = np.asarray(labels)
    most = int(values.max(initial=0))
    return values.astype(next(t for t in (np.int8, np.int16, np.int32, np.int64) if most <= np.iinfo(t).max))


def _small_ends(ends: np.ndarray) -> np.ndarray:
    return ends.astype(np.uint64 if len(ends) and ends[-1] >= 1 << 32 else np.uint32, copy=False)


def _same(one: list[bytes], other: list[bytes]) -> bool:
    return one == other


def _opened_again(file: Path, fingerprint: str) -> Names:
    names = Opened(file).names
    if names.facts.fingerprint != fingerprint:
        raise ValueError(f"{str(file)!r} was replaced by the index of other names while a run used it")
    return names
