"""Run a grid of pre-training runs, evaluate each, and append every result to a file as its run ends.

    python tools/study_curriculum.py tools/studies/cifar10.yaml data.root=... [--jobs 2] [--only NAME ...]
        [--original CLONE]
    python tools/study_report.py tools/studies/cifar10.yaml

A study file (see `study_file.py`) names a recipe, settings that all runs share, arms with their settings, the
shares of the budget and the seeds of each, and how to evaluate. Stop it at any time: the same command goes
on, run folders resume by themselves, and a run whose result is recorded is not run again, its folder there or
not, unless the study file has come to ask for a number that the result lacks. First seeds of all arms come
first, so that a study that is stopped early has something to compare.

With `--jobs 2` two runs go side by side, each on its own half of the cores: their wall times are comparable
with each other, not with those of another number of jobs. The CPU time, start and data workers included, is
recorded, too: other work on the machine changes it less. Arms that the original's code trains are left out
without `--original`, a clone of facebookresearch/mae.
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
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from study_file import Entry, Study, load_study, recorded
from torch.backends.cpu import get_cpu_capability

from etpp_ssl.files import append_line
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.run_state import LIBRARIES
from etpp_ssl.train.plan import plan_run


class Stopped(Exception):
    """The study was asked to stop."""


class Runner:
    """Runs entries, each command in a process of its own on the cores that it was given.

    Args:
        study: what to run.
        clone: of facebookresearch/mae, for the arms that need it.
    """

    def __init__(self, study: Study, clone: Path | None = None) -> None:
        self.study = study
        self.clone = clone
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
        if entry.original:
            script = str(Path(__file__).with_name("original_pretrain.py"))
            command = [script, str(self.clone), self.study.recipe, *overrides]
        else:
            command = ["-m", "etpp_ssl", "pretrain", self.study.recipe, *overrides]
        cpu_seconds = self._python(command, cores, log, times)
        numbers: dict[str, float] = {}
        for name in entry.evaluations:
            numbers.update(self._evaluate(name, entry, folder, cores, log))
        cost = {"cpu_seconds": cpu_seconds, "cores": len(cores)}
        row = {**describe(self.study.recipe, entry, folder), **cost, "numbers": numbers}
        with self._lock:
            append_line(self.study.results, json.dumps(row))
        return row

    def _evaluate(
        self, name: str, entry: Entry, folder: RunFolder, cores: list[int], log: Path
    ) -> dict[str, float]:
        evaluation = self.study.evaluations[name]
        wanted = set(evaluation.numbers.values())
        if evaluation.finetune is not None:
            tuned = RunFolder(folder.path.with_name(f"{entry.key}-{name}"))
            settings = [*self.study.finetune_common, *evaluation.overrides, f"seed={entry.seed}"]
            places = [f"init={weights(entry, folder)}", f"output={tuned.path}"]
            command = ["-m", "etpp_ssl", "finetune", evaluation.finetune, *settings, *places]
            self._python(command, cores, log)
            rows = tuned.metrics()
        else:
            assert evaluation.probe is not None
            # A probe that was finished before an interruption is not repeated.
            probes = folder.path / "report" / "probes.jsonl"
            if not any(wanted <= row.keys() for row in recorded(probes)):
                source = [str(folder.path)]
                if entry.original:
                    places = [f"init={weights(entry, folder)}", f"output={folder.path}"]
                    source = [self.study.recipe, *entry.overrides, *places]
                self._python(["-m", "etpp_ssl", "probe", *source, *evaluation.probe], cores, log)
            rows = recorded(probes)
        found = [row for row in rows if wanted <= row.keys()][-1]
        return {column: float(found[key]) for column, key in evaluation.numbers.items()}

    def _python(self, arguments: list[str], cores: list[int], log: Path, times: Path | None = None) -> float:
        """Run a program to its end; returns the CPU time of all its runs that are noted in `times`."""
        if self.stopping.is_set():
            raise Stopped
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
        with log.open("ab") as file:
            job = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(job.pid, cores)
            self._running.add(job)
            if self.stopping.is_set():
                # It was not among those that `stop` has told.
                os.kill(job.pid, signal.SIGTERM)
            # Not `wait`: only this tells the time of this child and of the data workers that it waited for.
            _, status, usage = os.wait4(job.pid, 0)
            code = job.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(job)
        if times is not None:
            append_line(times, json.dumps({"cpu_seconds": usage.ru_utime + usage.ru_stime}))
        if self.stopping.is_set():
            raise Stopped
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(arguments[:3])} ended with {code}: {' '.join(last)} ({log})")
        return sum(row["cpu_seconds"] for row in recorded(times)) if times is not None else 0.0

    def stop(self) -> None:
        """End what runs, with checkpoints."""
        self.stopping.set()
        for job in tuple(self._running):
            # Not `terminate`, which would ask for the end that `wait4` is waiting for.
            with suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGTERM)


def weights(entry: Entry, folder: RunFolder) -> Path:
    """What other commands take as the run's weights."""
    return folder.path / "weights.pth" if entry.original else folder.path


def describe(recipe: str, entry: Entry, folder: RunFolder) -> dict[str, Any]:
    """What a finished run was and cost."""
    plan = plan_run(Recipe.load(recipe, [*entry.overrides, f"output={folder.path}"]))
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
        "machine": f"{platform.machine()}, {get_cpu_capability()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def run_study(study: Study, entries: Sequence[Entry], jobs: int, clone: Path | None = None) -> list[str]:
    """Run entries; returns what failed, one sentence each."""
    runner, failures = Runner(study, clone), []
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
        except Exception as error:
            # Whatever it is, the other runs go on, and it is not heard of only at their end.
            failures.append(f"{entry.key}: {type(error).__name__}: {error}")
            print(f"failed: {failures[-1]}", flush=True)
        finally:
            free.put(share)

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(signum, lambda *_: runner.stop()) for signum in signals]
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, entries))
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)
    if runner.stopping.is_set():
        failures.append("stopped; the same command goes on")
    return failures


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="a study file")
    parser.add_argument("overrides", nargs="*", help="settings for every run, for instance data.root=...")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only these arms, or runs as --list has them"
    )
    parser.add_argument("--original", type=Path, metavar="CLONE", help="a clone of facebookresearch/mae")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    options = parser.parse_intermixed_args()

    study = load_study(options.study, options.overrides)
    names = {name for entry in study.entries for name in (entry.arm, entry.key)}
    if unknown := set(options.only or ()) - names:
        parser.error(f"--only: the study has no {', '.join(sorted(unknown))}")
    done = study.done(recorded(study.results))
    chosen = [
        entry for entry in study.entries if not options.only or {entry.arm, entry.key} & set(options.only)
    ]
    for entry in chosen if options.list else ():
        print(f"{'done' if entry.key in done else 'open'}  {entry.key}")
    if options.list:
        return
    left = [entry for entry in chosen if entry.key not in done]
    if options.original is None and (skipped := [entry.key for entry in left if entry.original]):
        print(f"left out without --original: {', '.join(skipped)}")
        left = [entry for entry in left if not entry.original]
    failures = run_study(study, left, options.jobs, options.original)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
