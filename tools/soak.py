"""Kill and resume a run of several processes for some minutes; it must end in an undisturbed run's bits.

    python tools/soak.py RECIPE [key=value ...] --folder DIR [--processes 2] [--minutes 20] [--seed 0]
                         [--kill-every 20..90]

A reference run that takes a third or so of the time, then the same run again, which is struck at keyed
moments (soak_plan.py says how) and started again with another `data.num_workers` until it has finished.
After each end: are the checkpoints whole, do the metrics parse, is `status.json` true, did the user get a
sentence and no traceback, is any process or shared memory left, how long did it take? At last: is
everything equal to the bit, and did memory grow? The reference run is the evidence for the latter.

The run's length follows from one equivalent epoch, which is timed first, unless `budget_epochs` is given.
DIR gets the folders of both runs, all that was printed, soak.jsonl (a line per event, written at once) and
memory.jsonl (a line per process and second; other programs that use the same libraries change the PSS).
The exit code is 0 if everything holds, otherwise 1; 2 for a mistake in the arguments; 130 for Ctrl-C, which
ends all that was started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from soak_checks import End, differences, end_faults, last_line, read_status, shared_memory
from soak_job import Job, kill_each, marked, newest_step
from soak_memory import Sample, growth_table, growths, take
from soak_plan import ALL_KINDS, KINDS, Blow, plan_blow, plan_workers
from soak_report import blow_table, memory_faults, step_table, summary

from etpp_ssl.config import UserError
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder

REFERENCE_SHARE = 0.4
"""Of the time, for the reference run; to start again so often takes a good part of the rest."""
DEFAULTS = ("checkpoint.every_steps=25", "data.num_workers=2")
"""Overrides that others on the command line replace."""
MAX_LAUNCHES = 1000
SHORTEST_HALF = 45.0
"""Seconds of the second half of a stretch whose memory is fitted: a launch first has to settle."""
RETRY = 2.0
"""Seconds until a blow that found nobody to hit is tried again."""


@dataclass
class Soak:
    """Options, and what has been found so far."""

    options: argparse.Namespace
    folder: Path
    begin: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        """Since the start."""
        return (time.monotonic() - self.begin) / 60

    def note(self, event: str, **values: Any) -> None:
        """Add a line to soak.jsonl."""
        with (self.folder / "soak.jsonl").open("a", encoding="utf-8") as file:
            line = {"event": event, "minutes": round(self.minutes, 3), **values}
            file.write(json.dumps(line, default=str) + "\n")

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"{self.minutes:6.2f}  {text}", flush=True)

    def blame(self, where: str, faults: Sequence[str]) -> None:
        """Remember faults and print them."""
        for fault in faults:
            self.faults.append(f"{where}: {fault}")
            self.note("fault", where=where, fault=fault)
            self.say(f"FAULT {where}: {fault}")

    def launch(self, name: str, run: str, *overrides: str) -> Job:
        """Start a run, or go on with it."""
        options, folder = self.options, self.folder / run
        command = ["pretrain", options.recipe, *DEFAULTS, *options.overrides, *overrides]
        command.append(f"output={folder}")
        return Job(name, command, folder, self.folder / "logs", options.processes)

    def sample(self, job: Job) -> None:
        """Note the memory of a job's processes."""
        file = self.folder / "memory.jsonl"
        self.samples += take(file, job.name, job.seconds, job.place(), job.named())


