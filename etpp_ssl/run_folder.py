"""What a run leaves on disk, as its readers see it: export, report and resume.

    recipe.yaml                  the resolved recipe
    metrics.jsonl                one object a line
    plan.json                    the steps of a run with a budget in hours, as its newest plan has them
    checkpoints/step-XXXXXXXX/   model.safetensors, optimizer.safetensors, state.json; with a moving
                                 average of the weights also ema.safetensors
    export/, report/             written later

`state.json` is written last and lists the sizes of the other files, so a checkpoint that was cut short
is recognised whatever cut it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.model.state_dict import load_weights as load_weights
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.recipe_file import load_any_recipe, load_recipe

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
STATE_FILE = "state.json"
EVALUATION_FILE = "evaluation.json"


class Checkpoint:
    """One checkpoint folder.

    Args:
        path: `.../checkpoints/step-XXXXXXXX`; the number is that of finished optimizer steps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = int(path.name.removeprefix("step-"))

    def fault(self) -> str | None:
        """Why it cannot be read, or None if it is whole."""
        try:
            state = self.state()
            for name, size in state["files"].items():
                found = (self.path / name).stat().st_size
                if found != size:
                    return f"{name} has {found:,} bytes instead of {size:,}"
                with safe_open(self.path / name, framework="pt") as file:
                    file.keys()
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            return " ".join(f"{type(error).__name__}: {error}".split())
        except SafetensorError as error:
            return f"{name} is damaged ({error})"
        return None

    def state(self) -> dict[str, Any]:
        """The content of `state.json`."""
        state = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"{STATE_FILE} holds no object")
        return state

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
        if not self.plan_file.is_file():
            return None
        try:
            return TimePlan.from_json(json.loads(self.plan_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{str(self.plan_file)!r} is no plan: {error!r}") from error

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.recipe_file.is_file()

    def recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            UserError: if this is no folder of a pre-training run.
        """
        self._require()
        return load_recipe(self.recipe_file)

    def any_recipe(self) -> Recipe | FinetuneRecipe:
        """The same for a run of any task.

        Raises:
            UserError: if this is no run folder.
        """
        self._require()
        return load_any_recipe(self.recipe_file)

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints, newest first, whole or not."""
        if not self.checkpoint_folder.is_dir():
            return []
        folders = [
            path for path in self.checkpoint_folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)
        ]
        return sorted((Checkpoint(path) for path in folders), key=lambda c: -c.step)

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
            what = "has no recipe.yaml" if self.path.is_dir() else "does not exist"
            raise UserError(f"{str(self.path)!r} is no run folder: it {what}")

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`; a last line that was cut short is left out."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows
