"""Ways from an encoder to a classifier, with few and many labels: run each, append it, print the table.

    python tools/study_labels.py tools/studies/labels/study.yaml init.cifar10=RUN root.cifar10=FOLDER ...
        [--only NAME ...] [--table]

The file names data sets, each with the settings of every command on it, shares of the labels with the passes
over them, and arms: a command, its recipe and its settings. Stop it at any time: what is recorded is not run
again, and a run that was stopped resumes. The seed draws the labels, so that arms of one seed have the same
ones. `--table` prints mean and standard deviation over the seeds, and the difference from the first arm
paired by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from study_file import recorded

from etpp_ssl.config import Config
from etpp_ssl.files import append_line
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.run_state import LIBRARIES


class Arm(Config):
    """One way to a classifier."""

    number: str
    """The result that counts."""
    command: str
    """`finetune` or `probe`."""
    recipe: dict[str, str]
    """By data set; the arm is run on these."""
    overrides: tuple[str, ...] = ()
    init: bool = True
    """Whether it starts from the encoder."""


class Labels(Config):
    """Some of a data set's labels."""

    overrides: tuple[str, ...]
    passes: float
    """Equivalent epochs of fine-tuning."""
    seeds: tuple[int, ...]
    arms: tuple[str, ...] | None = None
    """None for all."""


class LabelStudy(Config):
    """What the YAML file holds."""

    common: dict[str, tuple[str, ...]]
    """Settings of every command, by data set."""
    labels: dict[str, dict[str, Labels]]
    """By data set, by name."""
    arms: dict[str, Arm] = Field(min_length=1)


def runs_of(study: LabelStudy) -> Iterator[tuple[str, str, str, int]]:
    """Data set, labels, arm and seed of every run: all arms of one seed together, first seeds first."""
    ranked = [
        (rank, dataset, name, arm, seed)
        for dataset, parts in study.labels.items()
        for name, part in parts.items()
        for rank, seed in enumerate(part.seeds)
        for arm in part.arms or study.arms
        if dataset in study.arms[arm].recipe
    ]
    for _, dataset, name, arm, seed in sorted(ranked, key=lambda run: run[0]):
        yield dataset, name, arm, seed


def run(study: LabelStudy, file: Path, key: str, places: dict[str, str]) -> dict[str, Any]:
    """Run one command to its end, and describe it.

    Raises:
        RuntimeError: if it fails.
    """
    dataset, name, arm_name, seed = key.split("/")
    arm, part = study.arms[arm_name], study.labels[dataset][name]
    folder = RunFolder(Path("runs") / f"study_{file.parent.name}" / key.replace("/", "-"))
    settings = [*study.common[dataset], *part.overrides, *arm.overrides, seed.replace("seed", "seed=")]
    if arm.command == "finetune":
        settings.append(f"budget_epochs={part.passes:g}")
    here = [f"data.root={places[f'root.{dataset}']}", f"output={folder.path}"]
    if arm.init:
        here.append(f"init={places[f'init.{dataset}']}")
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    resumed = folder.path.exists()
    began = time.monotonic()
    with folder.path.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "etpp_ssl", arm.command, arm.recipe[dataset], *settings, *here]
        job = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(job.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{key} ended with {code}, see {log.name}")
    probes = folder.path / "report" / "probes.jsonl"
    rows = recorded(probes) if arm.command == "probe" else folder.metrics()
    return {
        "key": key,
        "top1": [row[arm.number] for row in rows if arm.number in row][-1],
        "seconds": time.monotonic() - began,
        # Of a run that was stopped, the first part's are not known.
        "cpu_seconds": None if resumed else usage.ru_utime + usage.ru_stime,
        "settings": settings,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {library: version(library) for library in LIBRARIES},
    }


def table(study: LabelStudy, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each data set and its labels, a column for each arm."""
    newest = {row["key"]: row for row in rows}
    arms = list(study.arms)
    lines = [f"| labels | passes | {' | '.join(arms)} |", f"|---|---|{'---|' * len(arms)}"]
    for dataset, parts in study.labels.items():
        for name, part in parts.items():
            found = {
                arm: {s: r for s in part.seeds if (r := newest.get(f"{dataset}/{name}/{arm}/seed{s}"))}
                for arm in arms
            }
            first = found[arms[0]]
            cells = [cell(found[arm], first if arm != arms[0] else {}) for arm in arms]
            lines.append(f"| {dataset}, {name} | {part.passes:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(runs: dict[int, dict[str, Any]], first: dict[int, dict[str, Any]]) -> str:
    """Top-1 over the seeds, its difference from the first arm, and the CPU time where it is known."""
    if not runs:
        return ""
    gains = [run["top1"] - first[seed]["top1"] for seed, run in runs.items() if seed in first]
    timed = [run["cpu_seconds"] / 60 for run in runs.values() if run["cpu_seconds"] is not None]
    minutes = f", {statistics.mean(timed):.1f} min" if timed else ""
    difference = f" ({spread(gains, '+')})" if gains else ""
    return f"{spread([run['top1'] for run in runs.values()])}{difference}{minutes}"


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and standard deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a study file")
    parser.add_argument("places", nargs="*", help="init.DATASET=RUN and root.DATASET=FOLDER")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="runs with this in their name"
    )
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    options = parser.parse_intermixed_args()
    study = LabelStudy.model_validate(yaml.safe_load(options.study.read_text(encoding="utf-8")))
    results = options.study.with_suffix(".jsonl")
    places = dict(text.split("=", 1) for text in options.places)
    for dataset, name, arm, seed in () if options.table else runs_of(study):
        key = f"{dataset}/{name}/{arm}/seed{seed}"
        done = any(row["key"] == key for row in recorded(results))
        if done or f"root.{dataset}" not in places or not any(text in key for text in options.only):
            continue
        row = run(study, options.study, key, places)
        append_line(results, json.dumps(row))
        print(f"{key}: {row['top1']:.2f} % in {row['seconds']:.0f} s", flush=True)
    print(table(study, recorded(results)))


if __name__ == "__main__":
    main()
