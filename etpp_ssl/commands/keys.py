"""`etpp keys` and `etpp recipes`: every key of a recipe, and the recipes that come with the package.

A key has its type, default, meaning and whether it may change on resume. All of it is read from the Configs:
annotations, defaults, and the text below each field.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from etpp_ssl.config import UserError, may_change_on_resume
from etpp_ssl.messages import SYNONYMS, models_in, name_of
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.recipe_file import find_shipped, shipped_recipes

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
    """The keys of one Config in its place in a recipe, or those that several Configs have in one place."""

    path: str
    """`model.decoder`, or "" for the top level."""
    name: str | None
    """Of the component, where the section's `name` chooses it among several."""
    tasks: tuple[str, ...]
    """Of the recipes that have it."""
    meaning: str
    """The Config's docstring on one line, or what there is to choose."""
    keys: tuple[Key, ...]

    @property
    def title(self) -> str:
        """`data`, or `data=folder` as an override spells it."""
        if not self.path:
            return f"task={self.name}" if self.name else "top level"
        return f"{self.path}={self.name}" if self.name else self.path


def sections(section: str | None = None) -> list[Section]:
    """The sections of recipes in the order of their keys.

    Args:
        section: only those at or below this path, such as `model` or `model.decoder`, those of one component
            (`data=folder`), or one key (`data.root`); None is all of them.

    Raises:
        UserError: for a path that no recipe has, with those that are close.
    """
    told: dict[type[BaseModel], str] = {}
    found = list(_tables(dict(TASKS), "", tuple(TASKS), changeable=False))
    for key in dict.fromkeys(key for kind in TASKS.values() for key in kind.model_fields):
        having = {task: kind for task, kind in TASKS.items() if key in kind.model_fields}
        by_members: dict[tuple[type[BaseModel], ...], tuple[str, ...]] = {}
        for task, kind in having.items():
            members = tuple(models_in(kind.model_fields[key].annotation))
            by_members[members] = (*by_members.get(members, ()), task)
        for members, tasks in by_members.items():
            changeable = all(may_change_on_resume(having[task], key) for task in tasks)
            found += _walk(members, key, tasks, changeable, told)
    if section is None:
        return found
    path, _, name = section.partition("=")
    if name:
        named = [part for part in found if part.path == path]
        names = [part.name for part in named if part.name is not None]
        if names and name not in names:
            raise UserError(f"{path} is one of {', '.join(names)}, not {name!r}")
        chosen = [part for part in named if part.name in (None, name)]
    else:
        chosen = [part for part in found if part.path == path or part.path.startswith(f"{path}.")]
    if not chosen:
        rows = {part: tuple(key for key in part.keys if key.path == path) for part in found}
        chosen = [part._replace(keys=keys) for part, keys in rows.items() if keys]
    if not chosen:
        known = list(dict.fromkeys(part.path for part in found if part.path))
        keys = [key.path for part in found for key in part.keys]
        close = [SYNONYMS[path]] if path in SYNONYMS else difflib.get_close_matches(path, [*known, *keys])
        raise UserError(f"section {path!r} is not known; did you mean {', '.join(close or known)}?")
    return chosen


def print_keys(section: str | None, console: Console) -> None:
    """Print the reference, or a section of it: a key with its type and default, below it what it means.

    Raises:
        UserError: as `sections`.
    """
    for part in sections(section):
        console.print(f"[bold]{escape(_titled(part, '{}'))}[/]\n{escape(part.meaning)}\n")
        for key in part.keys:
            default = key.default if key.default == "required" else f"default {key.default}"
            resume = "; may change on resume" if key.may_change else ""
            console.print(f"  [bold]{key.path}[/]  {escape(f'{key.type}; {default}{resume}')}")
            console.print(Padding(escape(key.meaning), (0, 0, 1, 6)))


