"""`etpp keys`: every key of a recipe with type, default, meaning and whether it may change on resume.

All of it is read from the Configs: annotations, defaults, and the text below each field.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from etpp_ssl.config import UserError, may_change_on_resume
from etpp_ssl.messages import models_in, name_of
from etpp_ssl.recipe import FinetuneRecipe, Recipe

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
"""Of pydantic's bounds, in the order in which they are shown."""
TASKS: dict[str, type[BaseModel]] = {"pretrain": Recipe, "finetune": FinetuneRecipe}


class Key(NamedTuple):
    """One key of a recipe."""

    path: str
    """`section.key`, as overrides name it."""
    type: str
    """What it takes, in the words of YAML."""
    default: str
    """As YAML, or "required"."""
    meaning: str
    """The text below the field."""
    may_change: bool
    """Whether a resumed run may have another value."""


class Section(NamedTuple):
    """The keys of one Config in its place in a recipe."""

    path: str
    """`model.decoder`, or "" for the top level."""
    name: str | None
    """Of the component, where the section's `name` chooses among several; "any" for the keys of all."""
    tasks: tuple[str, ...]
    """Of the recipes that have it."""
    meaning: str
    """First sentence of the Config's docstring."""
    keys: tuple[Key, ...]

    @property
    def title(self) -> str:
        """`data: folder`, for instance."""
        title = self.path or "top level"
        return f"{title}: {self.name}" if self.name else title


def sections(section: str | None = None) -> list[Section]:
    """The sections of recipes in the order of their keys.

    Args:
        section: only those at or below this path, such as `model` or `model.decoder`; None is all of them.

    Raises:
        UserError: for a path that no recipe has, with those that are close.
    """
    found: dict[tuple[str, str | None, tuple[Key, ...], str], tuple[str, ...]] = {}
    for task, kind in TASKS.items():
        for part in _sections_of([kind], "", (task,), changeable=False):
            place = (part.path, part.name, part.keys, part.meaning)
            found[place] = (*found.get(place, ()), task)
    order = list(dict.fromkeys(path for path, *_ in found))
    merged = sorted(
        (Section(path, name, tasks, meaning, keys) for (path, name, keys, meaning), tasks in found.items()),
        key=lambda part: order.index(part.path),
    )
    if section is None:
        return merged
    chosen = [part for part in merged if part.path == section or part.path.startswith(f"{section}.")]
    if not chosen:
        known = [path for path in order if path]
        close = difflib.get_close_matches(section, known, n=3) or known
        raise UserError(f"section {section!r} is not known; did you mean {', '.join(close)}?")
    return chosen


def print_keys(section: str | None, console: Console) -> None:
    """Print the reference, or a section of it, as tables.

    Raises:
        UserError: as `sections`.
    """
    for part in sections(section):
        table = Table(title=part.title, caption=part.meaning, title_justify="left", caption_justify="left")
        for column, share in (("key", 3), ("type", 2), ("default", 2), ("meaning", 6), ("resume", 1)):
            table.add_column(column, ratio=share, overflow="fold")
        for key in part.keys:
            table.add_row(*(escape(text) for text in key[:4]), "may change" if key.may_change else "fixed")
        console.print(table, "")


def markdown_reference(section: str | None = None) -> str:
    """The reference as Markdown: a heading and a table for each section."""
    lines: list[str] = []
    for part in sections(section):
        whose = f" (`task: {part.tasks[0]}`)" if len(part.tasks) < len(TASKS) else ""
        lines += [f"## {_code(part)}{whose}", "", part.meaning, ""]
        if part.keys:
            lines += ["| Key | Type | Default | Meaning | May change on resume |", "|---|---|---|---|---|"]
        for key in part.keys:
            may_change = "yes" if key.may_change else "no"
            cells = (f"`{key.path}`", key.type, f"`{key.default}`", key.meaning, may_change)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _code(part: Section) -> str:
    path = f"`{part.path}`" if part.path else "Top level"
    if part.name is None:
        return path
    return f"{path}, any name" if part.name == "any" else f"{path}: `{part.name}`"


def _sections_of(
    members: list[type[BaseModel]], path: str, tasks: tuple[str, ...], *, changeable: bool
) -> Iterator[Section]:
    """The section at `path`, which can hold each of `members`, then those inside of it."""
    keys = [_keys_of(member, path, changeable) for member in members]
    shared = tuple(key for key in keys[0] if all(key in others for others in keys[1:]))
    if len(members) > 1 and shared:
        yield Section(path, "any", tasks, "Keys that all of them have.", shared)
    for member, own in zip(members, keys, strict=True):
        name = str(name_of(member)) if len(members) > 1 else None
        rest = own if len(members) == 1 else tuple(key for key in own if key not in shared)
        yield Section(path, name, tasks, _first_sentence(member), rest)
    inside: dict[str, tuple[list[type[BaseModel]], bool]] = {}
    for member in members:
        for key, field in member.model_fields.items():
            below = inside.setdefault(key, ([], changeable or may_change_on_resume(member, key)))[0]
            below += [model for model in models_in(field.annotation) if model not in below]
    for key, (below, may_change) in inside.items():
        if below:
            yield from _sections_of(below, f"{path}.{key}".lstrip("."), tasks, changeable=may_change)


def _keys_of(member: type[BaseModel], path: str, changeable: bool) -> tuple[Key, ...]:
    texts = docstrings(member)
    return tuple(
        Key(
            f"{path}.{key}".lstrip("."),
            _type_text(field.annotation, field.metadata),
            _default_text(field),
            texts.get(key, ""),
            changeable or may_change_on_resume(member, key),
        )
        for key, field in member.model_fields.items()
        if not _is_own_name(key, field)
    )


def _is_own_name(key: str, field: FieldInfo) -> bool:
    """Whether it is the `name` by which a recipe chooses the component."""
    return key == "name" and get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


@cache
def docstrings(config: type[BaseModel]) -> dict[str, str]:
    """The text below each field of a Config, its bases' included, on one line each."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _type_text(annotation: Any, metadata: list[Any]) -> str:
    bounds = [
        f"{sign} {getattr(item, bound)}"
        for bound, sign in SIGNS.items()
        for item in metadata
        if getattr(item, bound, None) is not None
    ]
    text = _plain_type(annotation)
    return f"{text}, {', '.join(bounds)}" if bounds else text


def _plain_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0], list(arguments[1:]))
    if origin is Literal:
        return " or ".join(json.dumps(value).strip('"') for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_plain_type(part) for part in arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_plain_type(arguments[0])}"
        return f"[{', '.join(_plain_type(part) for part in arguments)}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    plain: dict[Any, str] = {type(None): "null", str: "text", bool: "true or false", int: "whole number"}
    return plain.get(annotation, "number")


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        named = name_of(type(default))
        return str(named) if named is not None and len(models_in(field.annotation)) > 1 else "its defaults"
    if isinstance(default, tuple):
        return "[" + ", ".join(_default_item(item) for item in default) + "]"
    return _default_item(default)


def _default_item(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(name_of(type(value)))
    return value if isinstance(value, str) and value else json.dumps(value)


def _first_sentence(config: type[BaseModel]) -> str:
    text = " ".join((inspect.getdoc(config) or "").split())
    return text.split(". ")[0].removesuffix(".") + "."