def main() -> int:
    """Parse, soak, print."""
    soak = Soak(options := parse(sys.argv[1:]), options.folder)
    # A scheduler's SIGTERM must end what was started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        reference = run_reference(soak)
        if reference is not None:
            run_soaked(soak, reference)
        return conclude(soak)
    except KeyboardInterrupt:
        soak.note("interrupted")
        print("soak: interrupted; what was found so far is in soak.jsonl", file=sys.stderr)
        return 130
    finally:
        kill_each(list(marked()))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; exits with a sentence and code 2 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("recipe", help="a pre-training recipe")
    add("overrides", nargs="*", metavar="key=value", help="overrides")
    add("--folder", type=Path, required=True, help="a new folder")
    add("--processes", type=int, default=2, help="(default: %(default)s)")
    add("--minutes", type=float, default=20, help="for everything (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the blows (default: %(default)s)")
    add("--kill-every", default="20..90", help="seconds (default: %(default)s)")
    add(
        "--kinds",
        default=",".join(KINDS),
        help="of blows; one more is 'kill launcher' (default: %(default)s)",
    )
    add("--max-end", type=float, default=30, help="seconds until all is gone (default: %(default)s)")
    add("--stall", type=float, default=120, help="seconds without a row: a hang (default: %(default)s)")
    add("--growth", type=float, default=200, help="tolerated, in MB per hour (default: %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    try:
        low, high = (float(text) for text in options.kill_every.split(".."))
    except ValueError:
        parser.error(f"--kill-every is {options.kill_every!r}; valid is, for instance, 20..90")
    if not 0 <= low <= high:
        parser.error(f"--kill-every is {options.kill_every!r}; the first number must be the smaller one")
    options.kill_every = (low, high)
    options.kinds = tuple(options.kinds.split(","))
    if not {*options.kinds} <= {*ALL_KINDS}:
        parser.error(f"--kinds is {','.join(options.kinds)!r}; valid are {', '.join(ALL_KINDS)}")
    if options.processes < 1 or options.minutes <= 0:
        parser.error("--processes takes 1 or more, --minutes more than 0")
    try:
        recipe = Recipe.load(options.recipe, [*DEFAULTS, *options.overrides])
        options.interval = recipe.checkpoint.every_steps
        options.folder.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        parser.error(str(error))
    if any(options.folder.iterdir()):
        parser.error(f"--folder {str(options.folder)!r} is not empty")
    return options


def run_reference(soak: Soak) -> RunFolder | None:
    """The run without a blow, as long as its share of the time; None if it fails."""
    if not any(override.startswith("budget_") for override in soak.options.overrides):
        timing = undisturbed(soak, "timing", "budget_hours=null", "budget_epochs=1", "probe=none")
        if timing is None:
            return None
        seconds = 60 * soak.options.minutes * REFERENCE_SHARE
        epochs = epochs_for(timing.metrics(), seconds)
        soak.options.overrides += ["budget_hours=null", f"budget_epochs={epochs}"]
        soak.say(f"{epochs} equivalent epochs should take {seconds:.0f} s")
    return undisturbed(soak, "reference")


def undisturbed(soak: Soak, name: str, *overrides: str) -> RunFolder | None:
    """Launch a run and wait for its end; None if it fails."""
    job = soak.launch(name, name, *overrides)
    outcome = job.watch(None, soak.options.stall, soak.sample)
    return job.run if settle(soak, job, outcome, None, None).finished else None


def epochs_for(rows: Sequence[dict[str, Any]], seconds: float) -> float:
    """The budget in equivalent epochs that takes so many seconds, from a shorter run's rows of metrics."""
    losses = [row for row in rows if "loss" in row]
    first, last = losses[0], losses[-1]
    pace = (last["seconds"] - first["seconds"]) / (last["equivalent_epochs"] - first["equivalent_epochs"])
    return max(1.0, round(seconds / pace, 2))


def run_soaked(soak: Soak, reference: RunFolder) -> None:
    """Strike and resume until the run has finished; then compare it with the reference."""
    number = 0
    for launch in range(1, MAX_LAUNCHES + 1):
        workers = plan_workers(soak.options.seed, number, soak.options.kinds)
        job = soak.launch(f"soaked {launch}", "soaked", f"data.num_workers={workers}")
        soak.note("launch", launch=job.name, workers=workers, checkpoint=job.first_step)
        end, number = struck(soak, job, number)
        if end.finished:
            soak.blame("equality", differences(reference, job.run))
            return
        if end.outcome == "hangs" or end.kind is None:
            soak.blame(job.name, ["the run cannot be brought to its end"])
            return


def struck(soak: Soak, job: Job, number: int) -> tuple[End, int]:
    """Deal blows to a launch until one ends it, or it ends by itself.

    Args:
        soak: has the options.
        job: the launch.
        number: of the next blow.

    Returns:
        The end, and the number of the next blow.
    """
    options, missed = soak.options, False
    while True:
        blow = wait = None
        if soak.minutes < options.minutes:
            blow = plan_blow(options.seed, number, options.kill_every, options.kinds)
            wait = RETRY if missed else blow.after
        outcome = job.watch(wait, options.stall, soak.sample)
        if blow is None or outcome != "due":
            return settle(soak, job, outcome, None, None), number
        step, seconds = job.place()[0], round(job.seconds, 2)
        hit = job.strike(blow)
        missed = hit is None
        number += not missed
        soak.note("blow", launch=job.name, step=step, seconds=seconds, hit=hit, **asdict(blow))
        soak.say(f"{job.name}, step {step}: {blow.kind}, {hit or 'nobody there'}")
        if hit is not None and blow.kind != "pause worker":
            return settle(soak, job, outcome, blow, hit, step), number


def settle(
    soak: Soak, job: Job, outcome: str, blow: Blow | None, hit: str | None, step: int | None = None
) -> End:
    """Wait for the end of a launch, check what it leaves, and note it.

    Args:
        soak: gets end and faults.
        job: the launch.
        outcome: what watching it said.
        blow, hit, step: what was done to whom and when, if anything was.
    """
    if outcome == "hangs":
        states = [f"{name} {process.status()}" for name, process in job.named()]
        soak.blame(job.name, [f"no new row for {soak.options.stall:g} s: {', '.join(states)}"])
        job.kill()
    pids = {process.pid for process in job.survivors()}
    pids |= {sample.pid for sample in soak.samples if sample.stretch == job.name}
    seconds, left = job.wait(soak.options.max_end)
    job.kill()
    end = End(
        launch=job.name,
        kind=blow and blow.kind,
        hit=hit,
        outcome=outcome,
        exit_code=job.exit_code,
        seconds=round(seconds, 2),
        step=job.place()[0] if step is None else step,
        checkpoint=newest_step(job.run),
        interval=soak.options.interval,
        left=left + shared_memory(pids),
        status=read_status(job.run),
    )
    printed = job.printed()
    last_lines = {name: last_line(text) for name, text in printed.items()}
    soak.ends.append(end)
    soak.note("end", **asdict(end), lost=end.lost, last_lines=last_lines, load=os.getloadavg()[0])
    soak.say(
        f"{job.name} ended with {end.exit_code} after {seconds:.1f} s, step {end.step}, checkpoint "
        f"{end.checkpoint}, {end.told}: {last_lines.get('rank 0', '')!r}"
    )
    soak.blame(f"{job.name}, {end.kind or 'no blow'}", end_faults(end, job.run, printed))
    return end


def conclude(soak: Soak) -> int:
    """Print tables and a summary; returns the exit code."""
    options = soak.options
    last_step = max((end.checkpoint for end in soak.ends if end.launch != "timing"), default=0)
    found = growths(soak.samples, last_step=last_step, min_seconds=SHORTEST_HALF)
    soaked = [end for end in soak.ends if end.launch.startswith("soaked")]
    print("\nEnds\n" + "\n".join(step_table(soaked)))
    print("\nBlows that ended the run\n" + "\n".join(blow_table(soaked)))
    print("\nMemory over the second half of each stretch\n" + "\n".join(growth_table(found, options.growth)))
    for growth in found:
        soak.note("growth", verdict=growth.verdict(options.growth), **asdict(growth))
    print()
    soak.blame("memory", memory_faults(found, options.growth))
    title = (
        f"{options.processes} processes, {soak.minutes:.1f} minutes, seed {options.seed}, {last_step} steps "
        f"of {Path(options.recipe).name} {' '.join(options.overrides)}; torch {torch.__version__}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    lines = summary(title, soaked, found, options.growth, soak.faults)
    soak.note("summary", lines=lines, faults=soak.faults)
    print("\n".join(["", *lines]))
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
