"""Write docs/reference/keys.md and docs/reference/commands.md from the Configs and from the command line.

    python tools/make_reference.py [--check]

With --check nothing is written; it ends with an error if a page is not what the code says now.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from etpp_ssl.cli import app
from etpp_ssl.recipe import FinetuneRecipe, Recipe

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by tools/make_reference.py; change the docstrings it is made from instead. -->"

KEYS = f"""{NOTE}
# Recipe keys

A recipe is a YAML file with these keys; on the command line each is `section.key=value`, and
`section=name` stands for `section.name=name`. `etpp keys SECTION` prints them in a terminal.

*Resume* says whether a run may be resumed with another value: **yes** for keys that do not change the
trained weights. Any other change is refused on resume, naming the key; `--fork` continues in a new folder.

"""
COMMANDS = f"""{NOTE}
# Commands

`etpp COMMAND ...`, or `accelerate launch -m etpp_ssl COMMAND ...` for several processes. A mistake is one
line on stderr and the exit code 2; [Run folder](run-folder.md) has the other exit codes.

"""


def main() -> None:
    """Parse, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    check = parser.parse_args().check
    for name, text in pages().items():
        file = REFERENCE / name
        if not check:
            file.write_text(text, encoding="utf-8")
            print(file)
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file} is not what the code says now; write it anew: python tools/make_reference.py")


@cache
def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {"keys.md": keys_page(), "commands.md": commands_page()}


def commands_page() -> str:
    """Every command with its arguments and options."""
    return COMMANDS + "\n".join(
        command_section(info.name or info.callback.__name__, info.callback)
        for info in app.registered_commands
        if info.callback is not None and not info.hidden
    )


def command_section(name: str, command: Callable[..., Any]) -> str:
    """A command as a section, from its signature: typer's own objects differ from version to version."""
    usage, rows = [f"etpp {name}"], []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        required = parameter.default is parameter.empty
        if isinstance(info, typer.models.OptionInfo):
            names = f"`{' '.join(info.param_decls or ()) or '--' + parameter.name.replace('_', '-')}`"
            choices = [value for part in (kind, *get_args(kind)) for value in choices_of(part)]
            shown = names + (f" {', '.join(f'`{choice}`' for choice in choices)}" if choices else "")
        else:
            metavar = info.metavar or parameter.name.upper()
            usage.append(metavar if required or metavar.startswith("[") else f"[{metavar}]...")
            shown = f"`{metavar}`"
        # The number of cores is a machine's, not the documentation's.
        default = (
            "cores" if parameter.name == "workers" else getattr(parameter.default, "value", parameter.default)
        )
        empty = required or default is None
        rows.append(f"| {shown} | {'' if empty else f'`{default}`'} | {cell(info.help or '')} |")
    lines = [f"## {name}", "", inspect.getdoc(command) or "", "", "```text", " ".join(usage), "```", ""]
    return "\n".join([*lines, "| argument or option | default | meaning |", "|---|---|---|", *rows, ""])


