"""pydantic's findings in our words: one sentence that names the key, the value and what would be valid."""

from __future__ import annotations

import difflib
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def validation_sentence(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake that pydantic found, as one sentence.

    Args:
        error: what pydantic found.
        root: the Config that was validated.
    """
    return shown_text(" ".join(_first_mistake(error, root).split()), 1000)


def _first_mistake(error: ValidationError, root: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    path, models, here = _walk(first["loc"], root)
    key = ".".join(path) or "the recipe"
    value, kind = first["input"], first["type"]
    if kind == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        close = difflib.get_close_matches(path[-1], known, n=1)
        where = ".".join(path[:-1])
        hint = f"did you mean {close[0]!r}? " if close else ""
        of = f" of {where}" if where else ""
        return f"unknown key {shown(key)}; {hint}valid keys{of} are {', '.join(known)}"
    if kind in ("union_tag_invalid", "union_tag_not_found", "literal_error"):
        names = [name_of(m) for m in here] if kind.startswith("union") else None
        valid = ", ".join(map(str, names)) if names else first.get("ctx", {}).get("expected", "")
        if kind == "union_tag_not_found":
            return f"{key}.name is missing; valid names are {valid}"
        name = value.get("name") if isinstance(value, dict) else value
        return f"{key}{'.name' if names else ''} is {shown(name)}; valid are {valid}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        return f"{key}: {first['msg'].removeprefix('Value error, ')}"
    message = first["msg"].removeprefix("Input ")
    return f"{key} is {shown(value)}: it {message}"


def shown(value: Any, length: int = 80) -> str:
    """The repr of a value for a message, cut to a readable length."""
    return shown_text(repr(value), length)


def shown_text(text: str, length: int = 300) -> str:
    """A text; a long one is cut in its middle, because the two ends of a name tell most."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def _walk(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[list[str], list[type[BaseModel]], list[type[BaseModel]]]:
    """A pydantic location as recipe keys, without union tags.

    Beside it the Configs around its last key, and those that the key itself can hold.
    """
    path: list[str] = []
    models: list[type[BaseModel]] = [root]
    around = models
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
            continue
        tagged = [m for m in models if name_of(m) == part]
        if tagged and len(models) > 1:
            models = tagged
            continue
        named = any(model.__name__ == part for model in models)
        if named or part.endswith("]") or part in ("int", "float", "bool", "str"):
            continue
        path.append(part)
        around = models
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in models_in(model.model_fields[part].annotation)
        ]
    return path, around, models


def members_at(root: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    """The Configs that the section at `path` below `root` can hold; `root` itself for an empty path."""
    found = [root]
    for key in path:
        fields = [model.model_fields[key] for model in found if key in model.model_fields]
        found = [inner for field in fields for inner in models_in(field.annotation)]
    return found


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The Configs that a type annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple):
        return [model for part in get_args(annotation) for model in models_in(part)]
    return []


def name_of(member: type[BaseModel]) -> Any:
    """The literal `name` of a Config, or None."""
    field = member.model_fields.get("name")
    return field.default if field is not None else None
