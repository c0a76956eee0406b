"""The import rule, the owners of third parties, and the shape of the loop file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "etpp_ssl"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"config", "files", "messages", "randomness"}
SIBLINGS = {"data", "curriculum", "model", "targets", "optim"}
ABOVE = {
    *BASE,
    *SIBLINGS,
    "evaluation",
    "recipe",
    "recipe_base",
    "recipe_file",
    "recipe_yaml",
    "run_folder",
    "run_state",
    "dist",
    "weights",
}
# evaluation holds the probes' Configs, so it stands between the siblings, which it uses, and recipe.
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "moved": set(),
    # For type checkers alone: the public names come when they are asked for.
    "__init__": {"config", "encoder", "encoder_sources", "recipe", "report", "train"},
    **{name: {*BASE, name} for name in SIBLINGS},
    "targets": {*BASE, "targets", "model.patches"},
    "evaluation": {*BASE, *SIBLINGS, "evaluation"},
    "recipe_yaml": BASE,
    "recipe_file": {*BASE, "recipe_yaml"},
    "recipe_base": {*BASE, *SIBLINGS, "recipe_file"},
    "recipe": {*BASE, *SIBLINGS, "evaluation", "recipe_base", "recipe_file"},
    "run_state": {*BASE, "curriculum.hours"},
    "run_folder": {*BASE, "curriculum.hours", "recipe", "recipe_file", "run_state"},
    "dist": {*ABOVE, "train"},
    "weights": ABOVE,
    "tasks": {*ABOVE, "tasks"},
    "train": {*ABOVE, "tasks", "debug", "train"},
    "debug": {*ABOVE, "tasks", "train", "debug"},
    "commands": {*ABOVE, "tasks", "train", "commands"},
    "export": {*BASE, *SIBLINGS, "recipe", "run_folder", "weights", "export"},
    "report": {*BASE, *SIBLINGS, "evaluation", "recipe", "run_folder", "weights", "report"},
    "encoder": {*BASE, *SIBLINGS, "evaluation", "report"},
    "encoder_timm": {*BASE, *SIBLINGS, "encoder", "weights"},
    "encoder_sources": {*ABOVE, "encoder", "encoder_timm", "report"},
    "cli_end": {*BASE, "dist"},
    "cli": {"cli_end", "commands", "debug", "export", "report", "train", "data", *ABOVE},
    "__main__": {"cli"},
}
# A folder, or a single file of one.
OWNERS = {
    "accelerate": {"commands", "debug", "dist", "evaluation", "tasks", "train"},
    "timm": {"model", "optim", "export", "data", "encoder_timm", "evaluation", "train/ema", "weights"},
    "torchvision": {"data", "report"},
    "typer": {"cli", "cli_end"},
    "matplotlib": {"report"},
    "psutil": {"train"},
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
def test_a_module_imports_only_what_it_may(file: Path) -> None:
    allowed = MAY_IMPORT[place(file)]
    for name in imports(file):
        top, *rest = name.split(".")
        if top == "etpp_ssl" and rest:
            ok = rest[0] in allowed or ".".join(rest) in allowed
            assert ok, f"{place(file)} may not import {name}"
        elif top in OWNERS:
            module = file.relative_to(PACKAGE).with_suffix("").as_posix()
            ok = place(file) in OWNERS[top] or module in OWNERS[top]
            assert ok, f"{top} belongs to {OWNERS[top]}, not to {module}"


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
