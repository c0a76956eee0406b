"""What a run remembers beside its weights, in the `state.json` of a checkpoint."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from etpp_ssl.curriculum.hours import TimePlan

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "etpp-ssl")
RESUME_KEYS: dict[str, type] = {"environment": dict, "data": str, "state": dict}
"""Of a `state.json`, beside `files`: what a resume needs."""


def _from_pairs(pairs: Any) -> Any:
    """The dict of a list of [number, name], as JSON has it; anything else is left to pydantic."""
    fits = isinstance(pairs, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], int) for pair in pairs
    )
    return dict(pairs) if fits else pairs


@dataclass
class TrainState:
    """Progress of a run: what it must remember beside its weights. Everything else follows from the step."""

    step: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps done."""
    loss_sum: float = 0.0
    """Sum of the steps' losses since the last logged row."""
    part_sums: dict[str, float] = field(default_factory=dict)
    """The same for the other losses that a target reports, by name."""
    loss_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in these sums."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Wall time spent on training steps."""
    elapsed: Annotated[float, Field(ge=0)] = 0.0
    """Wall time spent in all, including probes, checkpoints and the measuring of a budget in hours."""
    plan: TimePlan | None = None
    """The steps of a run with a budget in hours."""
    num_skipped: Annotated[int, Field(ge=0)] = 0
    """Steps left out because their loss or gradients were not finite."""
    num_rewinds: Annotated[int, Field(ge=0)] = 0
    """Returns to an earlier checkpoint for that reason."""
    lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """Multiplies the schedule's learning rate; lowered by each rewind."""
    first_step_learns: bool = True
    """Whether the first step's learning rate is above 0; False for a run that version 0.5 began."""
    bad_images: Annotated[dict[int, str], BeforeValidator(_from_pairs)] = field(default_factory=dict)
    """Unreadable images met so far: number in the data set, and name."""
    num_outside: Annotated[int, Field(ge=0)] = 0
    """Images loaded so far with values outside `data.range`, each time that they were."""
    num_without_data: Annotated[int, Field(ge=0)] = 0
    """Images replaced so far because they showed too little data, each time that they were."""
    streams: list[dict[str, Any] | None] = field(default_factory=list)
    """Each process's place in a stream, by rank; empty before the first batch, and for images that are
    addressed by index. A process keeps its own entry up to date; the others are of the last checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON to the bit."""
        plan = None if self.plan is None else self.plan.to_json()
        return {**vars(self), "plan": plan, "bad_images": sorted(self.bad_images.items())}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `to_json`; older versions wrote fewer keys, which get their defaults.

        Raises:
            ValueError: naming the first key that is missing or damaged.
        """
        for key in ("step", "loss_sum", "loss_steps", "seconds", "bad_images"):
            if key not in values:
                raise ValueError(f"state.{key} is missing")
        try:
            plan = None if values.get("plan") is None else TimePlan.from_json(values["plan"])
            # Version 0.1.0 did not write `elapsed`, version 0.5 not `first_step_learns`.
            old = {"elapsed": values["seconds"], "first_step_learns": False}
            return _train_states().validate_python({**old, **values, "plan": plan})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(("state", *map(str, first["loc"])))
            raise ValueError(f"{key} is damaged ({first['msg']})") from error


@cache
def _train_states() -> TypeAdapter[TrainState]:
    return TypeAdapter(TrainState)


def check_state(state: dict[str, Any], step: int) -> TrainState:
    """The progress in a `state.json`, checked together with what else a resume needs.

    Args:
        state: the content of the file.
        step: of the checkpoint's folder.

    Raises:
        ValueError: naming the key that is missing or damaged.
    """
    for key, kind in RESUME_KEYS.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"state.json: {key} is missing or damaged")
    try:
        progress = TrainState.from_json(state["state"])
    except ValueError as error:
        raise ValueError(f"state.json: {error}") from error
    if progress.step != step:
        raise ValueError(f"state.json is of step {progress.step}, not {step}")
    return progress


def environment(num_processes: int, device: torch.device, kernels: str) -> dict[str, str]:
    """What can change the last bits of a result: versions, threads, processes, device, kernels."""
    return {
        "python": platform.python_version(),
        **_versions(),
        "threads": str(torch.get_num_threads()),
        "processes": str(num_processes),
        "kernels": kernels,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


@cache
def _versions() -> dict[str, str]:
    """Of the libraries; read from their files, which no run changes."""
    return {name: version(name) for name in LIBRARIES}


def environment_changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, as `torch 2.8.0 -> 2.9.1`."""
    return [
        f"{key} {before.get(key, 'unknown')} -> {value}"
        for key, value in now.items()
        if before.get(key) != value
    ]
