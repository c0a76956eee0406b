"""Results of probes and evaluations, under the settings and on the images that they are of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etpp_ssl.evaluation.measured_on import training_mark
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.report.history import History, number, probe_keys
from etpp_ssl.report.markup import Table

LONGEST_LABEL = 60
IN_TRAINING, BY_PROBE, BY_EVALUATE = "during training", "by etpp probe", "by etpp evaluate"
_BEST = re.compile(r"(top1|heldout_loss)$")
"""Keys whose best value a summary shows; it shows the last value of keys that it does not know."""
_NOT_IN_SUMMARY = re.compile(
    r"(holdout_top1|top5|_k|_temperature|_base_lr|_weight_decay|mean_recall|calibration_error|(eval|linear)_loss)$"
)
"""Settings that a probe has chosen, and what stands beside the accuracy."""
IMAGES = ("split", "root", "holdout", "data", "num_images", "fingerprint")
"""Settings that tell images apart, the most telling first."""
_BESIDE_SETTINGS = {"every_steps", "step", "weights", "trained_on"}


class Measured(NamedTuple):
    """One row of results."""

    when: str
    weights: str
    """The step of the run's own weights, or what other weights were read from."""
    is_own: bool
    settings: dict[str, str]
    """Of the protocol and of the images; `name` is the probe's."""
    mark: str
    """What has to be said of numbers on training images; empty for others."""
    values: dict[str, float]

    @property
    def settings_text(self) -> str:
        """All settings in one line, which tells protocols apart."""
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())


class ResultTable(NamedTuple):
    """Results of a run that were found in one way."""

    heading: str
    table: Table
    settings: dict[str, str]
    """What the table's labels stand for: too long for a cell."""


def measured(history: History) -> list[Measured]:
    """All results of a run."""
    in_training = _protocol_of(history.recipe)
    rows = [_measured(IN_TRAINING, row, in_training) for row in history.probes]
    rows += [_measured(BY_PROBE, row, row.get("protocol")) for row in history.later_probes]
    for found in history.folder.evaluations():
        # Settings are numbers, too (`crop_pct`), but no results.
        weights = {key: found["protocol"][key] for key in ("step", "init") if key in found["protocol"]}
        row = {**weights, **found["numbers"], "data": found.get("data")}
        rows.append(_measured(BY_EVALUATE, row, {"name": "evaluate", **found["protocol"]}))
    return rows


def _protocol_of(recipe: Recipe | FinetuneRecipe) -> dict[str, Any]:
    """That of the probes or evaluations during training, in the words of later ones."""
    if isinstance(recipe, Recipe):
        return recipe.probe.model_dump()
    return {
        "name": "evaluate",
        "split": recipe.evaluate.split,
        "image_size": recipe.size,
        "crop_pct": recipe.data.crop_pct,
        "precision": recipe.precision,
    }


def _measured(when: str, row: dict[str, Any], protocol: object) -> Measured:
    data = row["data"] if isinstance(row.get("data"), dict) else {}
    settings = {**(protocol if isinstance(protocol, dict) else {}), **data}
    return Measured(
        when,
        f"{row['step']:,}" if "step" in row else str(row.get("init")),
        "step" in row,
        {
            key: _written(value)
            for key, value in settings.items()
            if value is not None and key not in _BESIDE_SETTINGS
        },
        training_mark(data),
        {key: value for key in probe_keys([row]) if (value := number(row[key])) is not None},
    )


def result_tables(histories: Sequence[History]) -> list[ResultTable]:
    """The results of each run, by the way in which they were found."""
    everything = [(history.name, measured(history)) for history in histories]
    label_of = _labels([row for _, rows in everything for row in rows])
    found = []
    for name, of_run in everything:
        for when in (IN_TRAINING, BY_PROBE, BY_EVALUATE):
            rows = [row for row in of_run if row.when == when]
            keys = list(dict.fromkeys(key for row in rows for key in row.values))
            if not keys:
                continue
            head = ["step" if all(row.is_own for row in rows) else "weights", "protocol", *keys]
            cells = [[row.weights, label_of(row), *(_cell(row, key) for key in keys)] for row in rows]
            folded = {label_of(row): row.settings_text for row in rows}
            found.append(ResultTable(f"{name}, {when}", Table(head, cells, "results"), folded))
    return found


