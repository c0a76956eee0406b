"""Recipes as YAML: read, overridden on the command line, compared."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from etpp_ssl.config import UserError, is_neutral
from etpp_ssl.recipe import FinetuneRecipe, Recipe, RunRecipe
from etpp_ssl.recipe_text import MAX_BYTES, MAX_DEPTH, load_yaml, quoted
from etpp_ssl.regular_file import read_text
from etpp_ssl.sentences import members_at, name_of, shown, shown_text, validation_sentence

TASKS: dict[str, type[Recipe] | type[FinetuneRecipe]] = {"pretrain": Recipe, "finetune": FinetuneRecipe}
"""The recipe that a `task` stands for; without one it is the first."""
AnyRecipe = TypeVar("AnyRecipe", Recipe, FinetuneRecipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a pre-training recipe, or a run folder's, and apply `section.key=value` overrides.

    A run folder's recipe gets that folder as its output: it may have been moved.

    Raises:
        UserError: naming the key, its value and what would be valid, or for a recipe of another task.
    """
    return _parsed(*_read(path, overrides), Recipe)


def load_finetune_recipe(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """The same for a recipe of `etpp finetune`; see `load_recipe`."""
    return _parsed(*_read(path, overrides), FinetuneRecipe)


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | FinetuneRecipe:
    """The same for a recipe of whatever task; see `load_recipe`."""
    return parse_any_recipe(*_read(path, overrides))


def parse_recipe(text: str, overrides: Sequence[str] = (), title: str = "recipe") -> Recipe:
    """A pre-training recipe from YAML text; see `load_recipe`."""
    return _parsed(text, overrides, title, Recipe)


def parse_finetune_recipe(text: str, overrides: Sequence[str] = (), title: str = "recipe") -> FinetuneRecipe:
    """A recipe of `etpp finetune` from YAML text; see `load_recipe`."""
    return _parsed(text, overrides, title, FinetuneRecipe)


def parse_any_recipe(
    text: str, overrides: Sequence[str] = (), title: str = "recipe"
) -> Recipe | FinetuneRecipe:
    """A recipe of whatever task from YAML text; see `load_recipe`."""
    values = _values(text, title)
    if _task(values, overrides, title) == "finetune":
        return _validated(values, overrides, title, FinetuneRecipe)
    return _validated(values, overrides, title, Recipe)


def changed_keys(old: RunRecipe, new: RunRecipe) -> list[str]:
    """Keys that differ and change the result of a run, as `section.key` with both values."""
    return _differences(old, new, "")


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[str, Sequence[str], str]:
    """The text of a recipe or of a run folder's, the overrides, and how to call it in messages."""
    path = Path(path)
    is_folder = os.path.isdir(path)
    file = path / "recipe.yaml" if is_folder else path
    try:
        text = read_text(file, MAX_BYTES)
    except FileNotFoundError:
        what = "is a folder without recipe.yaml" if is_folder else "does not exist"
        raise UserError(f"recipe {str(path)!r} {what}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"recipe {shown(str(path), 300)} cannot be read: {reason}") from error
    if is_folder:
        overrides = [f"output={quoted(str(path))}", *overrides]
    return text, overrides, str(file)


def _parsed(text: str, overrides: Sequence[str], title: str, kind: type[AnyRecipe]) -> AnyRecipe:
    """A recipe that must be of one task."""
    values = _values(text, title)
    task = _task(values, overrides, title)
    if TASKS[task] is not kind:
        wanted = next(name for name, known in TASKS.items() if known is kind)
        raise UserError(
            f"{title} is of task {task} (for etpp {task}), but this takes recipes and runs of task {wanted}"
        )
    return _validated(values, overrides, title, kind)


def _values(text: str, title: str) -> dict[str, Any]:
    values = _read_yaml(text, title)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{title} holds no `key: value` lines")
    return values


def _task(values: dict[str, Any], overrides: Sequence[str], title: str) -> str:
    task = values.get("task", "pretrain")
    for override in overrides:
        if override.startswith("task="):
            task = override.removeprefix("task=")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"{title}: task is {shown(task)}; valid are {', '.join(TASKS)}")
    return task


def _validated(
    values: dict[str, Any], overrides: Sequence[str], title: str, kind: type[AnyRecipe]
) -> AnyRecipe:
    for override in overrides:
        _apply(values, override, kind)
    try:
        # JSON mode is strict on scalars (no "3" for 3) and takes lists for tuples.
        text = json.dumps(kind.with_defaults(values), default=str)
        return kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(f"{title}: {validation_sentence(error, kind)}") from None


def _read_yaml(text: str, title: str) -> Any:
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{title} is no valid YAML: {shown_text(reason)}") from None


def _apply(values: dict[str, Any], override: str, kind: type[RunRecipe]) -> None:
    key, equals, text = override.partition("=")
    title = f"override {shown(override)}"
    if not equals or not key:
        raise UserError(f"{title} is not of the form key=value")
    value = _read_yaml(text, title)
    *sections, leaf = key.split(".")
    if len(sections) > MAX_DEPTH:
        raise UserError(f"{title}: its key has {len(sections) + 1:,} parts, and no recipe is so deep")
    if _stands_for_a_name([*sections, leaf], value, kind):
        sections, leaf = [*sections, leaf], "name"
    node = values
    for depth, section in enumerate(sections):
        if section not in node:
            node[section] = _default_section(sections[: depth + 1], kind)
        child = node[section]
        if not isinstance(child, dict):
            raise UserError(f"{title}: {'.'.join(sections[: depth + 1])} has no keys")
        node = child
    if leaf == "name":
        # Another component takes the section over: keys that mean something else to it, or nothing, go.
        by_name = {name_of(member): member for member in members_at(kind, sections)}
        before = node.get("name", _default_section(sections, kind).get("name"))
        old, new = by_name.get(before), by_name.get(value if isinstance(value, str) else None)
        if old is not new and old is not None and new is not None:
            for stale in [key for key in node if not _same_field(old, new, key)]:
                del node[stale]
    node[leaf] = value


def _stands_for_a_name(path: list[str], value: Any, kind: type[RunRecipe]) -> bool:
    """Whether `path=value` is short for `path.name=value`: a section of named components, and a word."""
    sections = members_at(kind, path)
    if len(path) == 1:
        return bool(sections) and not isinstance(value, dict)
    return isinstance(value, str) and any(name_of(member) is not None for member in sections)


def _default_section(path: list[str], kind: type[RunRecipe]) -> dict[str, Any]:
    """What an override starts from where the recipe leaves a section to its default."""
    sections = members_at(kind, path)
    if len(sections) < 2:
        return {}
    fields = [around.model_fields.get(path[-1]) for around in members_at(kind, path[:-1])]
    names = [getattr(field.default, "name", None) for field in fields if field is not None]
    return {"name": names[0]} if names[0] is not None else {}


def _same_field(old: type[BaseModel], new: type[BaseModel], key: str) -> bool:
    before, after = old.model_fields.get(key), new.model_fields.get(key)
    if before is None or after is None:
        return False
    return before.annotation == after.annotation and before.default == after.default


def _differences(old: BaseModel, new: BaseModel, prefix: str) -> list[str]:
    if type(old) is not type(new):
        return [f"{prefix}name ({getattr(old, 'name', '?')} -> {getattr(new, 'name', '?')})"]
    found = []
    for field in type(old).model_fields:
        before, after = getattr(old, field), getattr(new, field)
        if is_neutral(type(old), field) or before == after:
            continue
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found += _differences(before, after, f"{prefix}{field}.")
        else:
            found.append(f"{prefix}{field} ({shown(before)} -> {shown(after)})")
    return found
