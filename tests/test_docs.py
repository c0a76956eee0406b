"""The documents: tutorials run as written, generated pages are fresh, and what a page names exists."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from make_reference import pages
from ranks import Server
from worth_figure import ARMS, points

from etpp_ssl.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = DOCS / "tutorials"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS = re.compile(r"^<!-- in the test\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"`((?:etpp_ssl|tests|tools|recipes|docs|findings)/[\w./-]*\w)`")
NAME = re.compile(r"`(etpp_ssl(?:\.\w+)+)`")
IGNORED = {"etpp_ssl/targets/brightness.py"}
"""Files that a page tells its reader to write."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*groups) for groups in FENCE.findall(page.read_text(encoding="utf-8"))]


def overrides(page: Path) -> dict[str, list[str]]:
    """What the test adds to commands, from the comment atop a page: `etpp plan: key=value key=value`."""
    found = {}
    for line in (SETTINGS.findall(page.read_text(encoding="utf-8")) or [""])[0].splitlines():
        command, _, values = line.partition(": ")
        found[command] = re.split(r" (?=[\w.]+=)", values)
    return found


def commands(script: str) -> Iterator[str]:
    """The lines of a script, those that end in a backslash joined."""
    for line in script.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


TORCHRUN = ["torchrun", "--nproc_per_node", "2", "-m", "etpp_ssl"]


def run_command(line: str, extra: dict[str, list[str]], ranks: Server | None) -> None:
    """A line of a page, in processes that have imported torch where it is `etpp`; everything else by bash."""
    words = shlex.split(line, comments=True)
    if ranks is not None and words[: len(TORCHRUN)] == TORCHRUN:
        ranks.run(words[len(TORCHRUN) :], 2, before=f"import os; os.chdir({os.getcwd()!r})")
        return
    if words[0] != "etpp":
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-ec", line], check=True, env=environment)
        return
    code = 0
    try:
        main([*words[1:], *extra.get(" ".join(words[:2]), [])])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 0, line


def run_page(page: Path, ranks: Server | None = None) -> None:
    """Run the bash and Python blocks of a page in this folder, in order; Python blocks share their names."""
    extra, names = overrides(page), {"__name__": "tutorial"}
    for block in blocks(page):
        if block.language == "bash":
            for line in commands(block.text):
                run_command(line, extra, ranks)
        elif block.language == "python" and not block.title:
            exec(compile(block.text, str(page), "exec"), names)


def test_own_data_then_finetune_and_probe_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    run_page(TUTORIALS / "own-data.md")
    assert Path("runs/photos/report/index.html").is_file()
    run_page(TUTORIALS / "your-labels.md")
    run_page(TUTORIALS / "finetune-and-probe.md")
    assert Path("runs/photos_finetuned/export/timm/model.safetensors").is_file()


def test_scientific_images_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(TUTORIALS / "scientific-images.md")
    assert Path("seen/sheet.png").is_file()
    assert "range: [0, 10000]" in Path("mine.yaml").read_text()
    assert Path("runs/tiles/export/timm/model.safetensors").is_file()
    assert Path("runs/dim/status.json").is_file()


def test_many_gpus_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Server) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    run_page(TUTORIALS / "many-gpus.md", ranks)
    assert Path("runs/longer/status.json").is_file()


def test_own_model_and_target_runs_as_written_in_a_copy_of_the_clone(tmp_path: Path) -> None:
    for name in ("etpp_ssl", "recipes", "tests", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    script, python = [], []
    for block in blocks(TUTORIALS / "own-model-and-target.md"):
        if block.language == "diff":
            apply(block, tmp_path)
        elif block.title:
            (tmp_path / block.title).write_text(block.text)
        elif block.language == "bash":
            script += [shlex.split(line, comments=True) for line in commands(block.text)]
        elif block.language == "python":
            python.append(block.text)
    in_process = [line[1:] for line in script if line[0] == "etpp"]
    others = [line[3:] for line in script if line[:3] == ["python", "-m", "pytest"]]
    assert len(in_process) + len(others) == len(script)
    # One process for the whole page: each of its commands would spend most of its time importing torch.
    driver = f"""
import sys
import pytest
from etpp_ssl.cli import main
for line in {in_process!r}:
    try:
        main(line)
    except SystemExit as ended:
        assert ended.code in (0, None), line
exec({"".join(python)!r})
for line in {others!r}:
    assert pytest.main(line) == 0, line
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", driver], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"[1-9]\d* passed", ran.stdout), ran.stdout


def apply(block: Block, root: Path) -> None:
    """A diff of a page: its context and removed lines are found once, and replaced."""
    lines = block.text.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    file = root / block.title
    text = file.read_text()
    assert text.count(before + "\n") == 1, f"{block.title} has no line {before!r}"
    file.write_text(text.replace(before + "\n", after + "\n"))


@pytest.mark.parametrize("name", ["keys.md", "commands.md"])
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == pages()[name], "stale; write it anew: python tools/make_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = {path for path in PATH.findall(text) if path not in IGNORED and not (ROOT / path).exists()}
    assert not missing
    for name in set(NAME.findall(text)):
        resolve(name)


def resolve(name: str) -> object:
    """A dotted name of the package."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if find_spec(".".join(parts[:1])) and _is_module(".".join(parts[:end])):
            found: object = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise AssertionError(f"{name} does not exist")


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_between_files_leads_somewhere(page: Path) -> None:
    text = re.sub(FENCE, "", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_readme_is_short_and_shows_the_study() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 10_240
    assert "docs/figures/worth.png" in readme
    study = (DOCS / "study" / "index.md").read_text(encoding="utf-8")
    for arm in ARMS:
        full = points(arm)[-1]
        assert re.search(
            rf"^\| {arm} \| 1 \| 3 \|.* {full.accuracy:.2f} ± {full.spread:.2f}", study, re.MULTILINE
        )


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", "tools/mkdocs.yml",
         "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    html = "".join(file.read_text() for file in (tmp_path / "site").rglob("*.html"))
    # Nothing is fetched from elsewhere while a page is read.
    assert not re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(?:https?:)?//", html)
    assert "fonts.googleapis" not in html
