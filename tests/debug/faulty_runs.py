"""Runs whose steps are looked at, dumped or spoilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from etpp_ssl.train import nonfinite
from etpp_ssl.train.dump import write_dump
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.nonfinite import NonFiniteCheck
from etpp_ssl.train.run import Run

Act = Callable[[Any], None]


@dataclass
class Seen:
    """What a run itself had at the steps that it judged."""

    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    dumps: dict[int, Path | None] = field(default_factory=dict)


@contextmanager
def watched(*, dumps_at: Sequence[int] = (), before: dict[int, Act] | None = None) -> Iterator[Seen]:
    """Runs that note losses and gradient norms, dump healthy steps, and whose model is changed at times.

    Args:
        dumps_at: steps to dump whatever they are like; the last one ends the run.
        before: what to do with the model before a step.
    """
    seen = Seen()
    real_finite, real_whole = NonFiniteCheck._finite, nonfinite._whole
    judged = -1

    def finite(self: NonFiniteCheck) -> Tensor:
        nonlocal judged
        judged = self.run.state.step
        seen.losses[judged] = float(self.meter.step_loss())
        passed = real_finite(self)
        if judged in dumps_at:
            seen.dumps[judged] = write_dump(self.run, judged, self.batches.kept[judged])
        return passed

    def whole(norm: Tensor) -> Tensor:
        seen.norms[judged] = float(norm)
        return real_whole(norm)

    def act(run: Run) -> None:
        if dumps_at and run.state.step > max(dumps_at):
            raise KeyboardInterrupt
        if before is not None and run.state.step in before:
            with torch.no_grad():
                before[run.state.step](run.bare_model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NonFiniteCheck, "_finite", finite)
        patch.setattr(nonfinite, "_whole", whole)
        on_step_end.append(act)
        try:
            yield seen
        finally:
            on_step_end.remove(act)


def paint_images(folder: Path, *, bright: int, size: tuple[int, int] = (16, 24), count: int = 64) -> None:
    """Black images of two classes, and a white one."""
    for index in range(count):
        place = folder / "train" / ("first" if index < count // 2 else "second")
        place.mkdir(parents=True, exist_ok=True)
        value = 255 if index == bright else 0
        Image.new("RGB", size[::-1], (value,) * 3).save(place / f"{index:02d}.png")
