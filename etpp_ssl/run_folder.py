"""What a run leaves on disk, as its readers see it: export, report and resume.

    recipe.yaml                  the resolved recipe
    metrics.jsonl                one object a line
    plan.json                    the steps of a run with a budget in hours, as its newest plan has them
    checkpoints/step-XXXXXXXX/   model.safetensors, optimizer.safetensors, state.json; with a moving
                                 average of the weights also ema.safetensors; for a moment called
                                 .old-step-XXXXXXXX, while another of the same step takes its place
    status.json                  whether it runs, and what it said last
    dumps/                       what repeats a step that was not finite
    .lock                        held by the process that trains
    export/, report/, embeddings/  written later

`state.json` is written last and lists the sizes of the other files, so a checkpoint that was cut short
is recognised whatever cut it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.files import read_text
from etpp_ssl.messages import shown
from etpp_ssl.recipe import FinetuneRecipe, Recipe, load_any
from etpp_ssl.weights.reading import load_weights as load_weights

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.json"
EVALUATION_FILE = "evaluation.json"
OLD = ".old-"
MAX_STATE_BYTES = 1 << 28
"""Of `state.json`, which names every unreadable image met."""
MAX_ROW_BYTES = 1 << 20
STATE_KEYS: dict[str, type] = {"environment": dict, "data": str, "state": dict}
"""What a run's `state.json` has beside `files`."""


def read_object(file: Path, at_most: int) -> dict[str, Any]:
    """The object that a JSON file of so many bytes holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds something else.
    """
    try:
        content = json.loads(read_text(file, at_most))
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no object")
    return content


def check_files(state: dict[str, Any]) -> None:
    """See that `files` of a `state.json` lists what a checkpoint has, and nothing outside of its folder.

    Raises:
        ValueError: if not.
    """
    files = state.get("files")
    if not (isinstance(files, dict) and {MODEL_FILE, OPTIMIZER_FILE} <= files.keys()):
        raise ValueError(f"{STATE_FILE}: files does not list {MODEL_FILE} and {OPTIMIZER_FILE}")
    for name, size in files.items():
        if os.path.basename(name) != name or "\0" in name or type(size) is not int:
            raise ValueError(f"{STATE_FILE}: files lists {shown(name)}, which no checkpoint has")


def check_state(state: dict[str, Any], step: int) -> None:
    """See that the content of `state.json` is what a run can go on from.

    Args:
        state: the content.
        step: of the checkpoint's folder.

    Raises:
        ValueError: naming the key that is missing or of another kind.
    """
    for key, kind in STATE_KEYS.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{STATE_FILE}: {key} is missing or damaged")
    try:
        checked = _TrainState.model_validate(state["state"])
        if checked.plan is not None:
            TimePlan.from_json(checked.plan)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(("state", *map(str, first["loc"])))
        raise ValueError(f"{STATE_FILE}: {key} is damaged ({first['msg']})") from error
    if checked.step != step:
        raise ValueError(f"{STATE_FILE} is of step {checked.step}, not {step}")


class _TrainState(BaseModel):
    """`train.state.TrainState` as JSON, as far as a damaged one would show; it may hold more."""

    step: int = Field(ge=0)
    loss_sum: float
    part_sums: dict[str, float] = {}
    loss_steps: int = Field(ge=0)
    seconds: float = Field(ge=0)
    elapsed: float = Field(default=0.0, ge=0)
    plan: dict[str, Any] | None = None
    num_skipped: int = Field(default=0, ge=0)
    num_rewinds: int = Field(default=0, ge=0)
    lr_factor: float = Field(default=1.0, gt=0)
    bad_images: list[tuple[int, str]]


