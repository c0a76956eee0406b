"""What a probe is built from, and what it offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from accelerate import Accelerator

from etpp_ssl.data.augment import EvalView, Normalise
from etpp_ssl.data.images import ImageSource
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masker import Masker
from etpp_ssl.objective.base import Objective


@dataclass(frozen=True)
class ProbeContext:
    """A run, as a probe sees it."""

    accelerator: Accelerator
    open_split: Callable[[str], ImageSource]
    """From "train" or "eval" to its images."""
    view: EvalView
    normalise: Normalise
    objective: Objective
    masker: Masker
    seed: int
    num_workers: int


class Probe(Protocol):
    """Built once; each run yields named numbers about the model as it stands."""

    def run(self, model: MaskedAutoencoder) -> dict[str, float]:
        """Evaluate; the model's mode and weights are as before afterwards."""
