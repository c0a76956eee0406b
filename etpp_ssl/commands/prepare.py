"""`etpp prepare`: copy images to shards under a progress bar, and print what became of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from etpp_ssl.data.prepare import from_options, prepare


def prepare_shards(source: Path, destination: Path, say: Callable[[str], None], **options: Any) -> None:
    """Copy images to shards.

    Args:
        source: a folder of images, or a list of files.
        destination: the folder to make.
        say: told of unreadable images.
        options: of `etpp_ssl.data.prepare.from_options`.

    Raises:
        UserError: as `etpp_ssl.data.prepare.prepare`.
    """
    config = from_options(**options)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("prepare", total=None)
        splits = prepare(
            source, destination, config, lambda done, total: bar.update(task, completed=done, total=total)
        )
    for split in splits:
        for name, reason in split.bad:
            say(f"etpp: {'left out' if config.skip_bad else 'kept as it is'}: {name!r}: {reason}")
        print(
            f"{split.folder}: {split.images:,} images in {split.shards} shards, {split.size / 1e6:,.1f} MB, "
            f"{len(split.bad)} bad"
        )
