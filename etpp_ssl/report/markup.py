"""The few pieces of HTML that the report is put together from; all text is escaped here."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

SMALL = 128
"""Images with fewer pixels than this along each side are enlarged pixel by pixel, not smoothly."""


def escape(text: object) -> str:
    """Text between tags or in a quoted attribute."""
    return html.escape(str(text), quote=True)


def paragraph(text: str, kind: str = "") -> str:
    """A <p> of plain text, of a class if one is given."""
    return f"<p{_kind(kind)}>{escape(text)}</p>"


def section(key: str, title: str, *parts: str) -> str:
    """A <section> with a heading that can be linked to."""
    return f'<section id="{escape(key)}"><h2>{escape(title)}</h2>\n{"".join(parts)}</section>\n'


def table(head: Sequence[object], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for first, *cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table{_kind(kind)}>'
        f"<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def details(summary: str, *parts: str) -> str:
    """A part that is folded away."""
    return f"<details><summary>{escape(summary)}</summary>\n{''.join(parts)}</details>\n"


def figure(content: str, title: str, note: str = "", kind: str = "") -> str:
    """A <figure> around an <svg> or <img>, with its caption above."""
    said = f"<strong>{escape(title)}</strong>" if title else ""
    said += f" <span>{escape(note)}</span>" if note else ""
    caption = f"<figcaption>{said}</figcaption>" if said else ""
    return f"<figure{_kind(kind)}>{caption}{content}</figure>\n"


def image(pixels: np.ndarray, description: str, share: float = 1.0) -> str:
    """An <img> of uint8 (H, W, 3) that carries its pixels with it.

    Args:
        pixels: stored as they are; the style sheet enlarges them.
        description: what it shows, for those who cannot see it.
        share: of the place's width that it fills.
    """
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG", optimize=True)
    height, width = pixels.shape[:2]
    kind = _kind("small" if max(height, width) < SMALL else "")
    attributes = f'width="{width}" height="{height}" style="width:{share:.2%}"{kind}'
    return png(stored.getvalue(), description, attributes)


def png(data: bytes, description: str, attributes: str = "") -> str:
    """An <img> of a PNG file's bytes."""
    coded = base64.b64encode(data).decode("ascii")
    return f'<img {attributes} alt="{escape(description)}" src="data:image/png;base64,{coded}">'


def tabs(name: str, pages: Sequence[tuple[str, str]]) -> str:
    """One page out of several, chosen by radio buttons: style sheets suffice, no script is needed.

    Args:
        name: of the group, unlike that of other groups.
        pages: (title, content), six at most; the first is shown until another is chosen, and printed
            if none is.
    """
    chooser = "".join(
        f'<input type="radio" name="{escape(name)}" id="{escape(name)}-{place}"'
        f"{' checked' if place == 1 else ''}>"
        f'<label for="{escape(name)}-{place}">{escape(title)}</label>'
        for place, (title, _) in enumerate(pages, 1)
    )
    bodies = "".join(
        f'<div class="page page-{place}">{content}</div>' for place, (_, content) in enumerate(pages, 1)
    )
    return f'<div class="tabs">{chooser}\n{bodies}</div>\n'


def _kind(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""
