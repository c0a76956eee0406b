"""The index of uncompressed tars: where each image lies in them. It is kept in a file beside the tars.

    shard-000000.tar ...   WebDataset tars: 000000012.jpg, 000000012.cls
    index.json             offsets, sizes, original names, labels, classes

File names are bytes and need not be UTF-8; JSON holds such bytes as escaped lone surrogates, as Python spells
them.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError
from etpp_ssl.data.formats import EXTENSIONS
from etpp_ssl.data.sources.base import existing_folder
from etpp_ssl.data.sources.found import by_extension, class_folders, extension_of, is_hidden_name
from etpp_ssl.files import read_text, require_regular, write_text

INDEX_FILE = "index.json"
FORMAT = "etpp-shards"
VERSION = 1
MAX_INDEX_BYTES = 1 << 34
"""About a hundred million images."""


@dataclass
class ShardRows:
    """One column per property, one row per image."""

    names: list[str] = field(default_factory=list)
    """What a person would look for: the original path, or the tar member's."""
    labels: list[int] = field(default_factory=list)
    """Class index, -1 without."""
    shards: list[int] = field(default_factory=list)
    """Which tar holds it."""
    offsets: list[int] = field(default_factory=list)
    """Where its bytes start in the tar."""
    sizes: list[int] = field(default_factory=list)
    """How many bytes it has."""

    def append(self, name: str, label: int, shard: int, offset: int, size: int) -> None:
        """Add an image."""
        row = (name, label, shard, offset, size)
        for column, value in zip(self.columns(), row, strict=True):
            column.append(value)

    def extend(self, other: ShardRows) -> None:
        """Add all images of another table."""
        for column, more in zip(self.columns(), other.columns(), strict=True):
            column.extend(more)

    def columns(self) -> tuple[list[Any], ...]:
        """In the order of the fields."""
        return self.names, self.labels, self.shards, self.offsets, self.sizes


@dataclass
class ShardIndex:
    """The table of contents of a folder of tars."""

    files: dict[str, int]
    """The tars in order, with their sizes in bytes."""
    classes: list[str] | None
    rows: ShardRows
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Images that could not be read or re-encoded when the tars were written: name and reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Members of others' tars that are neither image nor label, by extension; not kept in the file."""

    def save(self, folder: Path) -> None:
        """Write `index.json`, whole or not at all."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del content["left_out"]
        write_text(folder / INDEX_FILE, json.dumps(content, separators=(",", ":")))


def open_index(key: str, folder: Path, *, least_classes: int = 2) -> ShardIndex:
    """The index of a folder of tars: ours where there is one, otherwise a scan of all tar headers.

    Args:
        key: names the folder in the message.
        folder: holds the tars.
        least_classes: fewer folders in others' tars are not classes.

    Raises:
        UserError: if there is no tar, or the index and the tars do not belong together.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return scan_tars(key, folder, least_classes)
    try:
        content = json.loads(read_text(path, MAX_INDEX_BYTES))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise UserError(
                f"{key}: {str(path)!r} has format {content['format']!r} version {content['version']!r}; "
                f"this version of etpp reads {FORMAT!r} version {VERSION}: run `etpp prepare` again"
            )
        rows = ShardRows(**content["rows"])
        index = ShardIndex(content["files"], content["classes"], rows, [tuple(b) for b in content["bad"]])
        _check(index)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{key}: {str(path)!r} is not an index of shards ({type(error).__name__}: {error}): "
            f"run `etpp prepare` again"
        ) from error
    for name, size in index.files.items():
        fault = _fault(folder / name, size)
        if fault:
            raise UserError(
                f"{key}: shard {str(folder / name)!r} {fault}: copy it again or run `etpp prepare` again"
            )
    return index


