"""Recipes side by side: which keys differ, and which of those change the result of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from etpp_ssl.config import may_change_on_resume
from etpp_ssl.recipe import Recipe

ABSENT = "–"
"""Stands for the value of a key that a recipe's components do not have."""


class Difference(NamedTuple):
    """A key that is not the same in all recipes."""

    key: str
    values: list[str]
    """One per recipe, as it would be written in YAML's flow style."""
    neutral: bool
    """Whether it never changes the trained weights."""


def differences(recipes: Sequence[Recipe]) -> list[Difference]:
    """Keys whose values differ, in the order of the recipes' keys, those that change the result first.

    The run folder is left out: it differs always.
    """
    flat = [_flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for values in flat for key in values)
    found = []
    for key in keys:
        values = [values[key][0] if key in values else ABSENT for values in flat]
        # A key that one component has and leaves unset, and another lacks, tells nothing.
        if len(set(values)) > 1 and not set(values) <= {"null", ABSENT} and key != "output":
            neutral = all(values[key][1] for values in flat if key in values)
            found.append(Difference(key, values, neutral))
    return sorted(found, key=lambda difference: difference.neutral)


def _flat(config: BaseModel, prefix: str = "", neutral: bool = False) -> dict[str, tuple[str, bool]]:
    """`section.key` to (value, whether it is neutral), sections opened up."""
    found: dict[str, tuple[str, bool]] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        inside = neutral or may_change_on_resume(type(config), name)
        if isinstance(value, BaseModel):
            found |= _flat(value, f"{prefix}{name}.", inside)
        else:
            found[f"{prefix}{name}"] = (_written(value), inside)
    return found


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        value = [
            item.model_dump(mode="json", exclude_none=True) if isinstance(item, BaseModel) else item
            for item in value
        ]
    return value if isinstance(value, str) else json.dumps(value, default=str)