def collapses(history: History) -> list[str]:
    """What is said of a classifier that has collapsed, by its newest rows and by `etpp evaluate`."""
    newest = [*history.rows[-1:], *history.probes[-1:], *history.folder.evaluations()]
    said = (row.get("collapse") for row in newest)
    return list(dict.fromkeys(text for text in said if isinstance(text, str)))


def best_results(histories: Sequence[History]) -> list[dict[str, str]]:
    """For each run the best value of each result under each protocol, by what it is of."""
    everything = [measured(history) for history in histories]
    label_of = _labels([row for rows in everything for row in rows])
    return [dict(_best_of([row for row in rows if row.is_own], label_of)) for rows in everything]


def _best_of(rows: list[Measured], label_of: Callable[[Measured], str]) -> Iterator[tuple[str, str]]:
    groups: dict[tuple[str, str], list[Measured]] = {}
    for row in rows:
        for key in row.values:
            if not _NOT_IN_SUMMARY.search(key):
                groups.setdefault((key, label_of(row)), []).append(row)
    for (key, label), members in groups.items():
        choose = min if "loss" in key else max
        last, is_known = members[-1], _BEST.search(key)
        best = choose(members, key=lambda row: row.values[key]) if is_known else last
        said = f"{best.values[key]:.4g} (step {best.weights})"
        if last.weights != best.weights:
            said += f"; last {last.values[key]:.4g} (step {last.weights})"
        # `knn_top1` says already that it is of knn.
        name = members[0].settings.get("name", "probe")
        more = label.removeprefix(name) if key.startswith(f"{name}_") else f", {label}"
        yield f"{'best' if is_known else 'last'} {key}{more}", said


def _labels(rows: Sequence[Measured]) -> Callable[[Measured], str]:
    """A short name of each protocol: the probe's, and what tells it from others of that name."""
    protocols: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        protocols.setdefault(row.settings.get("name", "probe"), {})[row.settings_text] = row.settings
    labels: dict[str, str] = {}
    for name, found in protocols.items():
        labels |= _labels_of(name, found)
    return lambda row: labels[row.settings_text] + (f", {row.mark}" if row.mark else "")


def _labels_of(name: str, protocols: dict[str, dict[str, str]]) -> dict[str, str]:
    """From the text of each protocol of a name to its label."""
    keys = dict.fromkeys(key for settings in protocols.values() for key in settings)
    differing = [key for key in keys if len({s.get(key) for s in protocols.values() if key in s}) > 1]
    shown = [key for key in differing if key not in IMAGES]

    def parts(settings: dict[str, str]) -> str:
        told = [key for key in shown if settings.get(key) and (key, settings[key]) != ("holdout", "0")]
        return ", ".join(f"{key} {_short(key, settings[key])}" for key in told)

    for key in IMAGES:
        # No more about the images than it takes to tell them apart.
        if key in differing and len({parts(s) for s in protocols.values()}) < len(protocols):
            shown.append(key)
    labels: dict[str, str] = {}
    taken: dict[str, int] = {}
    for text, settings in protocols.items():
        label = f"{name} ({parts(settings)})" if parts(settings) else name
        label = label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"
        taken[label] = taken.get(label, 0) + 1
        labels[text] = f"{label} {taken[label]}" if taken[label] > 1 else label
    return labels


def _short(key: str, value: str) -> str:
    return Path(value).name if key == "root" else value[:8] if key == "fingerprint" else value


def _cell(row: Measured, key: str) -> str:
    return f"{row.values[key]:.5g}" if key in row.values else "–"


def _written(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
