"""The template of the report's page, and the pictures and drawings that the page carries in itself.

Text reaches the page through jinja2's autoescape or `Markup.format` alone; what is `Markup` is HTML already.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from etpp_ssl.report.figures import INK

SMALL = 128
"""Images with fewer pixels than this along each side are enlarged pixel by pixel, not smoothly."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = ""
    """A class of the style sheet."""


@dataclass(frozen=True)
class Captioned:
    """A drawing or a picture under its caption."""

    content: Markup
    title: str
    note: str = ""
    kind: str = ""
    """A class of the style sheet."""


def render(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: `page.html.j2`, or another one beside it.
        values: what it names; a missing one is an error.
    """
    environment = Environment(
        loader=PackageLoader("etpp_ssl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def image(pixels: np.ndarray, description: str, share: float = 1.0) -> Markup:
    """An <img> of uint8 (H, W, 3) that carries its pixels with it.

    Args:
        pixels: stored as they are; the style sheet enlarges them.
        description: what it shows, for readers who cannot see it.
        share: of the width available to it that it fills.
    """
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG", optimize=True)
    height, width = pixels.shape[:2]
    kind = "small" if max(height, width) < SMALL else ""
    attributes = Markup('width="{}" height="{}" style="width:{}" class="{}"').format(
        width, height, f"{share:.2%}", kind
    )
    return png(stored.getvalue(), description, attributes)


def png(data: bytes, description: str, attributes: Markup | None = None) -> Markup:
    """An <img> of a PNG file's bytes."""
    coded = base64.b64encode(data).decode("ascii")
    element = Markup('<img {} alt="{}" src="data:image/png;base64,{}">')
    return element.format(attributes or "", description, coded)


def inline_svg(figure: Figure, key: str, description: str) -> Markup:
    """A matplotlib figure as an <svg> that scales with the page and takes the page's text colour.

    It has no ids that clash with those of other figures, and no addresses.

    Args:
        figure: its background is left out; whatever has the colour `INK` becomes `currentColor`.
        key: unlike that of all other figures on the page; ids in the SVG begin with it.
        description: what the figure shows, for readers who cannot see it.
    """
    drawn = io.StringIO()
    # Text stays text: it is smaller than outlines, sharp, and can be searched and copied.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = _own_ids(text, key)
    text = text.replace(INK, "currentColor")
    # matplotlib lists every sans-serif font it knows of, for every text.
    text = re.sub(r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1sans-serif", text)
    label = html.escape(description, quote=True)
    opening = re.compile(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>")
    # matplotlib escapes the texts in the figure.
    return Markup(opening.sub(lambda found: f'<svg role="img" aria-label="{label}" {found[1]}>', text))


def _own_ids(text: str, key: str) -> str:
    """Put the key in front of ids that something refers to, and remove all others."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))

    def rename(match: re.Match[str]) -> str:
        return f' id="{key}-{match[1]}"' if match[1] in used else ""

    text = re.sub(r'\sid="([^"]*)"', rename, text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", text)
