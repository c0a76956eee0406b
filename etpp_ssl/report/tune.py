"""The page of `etpp tune`: what was tried, decision by decision, and what was taken."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from etpp_ssl.files import replaced_file
from etpp_ssl.report.markup import Table, render

NAME = "tune.html"


class Choice(NamedTuple):
    """One decision as the page shows it."""

    title: str
    why: str
    table: Table
    """A row for each setting that was tried."""


def write_tune_page(file: Path, *, title: str, notes: Sequence[str], choices: Sequence[Choice]) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        file: to write.
        title: of the page.
        notes: sentences about the result.
        choices: in the order in which they were made.

    Raises:
        UserError: if it cannot be written.
    """
    text = render(
        "tune.html.j2",
        title=title,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        notes=notes,
        decisions=choices,
    )
    with replaced_file(file) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
