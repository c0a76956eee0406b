"""The import rule, the owners of third parties, and the shape of the loop file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "etpp_ssl"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder, or a single file of one.
OWNERS = {
    "accelerate": {"commands", "debug", "dist", "evaluation", "tasks", "train"},
    "timm": {"model", "optim", "export", "data", "encoder_sources", "evaluation", "train/run", "weights"},
    "torchvision": {"data", "report"},
    "typer": {"cli_app", "cli_end", "cli_train", "cli_use"},
    "matplotlib": {"report"},
    "psutil": {"train", "evaluation", "data/cache"},
    "webdataset": {"data/streams/webdataset"},
    "datasets": {"data/streams/huggingface"},
    "yaml": {"recipe_base", "recipe_file", "recipe_yaml", "export"},
    # Exports are written without it; only a test opens them.
    "transformers": set(),
}


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_third_party_is_imported_by_its_owners_only(file: Path) -> None:
    module = file.relative_to(PACKAGE).with_suffix("").as_posix()
    for name in imports(file):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or {place(file), module} & owners, (
            f"{name} belongs to {owners}, not to {module}"
        )


def test_the_import_contracts_of_pyproject_are_kept() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_the_loop_is_short_and_reads_in_the_order_of_the_method() -> None:
    text = (PACKAGE / "train" / "loop.py").read_text()
    assert len(text.splitlines()) <= 150
    loop = text[text.index("while not run.finished") :]
    order = [
        "stage_at(",
        "learning_rate(",
        "batches.step()",
        "forward_backward(",
        "optimizer.step()",
        "log_row(",
    ]
    places = [loop.index(word) for word in order]
    assert places == sorted(places)
    assert ".name ==" not in loop[: places[-1]], "the loop asks for a method's name"


def test_there_are_no_drawer_files() -> None:
    assert not [f for f in FILES if f.stem in ("utils", "helpers", "common", "misc")]


def test_every_public_definition_has_a_docstring() -> None:
    bare = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), f"{file} has no docstring"
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                bare.append(f"{file.relative_to(PACKAGE)}: {node.name}")
    assert not bare