def _check(index: ShardIndex) -> None:
    """Check that every row points into a tar of the folder.

    Raises:
        ValueError: if not.
    """
    rows = index.rows
    if not rows.names or len({len(column) for column in rows.columns()}) > 1:
        raise ValueError("its columns are empty or differ in length")
    if not all(type(name) is str for name in (*rows.names, *index.files, *(index.classes or ()))):
        raise ValueError("a name in it is not text")
    away = [name for name in index.files if os.path.basename(name) != name or "\0" in name or not name]
    if away:
        raise ValueError(f"shard {away[0]!r} is not a file name")
    if not all(type(size) is int for size in index.files.values()):
        raise ValueError("the size of a shard is not a whole number")
    tars = list(index.files.values())
    labels = range(-1, len(index.classes) if index.classes is not None else 0)
    for name, label, shard, offset, size in zip(*rows.columns(), strict=True):
        if not (type(label) is type(shard) is type(offset) is type(size) is int):
            raise ValueError(f"image {name!r} has values that are not whole numbers")
        if label not in labels or not 0 <= shard < len(tars):
            raise ValueError(f"image {name!r} has label {label} and shard {shard}, which do not exist")
        if offset < 0 or size < 0 or offset + size > tars[shard]:
            raise ValueError(f"image {name!r} lies outside of its shard")


def scan_tars(key: str, folder: Path, least_classes: int) -> ShardIndex:
    """Index someone else's tars by their headers; image data is passed over.

    Images come in the order of the tars' names and of the members. Labels are the numbers in the
    WebDataset members `KEY.cls`, otherwise the members' first folder level, as for files.

    Raises:
        UserError: if there is no tar or no image in them, a tar is damaged or compressed, or some
            images have a label and others none.
    """
    existing_folder(key, folder)
    paths = sorted(folder.glob("*.tar"), key=lambda path: os.fsencode(path.name))
    if not paths:
        raise UserError(
            f"{key}: no .tar in {str(folder)!r}: `etpp prepare IMAGES {folder}` writes shards of a folder"
        )
    rows, numbers, left_out = ShardRows(), [], Counter[str]()
    for shard, path in enumerate(paths):
        try:
            require_regular(path.stat())
            labels = _scan_tar(path, shard, rows, left_out)
        except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
            reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
            raise UserError(
                f"{key}: {str(path)!r} cannot be read as an uncompressed tar: {reason}"
            ) from error
        numbers += labels
    if not rows.names:
        found = by_extension(left_out) or "nothing"
        raise UserError(f"{key}: no image in the tars of {str(folder)!r}, which hold {found}")
    classes: list[str] | None
    known = [label for label in numbers if label is not None]
    if known and len(known) < len(numbers):
        name = rows.names[numbers.index(None)]
        raise UserError(f"{key}: image {name!r} in {str(folder)!r} has no .cls member, but others have one")
    if known:
        classes, rows.labels = [str(number) for number in range(max(known) + 1)], known
    else:
        classes, by_folder = class_folders(rows.names, least_classes)
        rows.labels = by_folder or [-1] * len(rows.names)
    sizes = {path.name: path.stat().st_size for path in paths}
    return ShardIndex(sizes, classes, rows, left_out=left_out)


def _scan_tar(path: Path, shard: int, rows: ShardRows, left_out: Counter[str]) -> list[int | None]:
    """Add a tar's images to `rows` and what else it has to `left_out`; returns each one's .cls number."""
    keys: list[str] = []
    labels: dict[str, int] = {}
    # Mode "r:" takes no compressed tar: nothing in one can be addressed.
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            extension, parts = extension_of(member.name), member.name.split("/")
            is_hidden = any(is_hidden_name(part) for part in parts[:-1]) or parts[-1].startswith(".")
            if extension in EXTENSIONS and not is_hidden:
                rows.append(member.name, -1, shard, member.offset_data, member.size)
                keys.append(_key(member.name))
            elif extension == ".cls":
                file = tar.extractfile(member)
                assert file is not None
                label = int(file.read(32))
                if label < 0:
                    raise ValueError(f"{member.name!r} holds {label}, and labels start at 0")
                labels[_key(member.name)] = label
            else:
                left_out[f"hidden {extension}" if is_hidden else extension] += 1
    if labels and len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise ValueError(f"sample {twice!r} has two images")
    return [labels.get(key) for key in keys]


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _fault(path: Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"is in the index but cannot be read ({error.strerror})"
    return None if found == size else f"has {found:,} bytes, but the index says {size:,}"
