"""What a run folder says about its run, be it finished, in progress or interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.cost import area_share
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import Checkpoint, RunFolder

NOT_PROBES = {
    "step",
    "probe_seconds",
    "evaluation_seconds",
    "seconds",
    "num_images",
    "num_unreadable",
}
"""Keys of a probe's row that are not results."""


@dataclass(frozen=True)
class History:
    """A run as a report reads it; lists are in the order of the steps."""

    name: str
    """Different from the names of the other runs in the report."""
    folder: RunFolder
    recipe: Recipe | FinetuneRecipe
    rows: list[dict[str, Any]]
    """Rows of `metrics.jsonl` with a loss."""
    probes: list[dict[str, Any]]
    """Rows of `metrics.jsonl` with a probe's results."""
    later_probes: list[dict[str, Any]]
    """Rows of `report/probes.jsonl`, with a `protocol` each."""
    checkpoints: list[Checkpoint]
    """The whole ones."""
    environment: dict[str, str]
    """Of the newest checkpoint; empty without one."""
    curriculum: Curriculum | None
    """None where the number of training images is not known; `notes` says why."""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, in sentences."""

    @property
    def steps_done(self) -> int:
        """Optimizer steps, by the log or the newest checkpoint."""
        logged = [row["step"] for row in self.rows[-1:]]
        return max([0, *map(int, logged), *(checkpoint.step for checkpoint in self.checkpoints)])

    @property
    def finished(self) -> bool | None:
        """Whether all steps are done; None where their number is not known."""
        return None if self.curriculum is None else self.steps_done >= self.curriculum.num_steps


def read_histories(paths: Sequence[str | Path], say: Callable[[str], None]) -> list[History]:
    """The runs in some folders, each once.

    Raises:
        UserError: if there are none, or one is not a run folder.
    """
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))
    if not folders:
        raise UserError("a report needs at least one run folder")
    for path in paths:
        RunFolder(path).any_recipe()
    return [
        _read_history(RunFolder(folder), name, say)
        for folder, name in zip(folders, distinct_names(folders), strict=True)
    ]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Folder names, each with as many parents as make it unique."""
    names = []
    for folder in folders:
        others = [other for other in folders if other != folder]
        length = 1
        while length < len(folder.parts) and any(
            other.parts[-length:] == folder.parts[-length:] for other in others
        ):
            length += 1
        names.append(str(Path(*folder.parts[-length:])))
    return names


def _read_history(folder: RunFolder, name: str, say: Callable[[str], None]) -> History:
    recipe = folder.any_recipe()
    notes: list[str] = []
    logged = [row for row in folder.metrics() if isinstance(row, dict) and isinstance(row.get("step"), int)]
    rows = [row for row in logged if number(row.get("loss")) is not None]
    if not rows:
        notes.append("nothing is logged yet")
    checkpoints = []
    for checkpoint in reversed(folder.checkpoints()):
        fault = checkpoint.fault()
        if fault is None:
            checkpoints.append(checkpoint)
        else:
            notes.append(f"checkpoint {checkpoint.path.name} is damaged ({fault}) and left out")
            say(notes[-1])
    if not checkpoints:
        notes.append("there is no checkpoint yet")
    curriculum = None
    try:
        # The log comes before the data, which may be large or on another machine.
        num_images = recipe.data.stated_images or _images_by_log(rows, recipe.size)
        if num_images is None:
            num_images = len(recipe.open_split("train"))
        curriculum = recipe.build_curriculum(num_images)
        plan = folder.plan()
        if plan is not None:
            curriculum = curriculum.laid_out(plan.segments)
    except UserError as error:
        notes.append(f"the stages are not known: {error}")
    return History(
        name=name,
        folder=folder,
        recipe=recipe,
        rows=rows,
        probes=[row for row in logged if number(row.get("loss")) is None and probe_keys([row])],
        later_probes=folder.later_probes(),
        checkpoints=checkpoints,
        environment=_environment(checkpoints),
        curriculum=curriculum,
        notes=notes,
    )


def number(value: Any) -> float | None:
    """A row's value if it is a finite number, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def probe_keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of probes' results, in the order they appear."""
    keys = (key for row in rows for key, value in row.items() if number(value) is not None)
    return [key for key in dict.fromkeys(keys) if key not in NOT_PROBES]


def _images_by_log(rows: list[dict[str, Any]], image_size: tuple[int, int]) -> int | None:
    """Images in the training set, from what the first stage cost; None if the log does not say."""
    for row in rows:
        epochs, bandwidth = number(row.get("equivalent_epochs")), row.get("bandwidth")
        if row.get("stage") == 0 and epochs and bandwidth and "images_seen" in row:
            at_full_size = float(row["images_seen"]) * area_share(bandwidth, image_size)
            return max(1, round(at_full_size / epochs))
    return None


def _environment(checkpoints: list[Checkpoint]) -> dict[str, str]:
    if not checkpoints:
        return {}
    try:
        found = checkpoints[-1].state().get("environment")
    except OSError:
        # A run in progress removes old checkpoints at any moment.
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