def choices_of(kind: Any) -> list[str]:
    """The values of an enumeration."""
    return [member.value for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def keys_page() -> str:
    """Every key of every section."""
    common = set(Recipe.model_fields) & set(FinetuneRecipe.model_fields)
    same = {key for key in common if configs_in(Recipe, key) == configs_in(FinetuneRecipe, key)}
    lines = ["## Top level", "", "Keys of every recipe; with `task: finetune` it is for `etpp finetune`.", ""]
    lines += table((Recipe,), keys=[key for key in Recipe.model_fields if not configs_in(Recipe, key)])
    told: set[type[BaseModel]] = set()
    for title, recipe, keys in (
        ("", Recipe, [key for key in Recipe.model_fields if key in same]),
        (" of pre-training", Recipe, [key for key in Recipe.model_fields if key not in same]),
        (" of fine-tuning", FinetuneRecipe, [key for key in FinetuneRecipe.model_fields if key not in same]),
    ):
        for key in keys:
            found = configs_in(recipe, key)
            if found:
                lines += [f"## `{key}`{title}", "", *sections(key, found, 3, told)]
    return KEYS + "\n".join(lines).rstrip() + "\n"


def sections(path: str, configs: list[type[BaseModel]], level: int, told: set[type[BaseModel]]) -> list[str]:
    """Tables of the Configs that a key can hold, each followed by those of its own keys.

    Args:
        path: the key, with its section.
        configs: what it can hold.
        level: of a headline below the key's own.
        told: Configs that have their tables already; those of this key are added.
    """
    if told.issuperset(configs):
        names = ", ".join(f"`{name_of(config)}`" for config in configs)
        return [
            f"The keys of {names} above, as `{path}.<key>`."
            if len(configs) > 1
            else "The keys of this name above.",
            "",
        ]
    told.update(configs)
    lines: list[str] = []
    shared = shared_keys(configs)
    if shared:
        lines += [
            f"All of {', '.join(f'`{path}={name_of(config)}`' for config in configs)} have these keys.",
            "",
        ]
        lines += table(configs, keys=shared, prefix=path)
    for config in configs:
        own = [key for key in config.model_fields if key != "name" and key not in shared]
        if len(configs) > 1:
            lines += [f"{'#' * level} `{path}={name_of(config)}`", ""]
        lines += [cell(inspect.getdoc(config) or "").split(" Raises: ")[0], ""]
        lines += table((config,), keys=own, prefix=path)
        for key in own:
            nested = configs_in(config, key)
            if nested:
                where = f"{path}.{key}"
                lines += [f"{'#' * level} `{where}`", "", *sections(where, nested, level + 1, told)]
    return lines


def shared_keys(configs: list[type[BaseModel]]) -> list[str]:
    """Keys that several Configs have alike."""
    if len(configs) < 2:
        return []
    first = configs[0].model_fields
    return [
        key
        for key in first
        if key != "name"
        and all(key in c.model_fields and row(c, key) == row(configs[0], key) for c in configs)
    ]


def table(configs: Any, keys: list[str], prefix: str = "") -> list[str]:
    """Rows of some keys of a Config."""
    if not keys:
        return []
    rows = [row(configs[0], key, prefix) for key in keys]
    return ["| key | type | default | resume | meaning |", "|---|---|---|---|---|", *rows, ""]


def row(config: type[BaseModel], key: str, prefix: str = "") -> str:
    """A key as a row."""
    field = config.model_fields[key]
    extra = field.json_schema_extra
    may_change = isinstance(extra, dict) and bool(extra.get("may_change") or extra.get("neutral"))
    return (
        f"| `{prefix + '.' if prefix else ''}{key}` | {cell(type_of(field))} | {default_of(field)} | "
        f"{'yes' if may_change else ''} | {cell(meanings(config).get(key, field.description or ''))} |"
    )


def name_of(config: type[BaseModel]) -> str:
    """What a recipe calls a Config."""
    field = config.model_fields.get("name")
    return str(field.default) if field is not None else config.__name__


@cache
def meanings(config: type[BaseModel]) -> dict[str, str]:
    """The docstrings below the fields of a Config and of those it derives from."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not (issubclass(base, BaseModel) and base.__module__.startswith("etpp_ssl")):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[statement.target.id] = text.value
    return found


def configs_in(config: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The Configs that a key can hold."""
    return list(dict.fromkeys(_configs(config.model_fields[key].annotation)))


def _configs(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        if get_origin(annotation) is not Literal:
            yield from _configs(part)


def type_of(field: FieldInfo) -> str:
    """The type, and the bounds of a number."""
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{word} {number(getattr(item, name))}"
        for item in field.metadata
        for name, word in bounds.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *found])


def number(value: float) -> str:
    """With a comma between thousands, and without a point where it is whole."""
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is Annotated:
        return _type(parts[0])
    if origin in (Union, types.UnionType):
        shown = dict.fromkeys(_type(part) for part in parts)
        return " or ".join(shown)
    if origin is tuple:
        return f"list of {_type(parts[0])}" if parts[-1] is Ellipsis else f"[{', '.join(map(_type, parts))}]"
    if origin in (list, dict):
        return "list" if origin is list else "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{name_of(annotation)}`" if "name" in annotation.model_fields else "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_of(field: FieldInfo) -> str:
    """The default; nothing for a key that a recipe must have."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return f"`{name_of(type(value))}`" if "name" in type(value).model_fields else ""
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return ", ".join(f"`{name_of(type(part))}`" for part in value)
    return f"`{json.dumps(value)}`"


def cell(text: str) -> str:
    """Text as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
