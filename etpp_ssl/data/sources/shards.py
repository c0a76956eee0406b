"""Images in uncompressed tars, addressed by index: few large files, for slow file systems."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any, Literal

from etpp_ssl.config import may_change
from etpp_ssl.data.formats.base import MAX_PIXELS, UnreadableImage
from etpp_ssl.data.sources.base import DataConfig, by_extension
from etpp_ssl.data.sources.folder import FileSource, split_folder
from etpp_ssl.data.sources.shard_index import ShardIndex, open_index
from etpp_ssl.files import open_regular

MAX_OPEN = 128
"""Tars that one process keeps open; half of the smallest usual limit (macOS)."""


class ShardsConfig(DataConfig):
    """Tars that `etpp prepare` has written, or anyone's uncompressed WebDataset tars.

    Image number i of the shards is image number i of the folder they were made of, so order, resume
    and (where the bytes were copied) results are those of the folder.

    Tars without our `index.json` are scanned once when a run starts, which reads every header.
    """

    name: Literal["shards"] = "shards"
    root: str = may_change(...)
    """The folder; `~` and environment variables are expanded."""
    split: str = "train"
    """Sub-folder of the training tars, where `root` has one."""
    eval_split: str | None = None
    """Sub-folder of the evaluation tars; by default the first of val, validation, valid, eval, test."""

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> ShardSource:
        """Open the "train" or the "eval" split; see `DataConfig.open`."""
        folder = split_folder(split, self.root, self.split, self.eval_split)
        return ShardSource(folder, open_index("data.root", folder), in_chans, self.max_pixels)


class ShardSource(FileSource):
    """Images at known places of tars, each read in one piece.

    Args:
        folder: holds the tars.
        index: what lies where.
        in_chans: channels to decode to.
        max_pixels: larger images count as unreadable.
    """

    def __init__(self, folder: Path, index: ShardIndex, in_chans: int, max_pixels: int = MAX_PIXELS) -> None:
        labels = index.rows.labels if index.classes is not None else None
        notes = [f"left out: {by_extension(index.left_out)}"] if index.left_out else []
        if index.bad:
            name, reason = index.bad[0]
            notes.append(f"{len(index.bad):,} were unreadable when they were written, as {name!r}: {reason}")
        super().__init__(folder, index.rows.names, labels, index.classes, in_chans, max_pixels, notes)
        self.shards = list(index.files)
        self.rows = index.rows
        self._open: dict[int, _Tar] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A file descriptor means nothing to a spawned worker. A forked one may share it: positioned
        # reads leave no trace in it.
        return {**self.__dict__, "_open": {}}

    def read(self, index: int) -> bytes:
        """An image's bytes, as they are stored.

        Raises:
            UnreadableImage: if the tar cannot be read or ends early, or the image is larger than any of
                so many pixels.
        """
        rows = self.rows
        if rows.sizes[index] > self.max_bytes:
            raise UnreadableImage(f"its {rows.sizes[index]:,} bytes are more than {self.max_bytes:,}")
        try:
            return self._tar(rows.shards[index]).read(rows.offsets[index], rows.sizes[index])
        except (OSError, ValueError, OverflowError) as error:
            raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error

    def stored_size(self, index: int) -> int:
        """Bytes of an image."""
        return self.rows.sizes[index]

    def fingerprint(self) -> str:
        """Hash of names, labels and sizes; the tars may move or be cut elsewhere."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=12)
        for size in self.rows.sizes:
            digest.update(b"%d\n" % size)
        return digest.hexdigest()

    def _tar(self, shard: int) -> _Tar:
        tar = self._open.pop(shard, None) or _Tar(self.folder / self.shards[shard])
        self._open[shard] = tar
        if len(self._open) > MAX_OPEN:
            # The one that was used longest ago; it closes when the last reader lets go of it.
            self._open.pop(next(iter(self._open)), None)
        return tar


class _Tar:
    """An open file that closes with its last reference."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            part = _read_at(self.descriptor, size, offset)
            if not part:
                raise OSError("the shard ends early")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


_TURN = threading.Lock()


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`os.pread`, which Windows lacks; processes share no descriptor there, so that threads take turns."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _TURN:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)
