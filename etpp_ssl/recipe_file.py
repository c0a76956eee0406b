"""Recipes as YAML files: found by path or name, read, extended, overridden, compared."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from etpp_ssl import moved
from etpp_ssl.config import UserError, may_change_on_resume
from etpp_ssl.files import read_text
from etpp_ssl.messages import (
    members_at,
    mistaken_key,
    name_of,
    shown,
    shown_text,
    types_at,
    validation_sentence,
)
from etpp_ssl.recipe_yaml import MAX_BYTES, MAX_DEPTH, checked, load_word, load_yaml

EXTENDS = "extends"
"""Key of a recipe file that names the recipe whose values it takes over."""
STARTED_IN = "started_in"
"""Key of a run's recipe: the working folder of its last start, where its relative paths of data began."""
DATA_PATHS = ("root", "file", "eval_file", "urls", "data_files")
Kind = TypeVar("Kind", bound=BaseModel)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: in a wheel inside of it, in a clone beside it."""
    package = Path(__file__).parent
    folders = (package / "recipes", package.parent / "recipes")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_recipe(source: str | Path, folder: Path = Path(), what: str = "recipe or run") -> Path:
    """A path that exists, a recipe's or a run's, or else the file of a recipe that comes with the package.

    Args:
        source: path or name.
        folder: where relative paths start.
        what: how messages call it.

    Raises:
        UserError: if there is neither, with names that are close.
    """
    try:
        os.stat(folder / source)
    except FileNotFoundError:
        return find_shipped(source, what)
    except (OSError, ValueError):
        pass  # Whoever reads it tells why it cannot be read.
    return folder / source


def find_shipped(name: str | Path, what: str = "recipe") -> Path:
    """The file of a recipe that comes with the package; see `find_recipe`."""
    known = shipped_recipes()
    if str(name) in known:
        return known[str(name)]
    close = difflib.get_close_matches(Path(name).stem, known, n=3)
    hint = f"recipes with a close name are {', '.join(close)}" if close else "`etpp recipes` lists the names"
    raise UserError(f"{what} {shown_text(repr(str(name)))} does not exist; {hint}")


@dataclass(frozen=True)
class RecipeText:
    """A recipe's values as its files and overrides state them, not yet validated."""

    layers: tuple[dict[str, Any], ...]
    """Of the recipe and those that it extends, the first of them first."""
    overrides: tuple[str, ...]
    """`section.key=value` each."""
    title: str
    """How messages call it."""
    stored: bool = True
    """Whether these are a run's own values, or text, and not a recipe file to start a run from."""
    notes: tuple[str, ...] = ()
    """What the run should say of how they came about."""

    @classmethod
    def read(cls, source: str | Path, overrides: Sequence[str] = ()) -> RecipeText:
        """Of a recipe's file or name, or of a run folder, which becomes the output: it may have been moved.

        Raises:
            UserError: if one of its files is missing, cannot be read or is not YAML, or extends itself.
        """
        folder = find_recipe(source)
        if not os.path.isdir(folder):
            read = cls.of(_file_text(folder, str(source)), overrides, str(folder), folder)
            return replace(read, stored=False)
        file = folder / "recipe.yaml"
        read = cls.of(_file_text(file, str(source)), overrides, str(file), file)
        return replace(read, layers=(*read.layers, {"output": str(folder)}))

    @classmethod
    def of(
        cls, text: str, overrides: Sequence[str] = (), title: str = "recipe", file: Path | None = None
    ) -> RecipeText:
        """Of YAML text.

        Args:
            text: the recipe.
            overrides: `section.key=value` each.
            title: how messages call it.
            file: where the text is from; what it extends is looked for beside it, without it in the working
                folder.
        """
        layers, seen, newest = [_values(text, title)], [file and file.resolve()], title
        while EXTENDS in layers[0]:
            named = layers[0].pop(EXTENDS)
            what = f"{newest}: {EXTENDS}"
            if not isinstance(named, str) or not named:
                raise UserError(f"{what} is {shown(named)}; it must be the path or the name of a recipe")
            base = find_recipe(named, seen[-1].parent if seen[-1] else Path(), what)
            if base.resolve() in seen:
                raise UserError(f"{what} {shown(named)} leads in a circle, back to {str(base)!r}")
            seen.append(base.resolve())
            newest = str(base)
            layers.insert(0, _values(_file_text(base, named), newest))
        return cls(tuple(_found_again(layer) for layer in layers), tuple(overrides), title)

    def task(self, default: str) -> Any:
        """The last value that is given for `task`."""
        found: Any = default
        for layer in self.layers:
            found = layer.get("task", found)
        for override in self.overrides:
            if override.startswith("task="):
                found = override.removeprefix("task=")
        return found

    def values(self, kind: type[BaseModel]) -> dict[str, Any]:
        """All layers and overrides as one mapping, not validated; `kind` is that of the recipe.

        Raises:
            UserError: if an override names no key or cannot be read.
        """
        values: dict[str, Any] = {}
        for layer in self.layers:
            values = _merged(values, layer, kind, [])
        for override in self.overrides:
            _apply(values, override, kind)
        return values

    def validated(self, kind: type[Kind], with_defaults: Callable[[dict[str, Any]], dict[str, Any]]) -> Kind:
        """The recipe: what it extends, its own values above that, then the overrides.

        Args:
            kind: of recipe.
            with_defaults: adds what is not `kind`'s own default.

        Raises:
            UserError: naming the key, its value and what would be valid.
        """
        values = self.values(kind)
        try:
            # JSON mode is strict on scalars (no "3" for 3) and takes lists for tuples.
            return kind.model_validate_json(json.dumps(with_defaults(values)), strict=True)
        except ValidationError as error:
            mistake = validation_sentence(error, kind)
            overrides = self._behind(mistaken_key(error, kind), mistake, kind, with_defaults)
            raise UserError(f"{overrides or self.title}: {mistake}") from None

    def _behind(
        self,
        key: list[str],
        mistake: str,
        kind: type[Kind],
        with_defaults: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> str:
        """The overrides that a mistake comes from, as a message calls them; "" for one of the files."""
        close = [text for text in self.overrides if _touches(text.partition("=")[0].split("."), key)]
        if not close:
            return ""
        try:
            replace(self, overrides=()).validated(kind, with_defaults)
        except UserError as error:
            if str(error).endswith(mistake):
                return ""
        # Of several for one key the last one counts.
        last = {text.partition("=")[0]: text for text in close}.values()
        return f"override{'s' * (len(last) > 1)} {', '.join(shown(text) for text in last)}"


def changed_keys(old: BaseModel, new: BaseModel) -> list[str]:
    """Keys that differ and change the result of a run, as `section.key` with both values."""
    return _differences(old, new, "")


def _file_text(file: Path, name: str) -> str:
    try:
        return read_text(file, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"recipe {name!r} is a folder without recipe.yaml") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"recipe {shown(name, 300)} cannot be read: {reason}") from error