def markdown_reference(section: str | None = None) -> str:
    """The reference as Markdown: a heading of the second level for each section, of the third for a name."""
    lines: list[str] = []
    for part in sections(section):
        lines += [f"{'###' if part.name else '##'} {_titled(part, '`{}`')}", "", part.meaning, ""]
        if part.keys:
            lines += ["| key | type | default | resume | meaning |", "|---|---|---|---|---|"]
        for key in part.keys:
            cells = (f"`{key.path}`", key.type, key.default, "yes" if key.may_change else "", key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines += [""] * bool(part.keys)
    return "\n".join(lines).rstrip() + "\n"


def _titled(part: Section, code: str) -> str:
    whose = f" of {part.tasks[0]} recipes" if part.path and len(part.tasks) < len(TASKS) else ""
    return (code.format(part.title) if part.path or part.name else "Top level") + whose


def _walk(
    members: tuple[type[BaseModel], ...],
    path: str,
    tasks: tuple[str, ...],
    changeable: bool,
    told: dict[type[BaseModel], str],
) -> Iterator[Section]:
    """The section at `path`, which can hold each of `members`, then those inside of it."""
    if not members:
        return
    if told.keys() >= set(members):
        yield Section(path, None, tasks, f"Has the keys of {told[members[0]]}.", ())
        return
    told.update(dict.fromkeys(members, path))
    named = {str(name_of(member)): member for member in members}
    yield from _tables(named, path, tasks, changeable=changeable)
    inside: dict[str, tuple[tuple[type[BaseModel], ...], bool]] = {}
    for member in members:
        for key, field in member.model_fields.items():
            below, may_change = inside.get(key, ((), changeable or may_change_on_resume(member, key)))
            inside[key] = tuple(dict.fromkeys((*below, *models_in(field.annotation)))), may_change
    for key, (below, may_change) in inside.items():
        yield from _walk(below, f"{path}.{key}", tasks, may_change, told)


def _tables(
    named: dict[str, type[BaseModel]], path: str, tasks: tuple[str, ...], *, changeable: bool
) -> Iterator[Section]:
    """What the Configs at `path` have in common, and what each has beside that."""
    keys = {name: _keys_of(member, path, changeable) for name, member in named.items()}
    if len(named) == 1:
        ((name, member),) = named.items()
        yield Section(path, None, tasks, _told_of(member), keys[name])
        return
    first, *others = keys.values()
    shared = tuple(key for key in first if all(key in other for other in others))
    choice = "task" if not path else f"{path}.name"
    yield Section(path, None, tasks, f"{choice} is one of {', '.join(named)}.", shared)
    for name, member in named.items():
        rest = tuple(key for key in keys[name] if key not in shared)
        yield Section(path, name, (name,) if not path else tasks, _told_of(member), rest)


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
                found[field.target.id] = _plain(str(text.value.value))
    return found


def _type_text(annotation: Any, metadata: list[Any]) -> str:
    bounds = [
        f"{sign} {getattr(item, bound):,}".removesuffix(".0")
        for bound, sign in SIGNS.items()
        for item in metadata
        if getattr(item, bound, None) is not None
    ]
    text = _plain_type(annotation)
    return f"{text}, {', '.join(bounds)}" if bounds else text


def _plain_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        told = [item.metadata if isinstance(item, FieldInfo) else [item] for item in arguments[1:]]
        return _type_text(arguments[0], [item for items in told for item in items])
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
    plain: dict[Any, str] = {type(None): "null", str: "text", bool: "true or false", int: "integer"}
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


def _told_of(config: type[BaseModel]) -> str:
    return _plain((inspect.getdoc(config) or "").split("\n\nRaises:")[0])


def _plain(text: str) -> str:
    """A docstring on one line, in the words of YAML."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def print_recipes(name: str | None = None) -> None:
    """Print names and purposes of all recipes, or the file of one, for a copy to change.

    What a recipe extends is a name, which is found from any folder.

    Raises:
        UserError: for an unknown name, with those that are close.
    """
    if name is not None:
        print(find_shipped(name).read_text(encoding="utf-8"), end="")
        return
    for known, file in shipped_recipes().items():
        print(f"{known:34} {purpose(file)}")


def purpose(file: Path) -> str:
    """The first sentence of a recipe's header, without its full stop."""
    paragraph: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        paragraph.append(text)
    return " ".join(paragraph).split(". ")[0].removesuffix(".")
