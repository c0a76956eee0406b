"""Images named by a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from etpp_ssl.config import UserError, may_change
from etpp_ssl.data.sources.base import DataConfig, existing_folder
from etpp_ssl.data.sources.folder import FileSource, expanded
from etpp_ssl.files import read_text

MAX_BYTES = 1 << 34
"""Of a list: about two hundred million names."""


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
            text = read_text(path, MAX_BYTES, errors="surrogateescape")
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
