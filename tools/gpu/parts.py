"""The parts of `tools/gpu_check.py`, and what each of them is given; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Figures = dict[str, float | int | str]
Cases = Iterator[tuple[str, Callable[[], Figures]]]
"""What a part yields: names of cases, and what runs them. A case is recorded before the next one begins."""


class Failed(Exception):
    """A figure is out of its bounds.

    Args:
        what: in a sentence.
        figures: those that were measured all the same.
    """

    def __init__(self, what: str, figures: Figures | None = None) -> None:
        super().__init__(what)
        self.figures = figures or {}


class Skipped(Exception):
    """Something is not there; the text says what."""


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    device: str
    """"cuda" or "cpu"."""
    smoke: bool
    """Whether tiny shapes will do."""
    folder: Path
    """For what a part writes; deleted afterwards."""
    original: Path | None = None
    """A clone of facebookresearch/mae."""
    images: Path | None = None
    """Imagenette: train/ and val/ with a folder for each class."""

    def needs_gpu(self) -> None:
        """Raises `Skipped` on a CPU."""
        if self.device == "cpu":
            raise Skipped("needs CUDA")


@dataclass(frozen=True)
class Part:
    """A function of a file of this folder that yields cases."""

    name: str
    file: str
    seconds: int
    """Time limit on a GPU."""
    what: str


PARTS = (
    Part("crop", "arithmetic", 60, "the low-frequency crop against float64, whatever TF32 and autocast say"),
    Part("hog", "arithmetic", 60, "histograms of oriented gradients against float64"),
    Part("masks", "arithmetic", 60, "masks, drop-path, erasing: the same bits as on a CPU"),
    Part("gradients", "arithmetic", 120, "loss and gradients of a step against float64, in each precision"),
    Part("attention", "kernels", 60, "fused and unfused attention against float64"),
    Part("compiled", "kernels", 240, "compiled blocks against eager ones at each stage"),
    Part("deterministic", "runs", 180, "the same bits twice, and after a kill and a resume"),
    Part("overflow", "runs", 60, "fp16: the loss scale comes down from an overflow"),
    Part("nonfinite", "runs", 90, "a NaN with the fused optimizer: skipped, stopped, at once and late"),
    Part("workers", "runs", 90, "pinned memory, and a data worker that dies"),
    Part("second", "runs", 90, "a second run in one process: its bits and the memory it finds"),
    Part("waits", "speed", 90, "steps that make the host wait, outside of rows and checkpoints"),
    Part("gaps", "speed", 90, "the loop without loading: time outside of kernels"),
    Part("steps", "speed", 480, "images/s of each stage against the original MAE and transformers' ViTMAE"),
    Part("memory", "room", 120, "the peak of each stage against what `etpp plan` estimates"),
    Part("largest", "room", 120, "the largest micro-batch of each stage"),
    Part("feeding", "feeding", 120, "images/s that a core loads against what a step takes"),
    Part("equal", "whole", 300, "curriculum against constant: wall time over computed cost, without loading"),
    Part("imagenette", "whole", 1500, "the same with real images and accuracies (needs --images)"),
    Part("quickstart", "whole", 180, "the quickstart's commands"),
)
"""In the order of a half-hour: what is wrong first, then how fast it is."""


def bounded(error: float, bound: float, **others: float | int | str) -> Figures:
    """An error below its bound, as figures.

    Raises:
        Failed: if it is not below, or NaN.
    """
    figures: Figures = {"error": error, "bound": bound, **others}
    if not error <= bound:
        raise Failed(f"error {error:.2g} is above {bound:.2g}", figures)
    return figures


def same(equal: bool, what: str, **others: float | int | str) -> Figures:
    """The figures of two results that must be equal.

    Raises:
        Failed: if they are not.
    """
    if not equal:
        raise Failed(f"{what} differ", others)
    return {"same bits": "yes", **others}
