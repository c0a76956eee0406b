"""What a run must remember beside its weights; everything else is a function of the step."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from etpp_ssl.curriculum.hours import TimePlan

LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "etpp-ssl")


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps done."""
    loss_sum: float = 0.0
    """Sum of the steps' losses since the last logged row."""
    part_sums: dict[str, float] = field(default_factory=dict)
    """The same of the losses that a target has beside the one that is minimised, by name."""
    loss_steps: int = 0
    seconds: float = 0.0
    """Wall time spent training so far."""
    elapsed: float = 0.0
    """Wall time spent so far, probes, checkpoints and the measuring of a budget in hours included."""
    plan: TimePlan | None = None
    """The steps of a run with a budget in hours."""
    num_skipped: int = 0
    """Steps left out because their loss or gradients were not finite."""
    num_rewinds: int = 0
    """Times that the run went back to a checkpoint for that reason."""
    lr_factor: float = 1.0
    """What the schedule's learning rate is multiplied by, lower after each rewind."""
    bad_images: dict[int, str] = field(default_factory=dict)
    """Unreadable images met so far: number in the data set, and name."""
    streams: list[dict[str, Any] | None] = field(default_factory=list)
    """Where each process stands in a stream, by rank; empty before the first batch, and for images that are
    addressed by index. A process keeps its own entry up to date; the others are of the last checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """A form that survives JSON to the bit."""
        return {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "part_sums": self.part_sums,
            "loss_steps": self.loss_steps,
            "seconds": self.seconds,
            "elapsed": self.elapsed,
            "plan": self.plan.to_json() if self.plan is not None else None,
            "num_skipped": self.num_skipped,
            "num_rewinds": self.num_rewinds,
            "lr_factor": self.lr_factor,
            "bad_images": sorted(self.bad_images.items()),
            "streams": self.streams,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `to_json`."""
        return cls(
            step=values["step"],
            loss_sum=values["loss_sum"],
            # Checkpoints of runs from before targets had parts lack it.
            part_sums=values.get("part_sums", {}),
            loss_steps=values["loss_steps"],
            seconds=values["seconds"],
            # Checkpoints of version 0.1.0 have neither.
            elapsed=values.get("elapsed", values["seconds"]),
            plan=TimePlan.from_json(values["plan"]) if values.get("plan") else None,
            # Neither have those before 0.4.0.
            num_skipped=values.get("num_skipped", 0),
            num_rewinds=values.get("num_rewinds", 0),
            lr_factor=values.get("lr_factor", 1.0),
            bad_images=dict(values["bad_images"]),
            # Checkpoints of version 0.3.0 lack it.
            streams=values.get("streams", []),
        )


def environment(num_processes: int, device: torch.device, kernels: str) -> dict[str, str]:
    """What can change the last bits of a result: versions, threads, processes, device, kernels."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "threads": str(torch.get_num_threads()),
        "processes": str(num_processes),
        "kernels": kernels,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def environment_changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, as `torch 2.8.0 -> 2.9.1`."""
    return [
        f"{key} {before.get(key, 'unknown')} -> {value}"
        for key, value in now.items()
        if before.get(key) != value
    ]
