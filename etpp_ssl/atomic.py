"""Folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `folder` at the end.

    Raises:
        UserError: if it cannot be written.
    """
    aside = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from error


def write_json(file: Path, values: dict[str, Any]) -> None:
    """An indented JSON file."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
