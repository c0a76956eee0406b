"""The tables of a run report: summary, stages, differences between recipes, environment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from etpp_ssl.config import as_pair, may_change_on_resume, show_size
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.report.figures import images_gained
from etpp_ssl.report.history import History, number
from etpp_ssl.report.markup import Table
from etpp_ssl.report.results import best_results

ABSENT = "–"
"""Stands in a cell for a value that a run or its recipe does not have."""

STAGE_TITLES = (
    "stage", "bandwidth", "steps", "images", "eq. epochs", "time", "images/s", "first loss", "last loss",
)  # fmt: skip


def summary(histories: Sequence[History]) -> Table:
    """What each run is and how far it came: a column per run."""
    table = _columns(histories, [_summary_of(history) for history in histories])
    best = _columns(histories, best_results(histories))
    return Table(table.head, [*table.rows, *best.rows], "summary")


def environment(histories: Sequence[History]) -> Table:
    """Versions, threads, processes and device of each run's newest checkpoint: a column per run."""
    return _columns(histories, [history.environment for history in histories])


def _columns(histories: Sequence[History], values: Sequence[dict[str, str]]) -> Table:
    keys = dict.fromkeys(key for column in values for key in column)
    rows = [[key, *(column.get(key, ABSENT) for column in values)] for key in keys]
    return Table(["", *(history.name for history in histories)], rows)


def _summary_of(history: History) -> dict[str, str]:
    recipe, last = history.recipe, history.rows[-1] if history.rows else {}
    total = history.curriculum.num_steps if history.curriculum is not None else None
    state = {None: "unknown", True: "finished", False: "not finished"}[history.finished]
    values = {
        "state": state if history.steps_done else "not started",
        "steps": f"{history.steps_done:,}" + (f" of {total:,}" if total is not None else ""),
        **_task_of(recipe),
        "channels": str(recipe.in_chans),
        "curriculum": recipe.curriculum.name,
        "data": recipe.data.name,
    }
    if history.curriculum is not None and len(history.curriculum.stages) > 1:
        values["images for its compute"] = (
            f"{images_gained(history.curriculum):.3g} times as many as at full size"
        )
    epochs, images, seconds = (number(last.get(k)) for k in ("equivalent_epochs", "images_seen", "seconds"))
    if epochs is not None:
        whole = f" of {history.curriculum.equivalent_epochs:.4g}" if history.curriculum is not None else ""
        values["compute"] = f"{epochs:.4g}{whole} equivalent epochs"
    if images is not None:
        values["images seen"] = f"{images:,.0f}"
    if seconds:
        values["training time"] = duration(seconds)
        if images is not None:
            values["images per second"] = f"{images / seconds:,.0f}"
    if "loss" in last:
        values["last training loss"] = f"{last['loss']:.4f}"
    if number(last.get("bad_images")):
        values["unreadable images"] = f"{last['bad_images']:,}"
    return values


def _task_of(recipe: Recipe | FinetuneRecipe) -> dict[str, str]:
    size = show_size(recipe.size)
    if isinstance(recipe, FinetuneRecipe):
        start = "" if recipe.init is None else f", from {recipe.init}"
        return {"image, patch": f"{size} px", "encoder": recipe.model.name, "target": f"classes{start}"}
    patch = show_size(recipe.patch_size)
    return {"image, patch": f"{size}, {patch} px", "encoder": recipe.model.name, "target": recipe.target.name}


def stages(histories: Sequence[History]) -> Table:
    """What each logged stage of each run came to."""
    rows = [[history.name, *row] for history in histories for row in stage_rows(history)]
    return Table(["run", *STAGE_TITLES], rows, "numbers")


def stage_rows(history: History) -> list[list[str]]:
    """One row per logged stage, in the columns of `STAGE_TITLES`.

    Steps, images and compute are counted from the end of the stage before, according to the log.
    """
    rows: list[list[str]] = []
    before: dict[str, Any] = {}
    for index in dict.fromkeys(row.get("stage") for row in history.rows):
        inside = [row for row in history.rows if row.get("stage") == index]
        last = inside[-1]
        keys = ("step", "images_seen", "equivalent_epochs", "seconds")
        steps, images, epochs, seconds = (_since(before, last, key) for key in keys)
        bandwidth = last.get("bandwidth")
        rows.append(
            [
                ABSENT if index is None else str(index + 1),
                show_size(as_pair(bandwidth)) if bandwidth else ABSENT,
                _count(steps),
                _count(images),
                ABSENT if epochs is None else f"{epochs:.3g}",
                ABSENT if seconds is None else duration(seconds),
                _count(images / seconds) if images is not None and seconds else ABSENT,
                f"{inside[0]['loss']:.4f}",
                f"{last['loss']:.4f}",
            ]
        )
        before = last
    return rows


def duration(seconds: float) -> str:
    """`7 s`, `12 min 5 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _since(before: dict[str, Any], now: dict[str, Any], key: str) -> float | None:
    end = number(now.get(key))
    return None if end is None else end - (number(before.get(key)) or 0.0)


def _count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def differences(histories: Sequence[History]) -> Table:
    """Keys that differ between the recipes, those that change the result first."""
    found = differing_keys([history.recipe for history in histories])
    rows = [[d.key + (" (no effect on the result)" if d.may_change else ""), *d.values] for d in found]
    return Table(["key", *(history.name for history in histories)], rows)


class Difference(NamedTuple):
    """A key that is not the same in all recipes."""

    key: str
    values: list[str]
    """One per recipe, as YAML's flow style writes it."""
    may_change: bool
    """Whether it never changes the trained weights."""


def differing_keys(recipes: Sequence[BaseModel]) -> list[Difference]:
    """Keys whose values differ, in the order of the recipes' keys, those that change the result first.

    The run folder is left out, because it always differs.
    """
    flat = [_flat(recipe) for recipe in recipes]
    found = []
    for key in dict.fromkeys(key for values in flat for key in values):
        values = [values[key][0] if key in values else ABSENT for values in flat]
        # A key that one component has and leaves unset, and another lacks, says nothing.
        if len(set(values)) > 1 and not set(values) <= {"null", ABSENT} and key != "output":
            may_change = all(values[key][1] for values in flat if key in values)
            found.append(Difference(key, values, may_change))
    return sorted(found, key=lambda difference: difference.may_change)


def _flat(config: BaseModel, prefix: str = "", may_change: bool = False) -> dict[str, tuple[str, bool]]:
    """`section.key` to (value, whether it never changes the trained weights), sections opened up."""
    found: dict[str, tuple[str, bool]] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        inside = may_change or may_change_on_resume(type(config), name)
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
