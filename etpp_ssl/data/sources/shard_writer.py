"""Writes one split as shards: in order, byte for byte repeatable, and able to go on after a stop.

Every finished `shard-000003.tar` has its rows of the index beside it, in `shard-000003.rows.json`. The
index joins them at the end, so a folder without `index.json` is not finished.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError
from etpp_ssl.data.recode import Stored
from etpp_ssl.data.sources.folder import FileSource
from etpp_ssl.data.sources.shard_index import INDEX_FILE, ShardIndex, ShardRows, write_json


class ShardWriter:
    """Writes the shards of one source.

    Args:
        folder: where to.
        source: gives names and labels.
        shard_bytes: a shard ends with the image that reaches this size.
        skip_bad: leave out images with a fault, instead of storing what there is of them.
    """

    def __init__(self, folder: Path, source: FileSource, shard_bytes: int, *, skip_bad: bool) -> None:
        self.folder = folder
        self.source = source
        self.shard_bytes = shard_bytes
        self.skip_bad = skip_bad
        self.index = ShardIndex({}, source.classes, ShardRows())
        self.next_image = 0
        """The first image that no finished shard holds or has left out."""

    def go_on(self) -> None:
        """Take up the shards that an earlier call has finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            tar = self._tar(len(self.index.files))
            rows = _rows_file(tar)
            if not (tar.exists() and rows.exists()):
                return
            self._add(tar, json.loads(rows.read_text(encoding="utf-8")))

    def write(self, images: Iterator[Stored], done: Callable[[], None]) -> None:
        """Write the images from `next_image` on, then the index.

        Args:
            images: theirs, in order.
            done: called after each.

        Raises:
            UserError: if all of them are left out.
        """
        while self.next_image < len(self.source):
            self._write_shard(images, done)
        if not self.index.rows.names:
            name, reason = self.index.bad[0]
            raise UserError(
                f"SRC: none of the {len(self.source)} images can be read, the first one {name!r}: {reason}"
            )
        self.index.save(self.folder)

    def _write_shard(self, images: Iterator[Stored], done: Callable[[], None]) -> None:
        number = len(self.index.files)
        target = self._tar(number)
        aside = target.with_name(target.name + ".tmp")
        rows, bad, image = ShardRows(), [], self.next_image
        # All names are ours and short: the plain format, whose headers are one block each, is enough.
        with aside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                while image < len(self.source) and tar.offset < self.shard_bytes:
                    stored = next(images)
                    name, label = self.source.files[image], self.source.label(image)
                    if stored.fault is not None:
                        bad.append((self.source.name(image), stored.fault))
                    if stored.fault is None or not self.skip_bad:
                        key = f"{image:09d}"
                        offset = _add_member(tar, key + stored.extension, stored.data)
                        rows.append(name, label, number, offset, len(stored.data))
                        if label >= 0:
                            _add_member(tar, key + ".cls", b"%d" % label)
                    image += 1
                    done()
            file.flush()
            os.fsync(file.fileno())
        content = {"end": image, "rows": asdict(rows), "bad": bad}
        write_json(_rows_file(target), content)
        aside.rename(target)
        self._add(target, content)

    def _add(self, tar: Path, content: dict[str, Any]) -> None:
        self.index.files[tar.name] = tar.stat().st_size
        self.index.rows.extend(ShardRows(**content["rows"]))
        self.index.bad += [(name, reason) for name, reason in content["bad"]]
        self.next_image = content["end"]

    def _tar(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.tar"


def finished(folder: Path) -> bool:
    """Whether a split has been written to its end."""
    return (folder / INDEX_FILE).exists()


def remove_traces(folder: Path) -> None:
    """Remove what only an unfinished split needs."""
    for pattern in ("shard-*.rows.json", "*.tmp"):
        for path in folder.glob(pattern):
            path.unlink()


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file whose header holds nothing of this machine; returns where its bytes start."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset


def _rows_file(tar: Path) -> Path:
    return tar.with_suffix(".rows.json")
