"""What a probe is built from, and what it offers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import Masker
from etpp_ssl.targets.base import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator


class ProbeStopped(Exception):
    """A long probe was asked to stop by a signal, and has written what it needs to go on."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by signal {signum} after step {step} of the probe")
        self.signum = signum
        self.step = step


def _never() -> AbstractContextManager[Callable[[], int]]:
    return nullcontext(lambda: 0)


def _silent(text: str) -> None:
    """Says nothing."""


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
    stall_seconds: float | None = None
    """How long to wait for a batch; see `etpp_ssl.data.loader.batch_loader`."""
    folder: Path | None = None
    """Where a long probe keeps its state, so that an interrupted one goes on; None keeps none."""
    stop_signal: Callable[[], AbstractContextManager[Callable[[], int]]] = _never
    """Entered by a long probe that has a `folder`: while it is, signals are noted instead of acted on, and
    what it gives returns the one that any process received, or 0. That is a collective, for every process
    to call at the same steps."""
    say: Callable[[str], None] = _silent
    """Told how a long probe comes along."""


class Probe(Protocol):
    """Built once; each run yields named numbers about the model as it stands."""

    def run(self, model: MaskedAutoencoder) -> dict[str, float]:
        """Evaluate; the model's mode and weights are as before afterwards.

        Raises:
            ProbeStopped: by a long probe, if `ProbeContext.stop_signal` gave a signal.
        """
