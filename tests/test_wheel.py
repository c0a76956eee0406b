"""The wheel, without the clone: the lines that the documents show a notebook user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import TINY

ROOT = Path(__file__).parents[1]
LINES = """
import sys
import etpp_ssl
assert etpp_ssl.__file__.startswith(sys.argv[1]), etpp_ssl.__file__
recipe = etpp_ssl.Recipe.load("tiny.yaml", ["budget_epochs=0.3"])
run = etpp_ssl.pretrain(recipe)
encoder = etpp_ssl.load("run")
features = encoder.embed(["a.jpg", "b.tif"])
maps = encoder.patches("a.jpg")
shown = encoder.reconstruct("a.jpg", bandwidth=(12, 16), seed=0)
print(tuple(features.shape), tuple(maps.shape), shown.reconstruction.shape, type(encoder.model).__name__)
print(encoder.mean, encoder.std, encoder.classes, tuple(encoder.transform("a.jpg").shape))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel holds, in a folder; built from a copy, for building writes beside the sources."""
    copy, target = (tmp_path_factory.mktemp(name) for name in ("sources", "installed"))
    for name in ("pyproject.toml", "README.md", "etpp_ssl", "recipes"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (copy / "dist").glob("etpp_ssl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


FEW = ["image_size=64", "model.depth=1", "model.decoder.depth=1", "curriculum=constant"]
EXTENDING = "in1k_vit_base_etpp400_hog"
COMMANDS = [["recipes"], ["recipes", EXTENDING], ["plan", "mine.yaml", *FEW], ["plan", EXTENDING, *FEW]]
RUN_COMMANDS = f"""
import contextlib, io, json
from etpp_ssl.cli import main

printed = []
for words in {COMMANDS!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(words)
        except SystemExit as ended:
            assert ended.code in (0, None), words
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def printed(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The last three lines of one process that knows the wheel alone: two of `LINES`, one of the commands."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny.yaml").write_text(TINY.replace("output: unused", "output: run"))
    (folder / "mine.yaml").write_text((ROOT / "recipes" / f"{EXTENDING}.yaml").read_text())
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.tif"):
        Image.fromarray(values).save(folder / name)
    finished = subprocess.run(
        [sys.executable, "-c", LINES + RUN_COMMANDS, str(installed)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()[-3:]


def test_the_lines_of_the_python_interface_run_from_the_wheel(printed: list[str]) -> None:
    shapes, described, _ = printed
    assert shapes == "(2, 16) (4, 6, 16) (12, 16, 3) VisionTransformer"
    assert described == "(0.485, 0.456, 0.406) (0.229, 0.224, 0.225) None (3, 16, 24)"


def test_the_wheel_has_every_module_and_is_typed(installed: Path) -> None:
    assert (installed / "etpp_ssl" / "py.typed").is_file()
    here, there = (
        sorted(file.relative_to(root).as_posix() for file in (root / "etpp_ssl").rglob("*.py"))
        for root in (ROOT, installed)
    )
    assert here == there, "packages of pyproject.toml are not those in etpp_ssl/"


def test_the_wheel_brings_the_recipes(installed: Path, printed: list[str]) -> None:
    listed, copied, mine, its_own = json.loads(printed[-1])
    assert [line.split()[0] for line in listed.splitlines()] == sorted(
        file.stem for file in (ROOT / "recipes").glob("*.yaml")
    )
    assert len(list((installed / "etpp_ssl" / "recipes" / "accelerate").iterdir())) > 4
    # A copy of a recipe that extends another one is a recipe as it is.
    assert copied == (ROOT / "recipes" / f"{EXTENDING}.yaml").read_text()
    assert "speed-up" in mine
    assert mine == its_own
