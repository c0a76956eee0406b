"""pydantic's findings in our words: one sentence that names the key, the value and what would be valid."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

SYNONYMS = {
    "amp": "precision",
    "arch": "model.name",
    "architecture": "model.name",
    "batch": "batch_size",
    "blr": "optim.base_lr",
    "bs": "batch_size",
    "channels": "in_chans",
    "checkpoint_path": "init",
    "classes": "model.num_classes",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data",
    "dtype": "precision",
    "epochs": "budget_epochs",
    "grad_accum": "micro_batch_size",
    "hours": "budget_hours",
    "image_dir": "data.root",
    "img_size": "image_size",
    "input_size": "image_size",
    "j": "data.num_workers",
    "learning_rate": "optim.base_lr",
    "log_every": "log_every_steps",
    "logger": "tracker.name",
    "lr": "optim.base_lr",
    "max_epochs": "budget_epochs",
    "mixed_precision": "precision",
    "num_channels": "in_chans",
    "num_epochs": "budget_epochs",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "out": "output",
    "output_dir": "output",
    "patch": "model.patch_size",
    "path": "data.root",
    "pretrained": "init",
    "resolution": "image_size",
    "run_dir": "output",
    "save_every": "checkpoint.every_steps",
    "size": "image_size",
    "wd": "optim.weight_decay",
    "weights": "init",
    "workers": "data.num_workers",
}
"""What other projects call a key, and its name here."""


def validation_sentence(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake that pydantic found, as one sentence.

    Args:
        error: what pydantic found.
        root: the Config that was validated.
    """
    return shown_text(" ".join(_first_mistake(error, root).split()), 1000)


def mistaken_key(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """The path of the key or section with that mistake; empty where several keys do not fit together."""
    return _walk(error.errors(include_url=False)[0]["loc"], root)[0]


def _first_mistake(error: ValidationError, root: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    path, models, here = _walk(first["loc"], root)
    key = ".".join(path) or "the recipe"
    value, kind = first["input"], first["type"]
    if kind == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        close = _meant(path[-1], root) or difflib.get_close_matches(path[-1], known, n=1)
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
    quotes = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    message = first["msg"].removeprefix("Input ")
    default = _default_instead(models, path[-1]) if value is None else ""
    others = [e for e in error.errors(include_url=False)[1:] if e["type"] == "literal_error"]
    words = [e["ctx"]["expected"] for e in others if _walk(e["loc"], root)[0] == path]
    word = f", or be {words[0]}" if words else ""
    return f"{key} is {shown(value)}: it {message}{word}{quotes}{default}"


def _default_instead(models: list[type[BaseModel]], key: str) -> str:
    """What to give in the place of a null, which often means that somebody wants nothing of it."""
    fields = [model.model_fields[key] for model in models if key in model.model_fields]
    defaults = {field.default for field in fields if isinstance(field.default, bool | int | float | str)}
    return f"; its default is {shown(defaults.pop())}" if len(defaults) == 1 else ""


def _meant(word: str, root: type[BaseModel]) -> list[str]:
    """The full key of a word that is a key of another section, or another project's name of one."""
    found = [
        ".".join(path) for path in (SYNONYMS.get(word, "").split("."), *_paths_to(word, root)) if path[0]
    ]
    known = [key for key in found if types_at(root, key.split("."))]
    return known[:1]


def _paths_to(word: str, root: type[BaseModel]) -> Iterator[list[str]]:
    """Where keys of this name stand, the highest ones first."""
    sections: list[list[str]] = [[]]
    seen: set[type[BaseModel]] = set()
    for section in sections:
        for model in members_at(root, section):
            if model in seen:
                continue
            seen.add(model)
            if word in model.model_fields:
                yield [*section, word]
            sections += [[*section, key] for key in model.model_fields if members_at(model, [key])]


def close_names(name: str, known: Sequence[str], fits: Callable[[str], bool], otherwise: str = "") -> str:
    """What to add to the refusal of a name: up to three close ones that are not refused in turn.

    Args:
        name: the refused one.
        known: the names that there are.
        fits: whether one of them would do; asked for few.
        otherwise: names to offer where no close one does.
    """
    close = difflib.get_close_matches(name, known, n=12)
    names = ", ".join(islice(filter(fits, close), 3)) or otherwise
    return f"; close names: {names}" if names else ""


def shown(value: Any, length: int = 80) -> str:
    """The repr of a value for a message, cut to a readable length; None is null, as recipes have it."""
    return "null" if value is None else shown_text(repr(value), length)


def shown_text(text: str, length: int = 300) -> str:
    """A text; a long one is cut in its middle, because the two ends of a name tell most."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


PLAIN_TYPES = ("int", "float", "bool", "str", "constrained-float", "literal")
"""How pydantic calls members of a union that are no Configs."""


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
        if named or part.endswith("]") or part.split("[")[0] in PLAIN_TYPES:
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


def types_at(root: type[BaseModel], path: list[str], name: Any = None) -> set[Any]:
    """The types that the key at `path` can hold, with unions taken apart; empty for an unknown key.

    Args:
        root: the Config of the whole recipe.
        path: of the key.
        name: of the component around it, where that is known.
    """
    around = members_at(root, path[:-1])
    named = [member for member in around if name_of(member) == name]
    fields = [member.model_fields.get(path[-1]) for member in named or around]
    return {kind for field in fields if field is not None for kind in _parts(field.annotation)}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The Configs that a type annotation admits, alone or in a list."""
    found: list[type[BaseModel]] = []
    for part in _parts(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            found.append(part)
        elif get_origin(part) is tuple:
            found += [model for item in get_args(part) for model in models_in(item)]
    return found


def _parts(annotation: Any) -> list[Any]:
    """A type as its members without their metadata; of a Literal, the types of its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _parts(arguments[0])
    if origin in (Union, types.UnionType):
        return [part for argument in arguments for part in _parts(argument)]
    return [type(value) for value in arguments] if origin is Literal else [annotation]


def name_of(member: type[BaseModel]) -> Any:
    """The literal `name` of a Config, or None."""
    field = member.model_fields.get("name")
    return field.default if field is not None else None
