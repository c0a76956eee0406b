"""The text of a recipe that extends another one, for commands that write what they have found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.recipe_base import task_of
from etpp_ssl.recipe_file import EXTENDS, RecipeText
from etpp_ssl.recipe_yaml import dump_yaml


def extending(
    source: str, overrides: Sequence[str], file: Path, found: Mapping[str, Any], comment: str
) -> str:
    """YAML of a recipe that extends `source` by overrides and by what was found.

    Args:
        source: a recipe's file or name, or a run.
        overrides: `section.key=value` each.
        file: where it will be written; a file that it extends is named as seen from there.
        found: keys and values at the top level; of a section, those that change.
        comment: its first line.
    """
    kind = Recipe if task_of(RecipeText.read(source, overrides)) == "pretrain" else FinetuneRecipe
    before, after = (RecipeText.read(source, given).values(kind) for given in ((), overrides))
    layer = _difference(before, after)
    for key, value in found.items():
        same_kind = isinstance(value, dict) and isinstance(layer.get(key), dict)
        layer[key] = {**layer[key], **value} if same_kind else value
    base = source
    if os.path.exists(source):
        # Beside the new file, wherever both are moved to.
        base = os.path.relpath(source, file.absolute().parent)
    return f"# {comment}\n{dump_yaml({EXTENDS: base, **layer}, compact=True)}"


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What to put above `before` to have `after`."""
    changed: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if key in before and old == value:
            continue
        same = isinstance(old, dict) and isinstance(value, dict) and old.get("name") == value.get("name")
        changed[key] = _difference(old, value) if same else value  # type: ignore[arg-type]
    return changed