class Checkpoint:
    """One checkpoint folder.

    Args:
        path: `.../checkpoints/step-XXXXXXXX`; the number is that of finished optimizer steps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = int(path.name.removeprefix(OLD).removeprefix("step-"))

    def fault(self) -> str | None:
        """Why it cannot be read, or None if it is whole."""
        try:
            state = self.state()
            check_files(state)
            if state.keys() >= STATE_KEYS.keys():
                check_state(state, self.step)
            for name, size in state["files"].items():
                found = (self.path / name).stat().st_size
                if found != size:
                    return f"{name} has {found:,} bytes instead of {size:,}"
                with safe_open(self.path / name, framework="pt") as file:
                    file.keys()
        except (OSError, ValueError) as error:
            return " ".join((getattr(error, "strerror", None) or str(error)).split())
        except SafetensorError as error:
            return f"{name} is damaged ({error})"
        return None

    def state(self) -> dict[str, Any]:
        """The content of `state.json`.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it holds no object.
        """
        return read_object(self.path / STATE_FILE, MAX_STATE_BYTES)

    def model(self) -> dict[str, Tensor]:
        """The model's tensors, on the CPU."""
        tensors: dict[str, Tensor] = load_file(self.path / MODEL_FILE)
        return tensors

    def average(self) -> dict[str, Tensor] | None:
        """The moving average of the model's tensors, on the CPU, or None where the run keeps none."""
        file = self.path / EMA_FILE
        return load_file(file) if file.is_file() else None

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors, on the CPU, as `parameter.slot`."""
        tensors: dict[str, Tensor] = load_file(self.path / OPTIMIZER_FILE)
        return tensors


class RunFolder:
    """Paths of a run, and its newest whole checkpoint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.plan_file = self.path / "plan.json"
        self.status_file = self.path / "status.json"
        self.dump_folder = self.path / "dumps"
        self.checkpoint_folder = self.path / "checkpoints"
        self.evaluation_folder = self.path / "report" / "evaluation"

    def plan(self) -> TimePlan | None:
        """The newest plan of a run with a budget in hours, or None where it has none.

        Raises:
            UserError: if it cannot be read.
        """
        if not os.path.isfile(self.plan_file):
            return None
        try:
            return TimePlan.from_json(read_object(self.plan_file, MAX_STATE_BYTES))
        except (OSError, ValueError) as error:
            reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
            raise UserError(f"{str(self.plan_file)!r} is no plan: {reason}") from error

    def exists(self) -> bool:
        """Whether a run was started here."""
        return os.path.isfile(self.recipe_file)

    def recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            UserError: if this is no folder of a pre-training run.
        """
        self._require()
        return Recipe.load(self.recipe_file)

    def any_recipe(self) -> Recipe | FinetuneRecipe:
        """The same for a run of any task.

        Raises:
            UserError: if this is no run folder.
        """
        self._require()
        return load_any(self.recipe_file)

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, newest first, whole or not."""
        if not os.path.isdir(self.checkpoint_folder):
            return []
        # An old one sorts before the one that has taken its place.
        names = sorted(path.name for path in self.checkpoint_folder.iterdir())
        found = [
            Checkpoint(self.checkpoint_folder / name)
            for name in names
            if re.fullmatch(rf"({re.escape(OLD)})?step-\d{{8,}}", name)
        ]
        return sorted({c.step: c for c in found}.values(), key=lambda c: -c.step)

    def newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint, or None where there is none at all.

        Args:
            warn: told of every damaged one that is passed over.

        Raises:
            UserError: if there are checkpoints and all are damaged.
        """
        checkpoints = self.checkpoints()
        for checkpoint in checkpoints:
            fault = checkpoint.fault()
            if fault is None:
                return checkpoint
            if not checkpoint.path.exists():
                # A run that goes on has removed it meanwhile, since it has a newer one.
                return self.newest(warn)
            warn(f"checkpoint {checkpoint.path.name} is damaged ({fault}); falling back to the one before")
        if checkpoints:
            raise UserError(
                f"none of the {len(checkpoints)} checkpoints in {str(self.checkpoint_folder)!r} can be "
                f"read; remove that folder to start the run again"
            )
        return None

    def trained(self, warn: Callable[[str], None]) -> Checkpoint:
        """The newest whole checkpoint of a run that has one.

        Raises:
            UserError: if this is no run folder or it has no checkpoint yet.
        """
        self._require()
        checkpoint = self.newest(warn)
        if checkpoint is None:
            raise UserError(f"run {str(self.path)!r} has no checkpoint yet")
        return checkpoint

    def _require(self) -> None:
        if not self.exists():
            what = "has no recipe.yaml" if os.path.isdir(self.path) else "does not exist"
            what = "is a file" if os.path.isfile(self.path) else what
            raise UserError(f"{str(self.path)!r} is no run folder: it {what}")

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`, each with a `step`; what is none is left out: a last line cut short."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        with self.metrics_file.open("rb") as file:
            # A row has some hundred bytes; of a longer line the parts are no rows.
            while line := file.readline(MAX_ROW_BYTES):
                rows.append(parse_row(line))
        return [row for row in rows if row is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line of `metrics.jsonl`, or None for one that is no whole row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