def _values(text: str, title: str) -> dict[str, Any]:
    values = _in_yaml(title, lambda: load_yaml(text))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{title} does not hold `key: value` lines")
    return values


def _found_again(values: dict[str, Any]) -> dict[str, Any]:
    """A run's values with the relative paths of its data as they were meant where the run was started.

    A path that is not there any more is left as it was given, and looked for in the working folder.
    """
    started_in = values.pop(STARTED_IN, None)
    if not isinstance(started_in, str) or started_in == os.getcwd() or "data" not in values:
        return values

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        # Neither from the root or home, nor a variable, nor a URL, a pipe or a drive.
        if not isinstance(value, str) or os.path.isabs(value) or re.match(r"[~$]|\w+:", value):
            return value
        plain = re.split(r"[*?\[{]", value, maxsplit=1)[0]
        place = os.path.join(started_in, plain if plain == value else os.path.dirname(plain))
        return os.path.join(started_in, value) if os.path.exists(place) else value

    def searched(section: Any) -> Any:
        if isinstance(section, list):
            return [searched(part) for part in section]
        if not isinstance(section, dict):
            return section
        return {k: absolute(v) if k in DATA_PATHS else searched(v) for k, v in section.items()}

    return {**values, "data": searched(values["data"])}


def _in_yaml(title: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{title} is not valid YAML: {shown_text(reason)}") from None


def _merged(
    base: dict[str, Any], above: dict[str, Any], kind: type[BaseModel], path: list[str]
) -> dict[str, Any]:
    """Two layers of the section at `path`; lists and values of the upper one replace those below."""
    merged = dict(base)
    if "name" in above:
        _drop_stale(merged, above["name"], kind, path)
    for key, value in above.items():
        below = merged.get(key)
        if isinstance(value, dict):
            value = _merged(below if isinstance(below, dict) else {}, value, kind, [*path, key])
        merged[key] = value
    return merged


def _touches(path: list[str], key: list[str]) -> bool:
    """Whether one of the two is, or lies in, the other."""
    return all(ours == theirs for ours, theirs in zip(path, key, strict=False))


def _apply(values: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    key, equals, text = override.partition("=")
    title = f"override {shown(override)}"
    if not equals or not key:
        raise UserError(f"{title} is not of the form key=value")
    *sections, leaf = path = key.split(".")
    if len(sections) > MAX_DEPTH:
        raise UserError(f"{title}: its key has {len(sections) + 1:,} parts, more than any recipe has")
    node = values
    for depth, section in enumerate(sections):
        if section not in node:
            node[section] = _default_section(sections[: depth + 1], kind)
        child = node[section]
        if not isinstance(child, dict):
            raise UserError(f"{title}: {'.'.join(sections[: depth + 1])} has no keys")
        node = child
    admitted = types_at(kind, path, node.get("name"))
    models = [part for part in admitted if isinstance(part, type) and issubclass(part, BaseModel)]
    has_name = bool(models) and (not sections or any(map(name_of, models)))
    if str in admitted and not text and type(None) not in admitted:
        raise UserError(f"{title}: no text stands behind the =")
    value = _in_yaml(title, lambda: _value(text, admitted, has_name=has_name))
    if has_name and not isinstance(value, dict | None):
        # section=name is short for section.name=name.
        sections, leaf = path, "name"
        if not isinstance(node.get(path[-1]), dict):
            # A recipe may have the name alone there, too, or null.
            node[path[-1]] = _default_section(path, kind)
        node = node[path[-1]]
    if leaf == "name":
        _drop_stale(node, value, kind, sections)
    node[leaf] = value


def _value(text: str, admitted: set[Any], *, has_name: bool) -> Any:
    """What the text of an override means to a key of these types.

    A key that takes text takes it to its last character: a folder may be called `set #1`, `Photos: 2024` or
    `20241130`. So does a section with a name, `section=name`, unless the text is a mapping.
    """
    if type(None) in admitted and text.strip() in _NOTHING:
        return None
    lists = [part for part in admitted if get_origin(part) is tuple]
    lists_of_words = any(str in get_args(part) for part in lists)
    if lists_of_words and text.startswith("[") and text.endswith("]"):
        if "'" in text or '"' in text:
            return load_yaml(text, only_words=True)
        # Commas in braces are a shell's, as in {a,b}.tar.
        return [word.strip() for word in re.split(r",(?![^{]*\})", checked(text[1:-1])) if word.strip()]
    is_list = bool(lists) and not lists_of_words and text.startswith("[")
    if str in admitted and float in admitted:
        # A number or a word that stands for one.
        with suppress(yaml.YAMLError):
            value = load_yaml(text)
            if isinstance(value, int | float):
                return value
    if str in admitted and not is_list:
        return checked(text)
    if has_name and not text.startswith(("{", "[")):
        with suppress(yaml.YAMLError):
            value = load_yaml(text)
            if isinstance(value, dict):
                return value
        return checked(text)
    return load_yaml(text) if admitted and Any not in admitted else load_word(text)


_NOTHING = ("", "null", "Null", "NULL", "None", "~")


def _drop_stale(node: dict[str, Any], name: Any, kind: type[BaseModel], path: list[str]) -> None:
    """Component `name` takes over the section at `path`: keys that mean nothing or another thing to it go."""
    by_name = {name_of(member): member for member in members_at(kind, path)}
    before = node.get("name", _default_section(path, kind).get("name"))
    old, new = (by_name.get(value) if isinstance(value, str) else None for value in (before, name))
    if old is not new and old is not None and new is not None:
        for stale in [key for key in node if not _same_field(old, new, key)]:
            del node[stale]


def _default_section(path: list[str], kind: type[BaseModel]) -> dict[str, Any]:
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


if not TYPE_CHECKING:
    __getattr__ = moved.names_of("recipe_file")
