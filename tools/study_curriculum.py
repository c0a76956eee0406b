"""Run a grid of pre-training runs, evaluate each, and append every result to a file as its run ends.

    python tools/study_curriculum.py tools/studies/cifar10.yaml data.root=... [--jobs 2] [--only ARM ...]
    python tools/study_report.py tools/studies/cifar10.yaml

A study file names a recipe, settings that all runs share, arms with their settings, the shares of the budget
and the seeds of each, and how to evaluate. Stop it at any time: the same command goes on, run folders resume
by themselves, and a run whose result is recorded is not run again, its folder there or not. First seeds of
all arms come first, so that a study that is stopped early has something to compare. With `--jobs 2` two runs
go side by side, each on its own half of the cores, so their wall times are comparable with each other, not
with those of another number of jobs. The CPU time, start and data workers included, is recorded, too: other
work on the machine changes it less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from etpp_ssl.engine.plan import plan_run
from etpp_ssl.engine.state import LIBRARIES
from etpp_ssl.recipe_file import load_recipe
from etpp_ssl.run_folder import RunFolder


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
        file: YAML; see `tools/studies/`.
        overrides: settings for every run and every fine-tuning.

    Raises:
        ValueError: for an unknown key or a missing one.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = {"recipe", "common", "finetune_common", "budget_epochs", "arms", "evaluate", "baseline"}
    if values.keys() ^ known:
        raise ValueError(f"{file}: these keys are unknown or missing: {sorted(values.keys() ^ known)}")
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
                ranked.append((rank, Entry(arm, str(share), seed, own, evaluations)))
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


class Stopped(Exception):
    """The study was asked to stop."""


class Runner:
    """Runs entries, each command in a process of its own on the cores that it was given.

    Args:
        study: what to run.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, entry: Entry, cores: list[int]) -> dict[str, Any]:
        """Train, evaluate, and append the result; what was done before an interruption is kept."""
        folder = RunFolder(self.study.output / entry.key)
        log = folder.path.with_name(f"{entry.key}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        overrides = [*entry.overrides, f"output={folder.path}"]
        times = folder.path.with_name(f"{entry.key}.times.jsonl")
        cpu_seconds = self._etpp(["pretrain", self.study.recipe, *overrides], cores, log, times)
        numbers: dict[str, float] = {}
        for evaluation in self.study.evaluations:
            if evaluation.name in entry.evaluations:
                numbers.update(self._evaluate(evaluation, entry, folder, cores, log))
        cost = {"cpu_seconds": cpu_seconds, "cores": len(cores)}
        row = {**describe(self.study.recipe, entry, folder), **cost, "numbers": numbers}
        with self._lock, self.study.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def _evaluate(
        self, evaluation: Evaluation, entry: Entry, folder: RunFolder, cores: list[int], log: Path
    ) -> dict[str, float]:
        if evaluation.finetune is not None:
            tuned = RunFolder(folder.path.with_name(f"{entry.key}-{evaluation.name}"))
            settings = (*self.study.finetune_common, *evaluation.overrides, f"seed={entry.seed}")
            self._etpp(
                ["finetune", evaluation.finetune, *settings, f"init={folder.path}", f"output={tuned.path}"],
                cores,
                log,
            )
            rows = tuned.metrics()
        else:
            # Named by what it is, so that an interrupted study does not repeat it.
            probes = folder.path / "report" / "probes.jsonl"
            if not any(evaluation.numbers.values() <= row.keys() for row in recorded(probes)):
                self._etpp(["probe", str(folder.path), *evaluation.probe], cores, log)
            rows = recorded(probes)
        found = [row for row in rows if evaluation.numbers.values() <= row.keys()][-1]
        return {name: float(found[key]) for name, key in evaluation.numbers.items()}

    def _etpp(self, arguments: list[str], cores: list[int], log: Path, times: Path | None = None) -> float:
        """Run a command to its end; returns the CPU time of all its runs that are noted in `times`."""
        if self.stopping.is_set():
            raise Stopped
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
        with log.open("ab") as file:
            job = subprocess.Popen(
                [sys.executable, "-m", "etpp_ssl", *arguments],
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(job.pid, cores)
            self._running.add(job)
            # Not `wait`: only this tells the time of this child and of the data workers that it waited for.
            _, status, usage = os.wait4(job.pid, 0)
            code = job.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(job)
        if times is not None:
            with times.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cpu_seconds": usage.ru_utime + usage.ru_stime}) + "\n")
        if self.stopping.is_set():
            raise Stopped
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"etpp {' '.join(arguments[:2])} ended with {code}: {' '.join(last)} ({log})")
        return sum(row["cpu_seconds"] for row in recorded(times)) if times is not None else 0.0

    def stop(self) -> None:
        """End what runs, with checkpoints."""
        self.stopping.set()
        for job in tuple(self._running):
            job.send_signal(signal.SIGTERM)


def describe(recipe: str, entry: Entry, folder: RunFolder) -> dict[str, Any]:
    """What a finished run was and cost."""
    plan = plan_run(load_recipe(recipe, [*entry.overrides, f"output={folder.path}"]))
    last = [row for row in folder.metrics() if "loss" in row][-1]
    return {
        "key": entry.key,
        "arm": entry.arm,
        "share": entry.share,
        "seed": entry.seed,
        "overrides": [text for text in entry.overrides if not text.startswith("data.root=")],
        "steps": last["step"],
        "images_seen": last["images_seen"],
        "equivalent_epochs": last["equivalent_epochs"],
        "flops": plan.total_flops,
        "seconds": last["seconds"],
        "loss": last["loss"],
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def run_study(study: Study, entries: Sequence[Entry], jobs: int) -> list[str]:
    """Run what is not recorded; returns what failed, one sentence each."""
    runner, failures = Runner(study), []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    size = max(1, len(cores) // jobs)
    free: SimpleQueue[list[int]] = SimpleQueue()
    for job in range(jobs):
        free.put(cores[job * size : (job + 1) * size] or cores[:1])

    def one(entry: Entry) -> None:
        share = free.get()
        try:
            row = runner.run(entry, share)
            shown = ", ".join(f"{name} {value:.2f}" for name, value in row["numbers"].items())
            print(f"{entry.key}: {shown} ({row['seconds']:.0f} s of training)", flush=True)
        except Stopped:
            pass
        except (RuntimeError, OSError, IndexError) as error:
            failures.append(f"{entry.key}: {error}")
            print(f"{entry.key} failed: {error}", flush=True)
        finally:
            free.put(share)

    signal.signal(signal.SIGTERM, lambda *_: runner.stop())
    signal.signal(signal.SIGINT, lambda *_: runner.stop())
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, entries))
    if runner.stopping.is_set():
        failures.append("stopped; the same command goes on")
    return failures


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a study file")
    parser.add_argument("overrides", nargs="*", help="settings for every run, for instance data.root=...")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="only these arms")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    options = parser.parse_intermixed_args()

    study = load_study(options.study, options.overrides)
    done = {row["key"] for row in recorded(study.results)}
    chosen = [entry for entry in study.entries if not options.only or entry.arm in options.only]
    for entry in chosen if options.list else ():
        print(f"{'done' if entry.key in done else 'open'}  {entry.key}")
    if options.list:
        return
    failures = run_study(study, [entry for entry in chosen if entry.key not in done], options.jobs)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
