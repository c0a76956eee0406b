"""Memory of a soaked run's processes: samples, slopes, and whether it grows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

Verdict = Literal["steady", "undecided", "GROWS"]
QUANTITIES = ("rss", "anon", "pss")
SETTLE, EDGE = 20.0, 5.0
"""Seconds left out after a stage's first row of metrics, while its buffers grow, and before its last one:
rows lag behind, so that the next stage may have begun."""


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    stretch: str
    """Which launch of the run, as `reference` or `soaked 3`."""
    process: str
    """As `rank 0` or `rank 1 worker 2`; the torchrun process is the `launcher`."""
    pid: int
    seconds: float
    """Since the launch."""
    step: int
    """Of the newest row of metrics; -1 before this launch has logged one."""
    stage: int
    """Of that row."""
    rss: int
    """Resident bytes, those shared with other processes included."""
    pss: int | None
    """The same with each shared page divided by the number of processes that share it; None where the system
    does not say. Libraries count, so that it changes when another program that uses them comes or goes."""
    anon: int | None
    """The PSS of memory that is no file's. It jumps when Python's garbage collector first touches the objects
    that a rank shares with its forked workers: both then have their own."""


@dataclass(frozen=True)
class Fit:
    """A least-squares slope."""

    slope: float
    error: float
    """Its standard error, for residuals that follow each other as a first-order autoregression."""
    plain_error: float
    """The textbook's, for independent residuals."""
    num_points: int


@dataclass(frozen=True)
class Growth:
    """The slope of one process's memory within one stretch."""

    stretch: str
    process: str
    quantity: str
    """One of `QUANTITIES`."""
    minutes: float
    per_minute: Fit
    """MB (10^6 bytes) per minute."""
    per_1000_steps: Fit
    """MB per 1000 optimizer steps."""
    first_mb: float
    last_mb: float

    @property
    def judged(self) -> bool:
        """Whether growth counts: the others change without it, and within the bounds of the RSS."""
        return self.quantity == "rss"

    def verdict(self, limit_mb_per_hour: float) -> Verdict:
        """Whether it grows: by 2 standard errors more, or less, than the limit, or neither is certain."""
        slope, error = 60 * self.per_minute.slope, 60 * self.per_minute.error
        if slope - 2 * error > limit_mb_per_hour:
            return "GROWS"
        return "steady" if slope + 2 * error <= limit_mb_per_hour else "undecided"


def take(
    file: Path, stretch: str, seconds: float, place: tuple[int, int], named: Iterable[tuple[str, Any]]
) -> list[Sample]:
    """Sample processes and append the samples to a file, one JSON object a line.

    Args:
        file: where to.
        stretch: see `Sample`.
        seconds: since its launch.
        place: step and stage of the newest row of metrics.
        named: names and `psutil.Process`es; those that have ended are left out.
    """
    samples = []
    for name, process in named:
        try:
            memory = _memory(process)
        except (psutil.Error, OSError):
            continue
        samples.append(Sample(stretch, name, process.pid, round(seconds, 3), *place, *memory))
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(vars(sample)) + "\n" for sample in samples)
    return samples


