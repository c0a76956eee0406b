"""A run report: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from etpp_ssl.files import replaced_file
from etpp_ssl.report import markup, sections
from etpp_ssl.report.gallery import reconstructions
from etpp_ssl.report.history import History, read_histories


def write_report(
    run_dirs: Sequence[str | Path], out: str | Path | None = None, *, say: Callable[[str], None] = print
) -> Path:
    """Write a report about one run, or about several side by side.

    Args:
        run_dirs: run folders, finished or not.
        out: the file to write; by default `report/index.html` in the first run's folder.
        say: told of damaged checkpoints and of the steps that take time.

    Returns:
        The file.

    Raises:
        UserError: if a folder is no run, or the file cannot be written.
    """
    histories = read_histories(run_dirs, say)
    file = Path(out) if out is not None else Path(run_dirs[0]) / "report" / "index.html"
    text = page(histories, say)
    with replaced_file(file) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
    return file


def page(histories: Sequence[History], say: Callable[[str], None]) -> str:
    """The whole document."""
    names = ", ".join(history.name for history in histories)
    title = f"Report: {names}" if len(histories) <= 3 else f"Report on {len(histories)} runs"
    style = files("etpp_ssl.report").joinpath("page.css").read_text(encoding="utf-8")
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = {
        "Summary": sections.summary(histories),
        "Differences": sections.recipe_differences(histories),
        "Curves": sections.curves(histories),
        "Curriculum": sections.curriculum(histories),
        "Reconstructions": reconstructions(histories, say),
        "Probes": sections.probes(histories),
        "Environment": sections.environment(histories),
        "Recipe": sections.recipes(histories),
    }
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name, part in parts.items() if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{markup.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{markup.escape(title)}</h1>\n{markup.paragraph(f'Written {written}', 'soft')}"
        f"<nav>{links}</nav>\n{sections.legend(histories)}"
        f"<main>\n{''.join(parts.values())}</main>\n</body>\n</html>\n"
    )
