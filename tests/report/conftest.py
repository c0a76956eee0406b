"""Tiny runs to report on, each trained once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from etpp_ssl.recipe import Recipe

SHORT = ["budget_epochs=0.5", "checkpoint.every_steps=2", "checkpoint.keep=3", "log_every_steps=2"]
KINDS = {
    "normalised": ["probe=reconstruction", "probe.every_steps=2", "probe.num_eval=6"],
    "plain pixels, one channel": ["in_chans=1", "target.norm_pix=false"],
    "five channels": ["in_chans=5", "model.patch_size=[4, 6]", "curriculum=constant", "image_size=[16, 18]"],
    "lanczos": ["curriculum.crop=lanczos", "seed=5"],
}


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture
def trained_run(
    _trained: tuple[Path, dict[str, Path]], tiny_recipe: Callable[..., Recipe]
) -> Callable[[str], Path]:
    """From a name in `KINDS` to the folder of a finished run; not to be written to."""
    around, made = _trained

    def train(kind: str) -> Path:
        from etpp_ssl.train.launch import pretrain

        if kind not in made:
            made[kind] = around / kind.replace(" ", "-")
            pretrain(tiny_recipe(*SHORT, *KINDS[kind], f"output={made[kind]}"))
        return made[kind]

    return train


@pytest.fixture
def run(trained_run: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the run with normalised pixels, to do with as one likes."""
    folder = tmp_path / "run"
    shutil.copytree(trained_run("normalised"), folder)
    return folder