def _memory(process: psutil.Process) -> tuple[int, int | None, int | None]:
    """RSS, PSS and the PSS of no file."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():
        return process.memory_info().rss, None, None
    lines = (line.split() for line in rollup.read_text().splitlines()[1:])
    size = {words[0]: 1024 * int(words[1]) for words in lines}
    if "Pss_Anon:" not in size:  # Before Linux 5.4.
        return size["Rss:"], size["Pss:"], None
    return size["Rss:"], size["Pss:"], size["Pss_Anon:"] + size["Pss_Shmem:"]


def fit_slope(x: Sequence[float], y: Sequence[float], groups: Sequence[int] | None = None) -> Fit:
    """Least squares with one slope and an intercept per group.

    Memory is the sum of past events, so that neighbouring residuals are alike and the textbook's error is too
    small: it is multiplied by sqrt((1 + r) / (1 - r)) for their correlation r at lag 1, which is corrected
    for its bias (Kendall, Biometrika 1954); the factor is bounded by sqrt(1.5 N), about a random walk's for N
    points. The slope of a random walk still lies beyond 2 such errors more often than 1 time in 20.

    Args:
        x, y: points in the order of time.
        groups: of each point; None is a single group.

    Returns:
        The fit; of too few points, or without spread in x, slope 0 and infinite errors.
    """
    labels = np.zeros(len(x), dtype=int) if groups is None else np.asarray(groups)
    dx, dy = np.array(x, dtype=float), np.array(y, dtype=float)
    kinds = np.unique(labels)
    for kind in kinds:
        dx[labels == kind] -= dx[labels == kind].mean()
        dy[labels == kind] -= dy[labels == kind].mean()
    spread, freedom = float(dx @ dx), len(dx) - len(kinds) - 1
    if freedom < 1 or spread == 0:
        return Fit(0.0, math.inf, math.inf, len(dx))
    slope = float(dx @ dy) / spread
    rest = dy - slope * dx
    plain = math.sqrt(float(rest @ rest) / freedom / spread)
    squares = float(rest @ rest)
    lag = float(rest[1:] @ rest[:-1]) / squares if squares else 0.0
    lag = min(max(lag + (2 + 4 * lag) / len(dx), 0.0), 1.0)
    allowance = math.sqrt((1 + lag) / (1 - lag + 4 / 3 / len(dx)))
    return Fit(slope, plain * max(1.0, allowance), plain, len(dx))


def growths(samples: Sequence[Sample], *, last_step: int, min_seconds: float) -> list[Growth]:
    """Slopes over the second half of each process's training within each stretch that is long enough.

    Training ends before `last_step`: a probe at the end has workers and memory of its own. A stage has its
    own intercept, because larger bandwidths need more.

    Args:
        samples: of any stretches, in the order of time.
        last_step: of the run.
        min_seconds: shortest half, without what `SETTLE` and `EDGE` leave out, that is fitted.
    """
    found = []
    training = [s for s in samples if 0 <= s.step < last_step and s.process != "launcher"]
    for stretch in dict.fromkeys(s.stretch for s in training):
        half = second_half([s for s in training if s.stretch == stretch])
        if not half or half[-1].seconds - half[0].seconds < min_seconds:
            continue
        for process in sorted({s.process for s in half}):
            own = [s for s in half if s.process == process]
            growing = (_growth(own, quantity) for quantity in QUANTITIES)
            found += [growth for growth in growing if growth is not None]
    return found


def second_half(samples: Sequence[Sample]) -> list[Sample]:
    """Those of one stretch from its middle on, without the beginnings and ends of stages."""
    if not samples:
        return []
    middle = (samples[0].seconds + samples[-1].seconds) / 2
    times: dict[int, list[float]] = {}
    for sample in samples:
        times.setdefault(sample.stage, []).append(sample.seconds)
    return [
        s
        for s in samples
        if s.seconds >= middle and times[s.stage][0] + SETTLE <= s.seconds <= times[s.stage][-1] - EDGE
    ]


def _growth(samples: Sequence[Sample], quantity: str) -> Growth | None:
    """Of one process, or None where the system does not say."""
    values = [getattr(sample, quantity) for sample in samples]
    if None in values:
        return None
    mega = [value / 1e6 for value in values]
    stages = [sample.stage for sample in samples]
    minutes = [sample.seconds / 60 for sample in samples]
    return Growth(
        stretch=samples[0].stretch,
        process=samples[0].process,
        quantity=quantity,
        minutes=minutes[-1] - minutes[0],
        per_minute=fit_slope(minutes, mega, stages),
        per_1000_steps=fit_slope([sample.step / 1000 for sample in samples], mega, stages),
        first_mb=mega[0],
        last_mb=mega[-1],
    )


def growth_table(found: Sequence[Growth], limit_mb_per_hour: float) -> list[str]:
    """Lines to print."""
    head = f"{'stretch':<11} {'process':<16} {'':<4} {'min':>5} {'first':>7} {'last MB':>8}"
    lines = [f"{head} {'MB/minute':>18} {'MB/1000 steps':>18}  verdict"]
    for growth in found:
        fits = (growth.per_minute, growth.per_1000_steps)
        slopes = [f"{fit.slope:+.3f} +- {fit.error:.3f}" for fit in fits]
        lines.append(
            f"{growth.stretch:<11} {growth.process:<16} {growth.quantity:<4} {growth.minutes:5.1f} "
            f"{growth.first_mb:7.1f} {growth.last_mb:8.1f} {slopes[0]:>18} {slopes[1]:>18}  "
            f"{growth.verdict(limit_mb_per_hour) if growth.judged else 'not judged'}"
        )
    return lines
