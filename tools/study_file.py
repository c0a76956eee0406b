"""A study file: which runs, of which arms, with which seeds, evaluated how; and the results so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from etpp_ssl.config import Config


class Evaluation(Config):
    """Numbers of a trained encoder, by a probe or by fine-tuning."""

    numbers: dict[str, str] = Field(min_length=1)
    """Columns of the table, and the keys of the results behind them."""
    probe: tuple[str, ...] | None = None
    """Overrides of `etpp probe`."""
    finetune: str | None = None
    """A recipe, trained from the run's weights."""
    overrides: tuple[str, ...] = ()
    """Of the fine-tuning."""

    @model_validator(mode="after")
    def _one_way(self) -> Evaluation:
        if (self.probe is None) == (self.finetune is None):
            raise ValueError("an evaluation has either probe or finetune")
        return self


class Arm(Config):
    """Runs that differ in budget and seed only."""

    overrides: tuple[str, ...]
    seeds: dict[str, tuple[int, ...]]
    """For each share of the full budget, written as `1` or `1/1.5`."""
    evaluate: tuple[str, ...] | dict[str, tuple[str, ...]] | None = None
    """Names of evaluations, for all shares or for each; None for all evaluations."""
    control: str | None = None
    """The arm that its differences are from; None for the study's baseline."""
    original: bool = False
    """Trained by `original_pretrain.py`."""

    @model_validator(mode="after")
    def _shares(self) -> Arm:
        if isinstance(self.evaluate, dict) and self.evaluate.keys() != self.seeds.keys():
            raise ValueError(
                f"evaluate has the shares {sorted(self.evaluate)}, but seeds has {sorted(self.seeds)}"
            )
        return self

    def evaluations(self, share: str) -> tuple[str, ...] | None:
        """Names of the evaluations of its runs of one share; None for all."""
        return self.evaluate[share] if isinstance(self.evaluate, dict) else self.evaluate


class StudyFile(Config):
    """What the YAML file holds."""

    recipe: str
    baseline: str
    """The arm that others are compared with, unless they name a control of their own."""
    budget_epochs: float = Field(gt=0)
    """The full budget, in equivalent epochs."""
    common: tuple[str, ...]
    """Overrides of all runs."""
    finetune_common: tuple[str, ...]
    """Overrides of all fine-tunings."""
    arms: dict[str, Arm]
    evaluate: dict[str, Evaluation]

    @model_validator(mode="after")
    def _names(self) -> StudyFile:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm")
        for name, arm in self.arms.items():
            if arm.control is not None and arm.control not in self.arms:
                raise ValueError(f"control {arm.control!r} of arm {name!r} is no arm")
            named = {other for share in arm.seeds for other in arm.evaluations(share) or ()}
            if unknown := named - self.evaluate.keys():
                raise ValueError(f"arm {name!r} has unknown evaluations: {sorted(unknown)}")
        return self


@dataclass(frozen=True)
class Entry:
    """One run of a study."""

    arm: str
    share: str
    """Of the full budget, as the study file has it."""
    seed: int
    overrides: tuple[str, ...]
    evaluations: tuple[str, ...]
    original: bool

    @property
    def key(self) -> str:
        """What a result is found by, and the run folder's name."""
        return f"{self.arm}-{self.share.replace('/', 'over')}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study file, laid out in runs."""

    recipe: str
    finetune_common: tuple[str, ...]
    entries: tuple[Entry, ...]
    """First seeds of all arms first."""
    evaluations: dict[str, Evaluation]
    results: Path
    controls: dict[str, str]
    """Of each arm, the arm that its differences are from."""
    output: Path
    """Where the run folders are."""

    @property
    def numbers(self) -> list[str]:
        """Names of all numbers, in the order of the study file."""
        return [name for evaluation in self.evaluations.values() for name in evaluation.numbers]

    def done(self, rows: Sequence[dict[str, Any]]) -> set[str]:
        """Keys of the entries whose newest result has all numbers that the study file asks for."""
        newest = {row["key"]: row["numbers"].keys() for row in rows}
        wanted = {
            entry.key: {column for name in entry.evaluations for column in self.evaluations[name].numbers}
            for entry in self.entries
        }
        return {key for key, columns in wanted.items() if key in newest and columns <= newest[key]}


def load_study(file: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        file: YAML; see `StudyFile`.
        overrides: settings for every run and every fine-tuning.

    Raises:
        ValueError: for an unknown key, a missing one, or a wrong value.
    """
    read = StudyFile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    ranked = []
    for name, arm in read.arms.items():
        for share, seeds in arm.seeds.items():
            named = arm.evaluations(share)
            evaluations = tuple(read.evaluate) if named is None else named
            numerator, _, denominator = share.partition("/")
            epochs = read.budget_epochs * float(Fraction(numerator) / Fraction(denominator or "1"))
            for rank, seed in enumerate(seeds):
                budget = (f"budget_epochs={epochs:.6g}", f"seed={seed}")
                own = (*read.common, *arm.overrides, *overrides, *budget)
                ranked.append((rank, Entry(name, share, seed, own, evaluations, arm.original)))
    return Study(
        recipe=read.recipe,
        finetune_common=(*read.finetune_common, *overrides),
        entries=tuple(entry for _, entry in sorted(ranked, key=lambda pair: pair[0])),
        evaluations=read.evaluate,
        results=file.with_suffix(".jsonl"),
        controls={name: arm.control or read.baseline for name, arm in read.arms.items()},
        output=Path("runs") / f"study_{file.stem}",
    )


def recorded(results: Path) -> list[dict[str, Any]]:
    """All rows of a file so far; a last line that was cut short is left out."""
    rows = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
