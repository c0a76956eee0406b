"""Recipes as YAML: read, overridden on the command line, compared.

YAML as recipes use it: plain values, and an error before a hostile text takes memory or time.

What is left out of YAML is what no recipe needs: aliases, tags and merges, keys that are no words or stand
twice, null bytes, whole numbers of more digits than any setting has, deep nesting.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from etpp_ssl.config import UserError, may_change_on_resume
from etpp_ssl.files import read_text
from etpp_ssl.messages import members_at, name_of, shown, shown_text, validation_sentence
from etpp_ssl.recipe import FinetuneRecipe, Recipe, RunRecipe

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
        if may_change_on_resume(type(old), field) or before == after:
            continue
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found += _differences(before, after, f"{prefix}{field}.")
        else:
            found.append(f"{prefix}{field} ({shown(before)} -> {shown(after)})")
    return found


MAX_BYTES = 1 << 17
"""Of a recipe. The largest one in use has a thirtieth of it; PyYAML takes seconds for so many."""
MAX_DEPTH = 32
MAX_DIGITS = 40
"""Of a whole number; those of a real one cost nothing."""


def load_yaml(text: str) -> Any:
    """The value of a YAML text: dicts with text as keys, lists, text, numbers, dates, None.

    Raises:
        yaml.YAMLError: if it is no YAML, or more than recipes may hold.
        ValueError: for a number or a date that is none.
        RecursionError: not for a text within `MAX_BYTES`, but PyYAML is recursive.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MAX_BYTES:,}")
    return yaml.load(text, Loader=_Loader)


def quoted(text: str) -> str:
    """Any text as YAML on one line."""
    return yaml.dump(text, default_style='"', width=math.inf).strip()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (plain PyYAML reads `5e-4` as a string), and none of what is named above.

    A few nested aliases expand to more than any memory holds.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"aliases (*{event.anchor}) are not supported in recipes")
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.YAMLError(f"tags ({shown(self.peek_event().tag)}) are not supported in recipes")
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        line = node.start_mark.line + 1
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError("merges (<<) are not supported in recipes")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {shown(key)} below line {line} is no word: put it in quotes")
            if key in seen:
                raise yaml.YAMLError(f"key {shown(key)} stands twice below line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        odd = _ODD.search(value) if isinstance(value, str) else None
        if odd:
            what = "a null byte" if odd[0] == "\0" else "bytes that are no UTF-8"
            raise yaml.YAMLError(f"{value[:40]!r} holds {what}")
        return value

    def construct_whole(self, node: Any) -> int:
        """Python takes the square of the time for a number's digits, and base 60 is part of YAML 1.1."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"{node.value[:10]}... is a whole number of {len(node.value):,} digits")
        return int(self.construct_yaml_int(node))


_ODD = re.compile("[\0\ud800-\udfff]")

_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.(?:inf|Inf|INF|nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
