"""Images in uncompressed tars, addressed by index: few large files, for slow file systems."""

from __future__ import annotations

import hashlib
import os
import threading
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from etpp_ssl.data.formats import open_picture
from etpp_ssl.data.formats.base import Picture, Reading, UnreadableImage
from etpp_ssl.data.sources.folder import FileSource, SplitFoldersConfig
from etpp_ssl.data.sources.found import by_extension
from etpp_ssl.data.sources.shard_index import ShardIndex, open_index
from etpp_ssl.files import open_regular

MAX_OPEN = 128
"""Tars that one process keeps open; half of the smallest usual limit (macOS)."""


class ShardsConfig(SplitFoldersConfig):
    """Tars that `etpp prepare` has written, or anyone's uncompressed WebDataset tars.

    Image number i of the shards is image number i of the folder they were made of, so order, resume
    and (where the bytes were copied) results are those of the folder.

    Tars without our `index.json` are scanned once when a run starts, which reads every header.
    """

    name: Literal["shards"] = "shards"

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> ShardSource:
        """Open the "train" or the "eval" split; see `DataConfig.open`."""
        folder = self.folder(split)
        index = open_index("data.root", folder, least_classes=2 if split == "train" else 1)
        return ShardSource(folder, index, self.reading(in_chans))


class ShardSource(FileSource):
    """Images at known places of tars, each read in one piece.

    Args:
        folder: holds the tars.
        index: what lies where.
        reading: how they become pictures.
    """

    def __init__(self, folder: Path, index: ShardIndex, reading: Reading) -> None:
        labels = index.rows.labels if index.classes is not None else None
        notes = [f"left out: {by_extension(index.left_out)}"] if index.left_out else []
        if index.bad:
            name, reason = index.bad[0]
            notes.append(f"{len(index.bad):,} were unreadable when they were written, as {name!r}: {reason}")
        super().__init__(folder, index.rows.names, labels, index.classes, reading, notes)
        self.shards = list(index.files)
        rows = index.rows
        self.places = np.array([rows.shards, rows.offsets, rows.sizes], np.int64)
        """int64 (3, N): the tar of each image, where its bytes start there, and how many they are."""
        self._open: dict[int, _Tar] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A file descriptor means nothing to a spawned worker. A forked one may share it: positioned
        # reads leave no trace in it.
        return {**self.__dict__, "_open": {}}

    def open(self, index: int) -> Picture:
        """Read an image; see `ImageSource.open`."""
        return open_picture(self.read(index), self.reading)

    def read(self, index: int) -> bytes:
        """An image's bytes, as they are stored.

        Raises:
            UnreadableImage: if the tar cannot be read or ends early, or the image is larger than any of
                so many pixels.
        """
        shard, offset, left = self.places[:, index].tolist()
        if left > self.max_bytes:
            raise UnreadableImage(f"its {left:,} bytes are more than {self.max_bytes:,}")
        try:
            tar = self._tar(shard)
            parts = []
            while left > 0:
                parts.append(_read_at(tar, left, offset))
                if not parts[-1]:
                    raise UnreadableImage("the shard ends early")
                offset, left = offset + len(parts[-1]), left - len(parts[-1])
            return b"".join(parts)
        except (OSError, ValueError, OverflowError) as error:
            raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error

    def stored_size(self, index: int) -> int:
        """Bytes of an image."""
        return int(self.places[2, index])

    def fingerprint(self) -> str:
        """Hash of names, labels and sizes; the tars may move or be cut elsewhere."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=12)
        for size in self.places[2].tolist():
            digest.update(b"%d\n" % size)
        return digest.hexdigest()

    def _tar(self, shard: int) -> _Tar:
        tar = self._open.pop(shard, None) or _Tar(open_regular(self.folder / self.shards[shard]))
        self._open[shard] = tar
        if len(self._open) > MAX_OPEN:
            # The one that was used longest ago; it closes when the last reader lets go of it.
            self._open.pop(next(iter(self._open)), None)
        return tar


class _Tar(FileIO):
    """An open file that closes with its last reference, which is how it is meant to be closed."""

    def __del__(self) -> None:
        self.close()


_TURN = threading.Lock()


def _read_at(file: _Tar, size: int, offset: int) -> bytes:
    """At most `size` bytes, by `os.pread`.

    Windows lacks it. Processes share no descriptors there, so that threads take turns.
    """
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    with _TURN:
        file.seek(offset)
        return file.read(size)
