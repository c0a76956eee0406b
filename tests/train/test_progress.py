"""The progress bar on a terminal: one at a time, and gone at the end."""

from __future__ import annotations

import io
import re

from rich.console import Console
from tiny_runs import TINY

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.log import Progress


def curriculum() -> Curriculum:
    return Recipe.parse(TINY).build_curriculum(64)


def test_a_bar_that_is_started_again_after_a_rewind_is_the_only_one() -> None:
    terminal = io.StringIO()
    progress = Progress(curriculum(), visible=True)
    progress.console = Console(file=terminal, force_terminal=True, width=100)
    progress.start(0)
    progress.step(3)
    progress.start(2)
    progress.stop()
    hidden_and_shown = re.findall(r"\x1b\[\?25[lh]", terminal.getvalue())
    assert hidden_and_shown == ["\x1b[?25l", "\x1b[?25h"] * 2


def test_without_a_terminal_there_are_plain_lines() -> None:
    lines = io.StringIO()
    progress = Progress(curriculum(), visible=True)
    progress.console = Console(file=lines, width=200, soft_wrap=True)
    progress.start(0)
    row = {"stage": 0, "bandwidth": [8, 12], "loss": 0.5, "lr": 1e-3, "images_per_second": 10.0,
           "data_wait_share": 0.0}  # fmt: skip
    for step in range(1, 6):
        progress.row({**row, "step": step})
    progress.row({**row, "step": progress.curriculum.num_steps})
    progress.stop()
    first, last = lines.getvalue().splitlines()
    assert "stage 1/3 B=8x12 step 1/" in first
    assert last.startswith("100.0% ")
    assert "\x1b" not in lines.getvalue()
