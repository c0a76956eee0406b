"""What a probe is built from, what it offers, and the settings that probes share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from etpp_ssl.config import Config, may_change
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import Masker
from etpp_ssl.targets.base import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator


class ProbeStopped(Exception):
    """A signal asked a long probe to stop, and the probe has written the state that it resumes from."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by signal {signum} after step {step} of the probe")
        self.signum = signum
        self.step = step


def _never() -> AbstractContextManager[Callable[[], int]]:
    return nullcontext(lambda: 0)


def _silent(text: str) -> None:
    """Drop a message."""


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
    """How long to wait for a batch; see `etpp_ssl.data.loader.load_batches`."""
    folder: Path | None = None
    """Where a long probe keeps its state, so that an interrupted one can be resumed; None keeps none."""
    stop_signal: Callable[[], AbstractContextManager[Callable[[], int]]] = _never
    """Entered by a long probe that has a `folder`. Inside, signals are recorded instead of acted on, and the
    function that it yields returns the one that any process received, or 0. That is a collective, which
    every process must call at the same steps."""
    say: Callable[[str], None] = _silent
    """Told about the progress of a long probe."""


class Probe(Protocol):
    """Built once; each run yields named numbers about the model as it stands."""

    def run(self, model: MaskedAutoencoder) -> dict[str, float]:
        """Evaluate; the model's mode and weights are as before afterwards.

        Raises:
            ProbeStopped: by a long probe, if `ProbeContext.stop_signal` gave a signal.
        """


class ProbeConfig(Config):
    """Settings of any probe; its `build(context)` makes the probe."""

    name: str
    every_steps: int | None = may_change(None, ge=1)
    """Optimizer steps between probes during pre-training; None probes at the end only."""


class LabelledConfig(ProbeConfig):
    """Settings of a probe on labelled images: on the encoder as it stands, unmasked, at full resolution."""

    num_train: int | None = Field(default=None, ge=1)
    """Keyed draw of training images; None takes all."""
    num_eval: int | None = Field(default=None, ge=1)
    """Keyed draw of evaluation images; None takes all."""
