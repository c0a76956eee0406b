"""A study file: which runs, of which arms, with which seeds, evaluated how; and the results so far.

recipe: recipes/NAME.yaml
baseline: ARM                 the arm that others are compared with
budget_epochs: 4              the full budget, in equivalent epochs
common: [key=value]           overrides of all runs
finetune_common: [key=value]  overrides of all fine-tunings
arms:
  ARM:
    overrides: [key=value]
    seeds: {"1": [0, 1], "1/1.5": [0]}   for each share of the full budget
    evaluate: [NAME]                     of the evaluations below; all if left out
    original: true                       trained by original_pretrain.py; false if left out
evaluate:
  NAME: {numbers: {COLUMN: key of the result}, probe: [overrides of etpp probe]}
  NAME: {numbers: {COLUMN: key of the result}, finetune: RECIPE, overrides: [key=value]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

KEYS = {"recipe", "common", "finetune_common", "budget_epochs", "arms", "evaluate", "baseline"}


@dataclass(frozen=True)
class Evaluation:
    """Numbers of a trained encoder.

    `probe` are overrides of `etpp probe`; or `finetune` is a recipe, trained from the run's weights with
    `overrides`. `numbers` are names for the table, and the keys of the results behind them.
    """

    name: str
    numbers: dict[str, str]
    probe: tuple[str, ...] = ()
    finetune: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One run of a study."""

    arm: str
    share: str
    """Of the full budget, as the study file has it: `1`, `1/1.5`."""
    seed: int
    overrides: tuple[str, ...]
    evaluations: tuple[str, ...]
    original: bool = False
    """Whether the original's code trains it."""

    @property
    def key(self) -> str:
        """What a result is found by, and the run folder's name."""
        return f"{self.arm}-{self.share.replace('/', 'over')}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A study file."""

    recipe: str
    finetune_common: tuple[str, ...]
    entries: tuple[Entry, ...]
    evaluations: tuple[Evaluation, ...]
    results: Path
    baseline: str
    """The arm that others are compared with."""
    output: Path = field(default=Path("runs"))

    @property
    def numbers(self) -> list[str]:
        """Names of all numbers, in the order of the study file."""
        return [name for evaluation in self.evaluations for name in evaluation.numbers]


def load_study(file: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        file: YAML; see above.
        overrides: settings for every run and every fine-tuning.

    Raises:
        ValueError: for an unknown key or a missing one.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if values.keys() ^ KEYS:
        raise ValueError(f"{file}: these keys are unknown or missing: {sorted(values.keys() ^ KEYS)}")
    budget = Fraction(str(values["budget_epochs"]))
    ranked = []
    for arm, settings in values["arms"].items():
        evaluations = tuple(settings.get("evaluate", values["evaluate"]))
        if unknown := set(evaluations) - values["evaluate"].keys():
            raise ValueError(f"{file}: arm {arm} has unknown evaluations: {sorted(unknown)}")
        for share, seeds in settings["seeds"].items():
            numerator, _, denominator = str(share).partition("/")
            epochs = float(budget * Fraction(numerator) / Fraction(denominator or "1"))
            for rank, seed in enumerate(seeds):
                own = (*values["common"], *settings["overrides"], *overrides)
                own = (*own, f"budget_epochs={epochs:.6g}", f"seed={seed}")
                original = settings.get("original", False)
                ranked.append((rank, Entry(arm, str(share), seed, own, evaluations, original)))
    entries = [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]
    evaluations = tuple(
        Evaluation(
            name,
            how["numbers"],
            tuple(how.get("probe", ())),
            how.get("finetune"),
            tuple(how.get("overrides", ())),
        )
        for name, how in values["evaluate"].items()
    )
    return Study(
        recipe=values["recipe"],
        finetune_common=(*values["finetune_common"], *overrides),
        entries=tuple(entries),
        evaluations=evaluations,
        results=file.with_suffix(".jsonl"),
        baseline=values["baseline"],
        output=Path("runs") / f"study_{file.stem}",
    )


def recorded(results: Path) -> list[dict[str, Any]]:
    """All results so far; a last line that was cut short is left out."""
    rows = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
