"""A matplotlib figure as SVG inside an HTML page: no ids that clash, no addresses, the page's own ink."""

from __future__ import annotations

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure

from etpp_ssl.report.figures import INK


def inline_svg(figure: Figure, key: str, description: str) -> str:
    """An <svg> element that scales with the page and takes its text colour.

    Args:
        figure: its background is left out; whatever has the colour `INK` becomes `currentColor`.
        key: unlike that of all other figures on the page; ids in the SVG begin with it.
        description: what the figure shows, for those who cannot see it.
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
    return re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg role="img" aria-label="{label}" \1>', text)


def _own_ids(text: str, key: str) -> str:
    """Ids that something refers to get the key in front; all others go."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))

    def rename(match: re.Match[str]) -> str:
        return f' id="{key}-{match[1]}"' if match[1] in used else ""

    text = re.sub(r'\sid="([^"]*)"', rename, text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", text)
