"""The report in a browser: on a phone, on a desk and on paper. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etpp_ssl.evaluation.linear_cached import LinearCachedConfig
from etpp_ssl.report.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip

FRAME = """<!DOCTYPE html><html><body style="margin:0">
<iframe src="probe.html" style="border:0;width:{width}px;height:{height}px"></iframe>
<script>addEventListener("message", event => document.body.dataset.found = event.data)</script>
</body></html>"""
"""The window of a headless Chromium is never narrower than 500 pixels; a frame in it can be."""

PROBE = """<script>addEventListener("load", () => {
const shown = [...document.querySelectorAll("svg, img")].filter(e => e.getClientRects().length);
const whole = document.scrollingElement;
const edge = [...document.querySelectorAll("body *")].filter(e =>
  !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > whole.clientWidth + 1);
parent.postMessage(JSON.stringify({
  width: whole.clientWidth, content: whole.scrollWidth, height: whole.scrollHeight,
  beyond: edge.map(e => e.tagName + "." + e.className), shown: shown.length,
  empty: shown.map(e => e.getBoundingClientRect()).filter(box => Math.min(box.width, box.height) < 8).length,
  tallest: Math.max(...[...document.querySelectorAll("#results tr")].map(e => e.offsetHeight)),
  broken: shown.filter(e => e.tagName == "IMG" && !e.naturalWidth).length,
  smallest: Math.min(...[...document.querySelectorAll(".page-1 svg text")].map(e =>
    parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)),
}), "*");
});</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is in the PATH")
    return found


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """The page, once it is written."""
    return {}


@pytest.fixture
def page(browser: str, trained_run: Callable[[str], Path], tmp_path: Path, written: dict[str, str]) -> Path:
    file = tmp_path / "page.html"
    if not written:
        runs = [trained_run(kind) for kind in ("normalised", "five channels")]
        runs[0] = Path(shutil.copytree(runs[0], tmp_path / "normalised"))
        (runs[0] / "report").mkdir(exist_ok=True)
        protocols = [LinearCachedConfig(epochs=epochs).model_dump() for epochs in (5, 50)]
        rows = [{"step": 6, "protocol": p, "linear_cached_top1": 12.5, "knn_top1": 11.0} for p in protocols]
        (runs[0] / "report" / "probes.jsonl").write_text("\n".join(map(json.dumps, rows)))
        written["text"] = write_report(runs, file, say=lambda _: None).read_text()
    file.write_text(written["text"])
    return file


def chromium(browser: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen(browser: str, page: Path, tmp_path: Path, width: int) -> None:
    (tmp_path / "probe.html").write_text(page.read_text().replace("</body>", PROBE), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, height=900), encoding="utf-8")
    dom = chromium(
        browser, tmp_path, "--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None, dom[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen["width"] == width
    assert seen["content"] <= width
    assert seen["beyond"] == []
    assert seen["height"] > 2000
    # One of the three axes of the curves, and the plan; the images of two runs, one of two checkpoints.
    assert seen["shown"] == 6 + 1 + (3 + 4 * 6) + 4 * 5
    assert seen["empty"] == seen["broken"] == 0
    # At most three lines each: long settings are folded away.
    assert seen["tallest"] < 90
    # Figures are drawn for a phone: their text stays readable there.
    assert seen["smallest"] >= 7


def test_a_screenshot_shows_figures(browser: str, page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    chromium(browser, tmp_path, "--window-size=1280,3000", f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape[1] == 1280
    blue = np.abs(pixels.astype(int) - [0, 114, 178]).max(-1) < 12
    assert blue.sum() > 500


def test_the_page_can_be_printed(browser: str, page: Path, tmp_path: Path) -> None:
    chromium(
        browser, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri()
    )
    data = (tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert len(data) > 20_000
