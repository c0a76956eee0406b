"""A run's folder: its recipe, its log and its checkpoints.

    recipe.yaml                  the resolved recipe
    metrics.jsonl                one object per line
    plan.json                    the newest plan of a run with a budget in hours
    checkpoints/step-XXXXXXXX/   model.safetensors, optimizer.safetensors, state.json, and ema.safetensors
                                 where the run keeps a moving average of the weights; called
                                 .old-step-XXXXXXXX while another checkpoint of that step replaces it
    status.json                  whether the run is active, and its last message
    dumps/                       the steps that were not finite, ready to be reproduced
    .lock                        held by the process that trains
    report/probes.jsonl          what `etpp probe` found, one object per line
    report/evaluation/*/         what `etpp evaluate` found, for each split and data set
    export/, report/, embeddings/  written later, by other commands

`state.json` is written last and lists the sizes of the other files, so a checkpoint that was cut short is
recognised whatever the cause.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.files import read_text
from etpp_ssl.messages import shown
from etpp_ssl.recipe import FinetuneRecipe, Recipe, load_any
from etpp_ssl.run_state import RESUME_KEYS, check_state

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.json"
EVALUATION_FILE = "evaluation.json"
OLD = ".old-"
MAX_STATE_BYTES = 1 << 28
"""Of `state.json`, which names every unreadable image met."""
MAX_ROW_BYTES = 1 << 20


def read_object(file: Path, at_most: int) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: to read.
        at_most: bytes; a longer file is refused.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds something else.
    """
    try:
        content = json.loads(read_text(file, at_most))
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} does not hold an object")
    return content


def check_files(state: dict[str, Any]) -> None:
    """Check that `files` of a `state.json` lists a checkpoint's files, and nothing outside of its folder.

    Raises:
        ValueError: if not.
    """
    files = state.get("files")
    if not (isinstance(files, dict) and {MODEL_FILE, OPTIMIZER_FILE} <= files.keys()):
        raise ValueError(f"{STATE_FILE}: files does not list {MODEL_FILE} and {OPTIMIZER_FILE}")
    for name, size in files.items():
        if os.path.basename(name) != name or "\0" in name or type(size) is not int:
            raise ValueError(f"{STATE_FILE}: files lists {shown(name)}, which no checkpoint has")


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
            if state.keys() >= RESUME_KEYS.keys():
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
            ValueError: if it does not hold an object.
        """
        return read_object(self.path / STATE_FILE, MAX_STATE_BYTES)

    def model(self) -> dict[str, Tensor]:
        """The model's tensors, on the CPU."""
        tensors: dict[str, Tensor] = load_file(self.path / MODEL_FILE)
        return tensors

    def classes(self) -> list[str]:
        """A classifier's class names, in the order of its outputs; empty where it does not remember any."""
        return [str(name) for name in self.state().get("classes") or ()]

    @property
    def has_average(self) -> bool:
        """Whether the run keeps a moving average of its weights."""
        return (self.path / EMA_FILE).is_file()

    def average(self) -> dict[str, Tensor] | None:
        """The moving average of the model's tensors, on the CPU, or None where the run keeps none."""
        return load_file(self.path / EMA_FILE) if self.has_average else None

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
        self.probes_file = self.path / "report" / "probes.jsonl"
        self.features_folder = self.path / "report" / "features"
        self.trials_folder = self.path / "trials"

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
            raise UserError(f"{str(self.plan_file)!r} is not a plan: {reason}") from error

    def exists(self) -> bool:
        """Whether a run was started here."""
        return os.path.isfile(self.recipe_file)

    def recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            UserError: if this is not the folder of a pre-training run.
        """
        self._require()
        return Recipe.load(self.recipe_file)

    def any_recipe(self) -> Recipe | FinetuneRecipe:
        """The same for a run of any task.

        Raises:
            UserError: if this is not a run folder.
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
                # The run is active and has removed it, because it has a newer one.
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
            UserError: if this is not a run folder, or it has no checkpoint yet.
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
            raise UserError(f"{str(self.path)!r} is not a run folder: it {what}")

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`, each with a `step`; other lines, such as one cut short, are left out."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        with self.metrics_file.open("rb") as file:
            # A row has some hundred bytes; the parts of a longer line are not rows.
            while line := file.readline(MAX_ROW_BYTES):
                rows.append(parse_row(line))
        return [row for row in rows if row is not None]

    def evaluations(self) -> list[dict[str, Any]]:
        """What `etpp evaluate` has written, each with `protocol`, `numbers` and, since version 0.6, `data`.

        That of the run's own evaluation images comes first; files that cannot be read are left out.
        """
        found = []
        files = sorted(self.evaluation_folder.glob(f"*/{EVALUATION_FILE}"))
        # Up to version 0.5 there was one, whatever it was of.
        for file in files or [self.evaluation_folder / EVALUATION_FILE]:
            try:
                content = read_object(file, MAX_STATE_BYTES)
            except (OSError, ValueError):
                continue
            if isinstance(content.get("protocol"), dict) and isinstance(content.get("numbers"), dict):
                found.append(content)
        return found

    def later_probes(self) -> list[dict[str, Any]]:
        """Rows of `etpp probe`, of a step's weights or of other ones (`init`); broken lines are left out."""
        if not self.probes_file.is_file():
            return []
        rows = [_object(line) for line in self.probes_file.read_bytes().splitlines()]
        return [row for row in rows if type(row.get("step")) is int or isinstance(row.get("init"), str)]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line of `metrics.jsonl`, or None if it is not a whole row."""
    row = _object(line)
    return row if type(row.get("step")) is int else None


def _object(line: bytes) -> dict[str, Any]:
    """The object in a line of JSON; empty where there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
