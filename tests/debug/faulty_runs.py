"""Runs whose steps are looked at, dumped or spoilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from etpp_ssl.train.dump import write_dump
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.nonfinite import on_gradients
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

    def judge(run: Run, loss: Tensor, norm: Tensor) -> None:
        step = run.state.step
        seen.losses[step], seen.norms[step] = float(loss), float(norm)
        if step in dumps_at:
            assert run.batches is not None
            seen.dumps[step] = write_dump(run, step, run.batches.kept[step])

    def act(run: Run) -> None:
        if dumps_at and run.state.step > max(dumps_at):
            raise KeyboardInterrupt
        if before is not None and run.state.step in before:
            with torch.no_grad():
                before[run.state.step](run.bare_model)

    on_gradients.append(judge)
    on_step_end.append(act)
    try:
        yield seen
    finally:
        on_gradients.remove(judge)
        on_step_end.remove(act)


def paint_images(folder: Path, *, bright: int, size: tuple[int, int] = (16, 24), count: int = 64) -> None:
    """Black images of two classes, and a white one."""
    for index in range(count):
        place = folder / "train" / ("first" if index < count // 2 else "second")
        place.mkdir(parents=True, exist_ok=True)
        value = 255 if index == bright else 0
        Image.new("RGB", size[::-1], (value,) * 3).save(place / f"{index:02d}.png")
