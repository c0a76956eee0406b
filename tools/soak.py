"""Kill and resume a run of several processes for some minutes; it must end in an undisturbed run's bits.

    python tools/soak.py RECIPE [key=value ...] --folder DIR [--processes 2] [--minutes 20] [--seed 0]
                         [--kill-every 20..90]

A reference run that takes a third or so of the time, then the same run again, which is struck at keyed
moments (see KINDS in soak_job.py) and started again with another `data.num_workers` until it has finished.
After each end: are the checkpoints whole, do the metrics parse, is `status.json` true, did the user get a
sentence and no traceback, is any process or shared memory left, how long did it take? At the end: is
everything equal to the bit, and did memory grow? The reference run is the evidence for the latter.

DIR gets the folders of both runs, all that was printed, soak.jsonl (a line per event, written at once) and
memory.jsonl (a line per process and second). The exit code is 0 if everything holds, otherwise 1; 2 for a
mistake in the arguments and 130 for Ctrl-C, which ends all that was started.
The run's length follows from one equivalent epoch that is timed first, unless `budget_epochs` is given.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from soak_checks import differences, folder_faults, output_faults, read_status, status_faults
from soak_job import KINDS, STOPS, Blow, Job, marked, newest_step, plan_blow, plan_workers
from soak_memory import Growth, Sample, growth_table, growths, take

from etpp_ssl.config import UserError
from etpp_ssl.recipe_file import load_recipe
from etpp_ssl.run_folder import RunFolder

REFERENCE_SHARE = 0.36
"""Of the time, for the reference run; starting again so often takes most of the rest."""
DEFAULTS = ("checkpoint.every_steps=25", "data.num_workers=2")
"""Overrides that others given on the command line replace."""


@dataclass
class Soak:
    """Options, and what has been found so far."""

    options: argparse.Namespace
    folder: Path
    start: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the time is used up: no more blows."""
        return time.monotonic() - self.start > 60 * self.options.minutes

    def note(self, event: str, **values: Any) -> None:
        """Add a line to soak.jsonl."""
        minutes = round((time.monotonic() - self.start) / 60, 3)
        with (self.folder / "soak.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "minutes": minutes, **values}) + "\n")

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"{(time.monotonic() - self.start) / 60:6.2f}  {text}", flush=True)

    def blame(self, where: str, faults: Sequence[str]) -> None:
        """Remember faults and print them."""
        for fault in faults:
            self.faults.append(f"{where}: {fault}")
            self.say(f"FAULT {where}: {fault}")

    def launch(self, name: str, run: str, *overrides: str) -> Job:
        """Start the run, or go on with it."""
        options = self.options
        command = ["pretrain", options.recipe, *DEFAULTS, *options.overrides, *overrides]
        command.append(f"output={json.dumps(str(self.folder / run))}")
        return Job(name, command, self.folder / run, self.folder / "logs", options.processes)


class Watch:
    """Looks at a job until it ends, or until something is due.

    Args:
        soak: gets the samples.
        job: what to look at.
    """

    def __init__(self, soak: Soak, job: Job) -> None:
        self.soak, self.job = soak, job
        self._step, self._moved, self._sampled = -1, time.monotonic(), 0.0

    def until(self, seconds: float | None) -> str:
        """Wait; returns `ended`, `due` after the given seconds, or `hangs` without a step for too long."""
        begin = time.monotonic()
        while self.job.exit_code is None:
            now = time.monotonic()
            place = self.job.place()
            if place[0] != self._step:
                self._step, self._moved = place[0], now
            if now - self._moved > self.soak.options.stall:
                return "hangs"
            if seconds is not None and now - begin >= seconds:
                return "due"
            if now - self._sampled >= 1:
                self._sampled = now
                self.soak.samples += take(
                    self.soak.folder / "memory.jsonl",
                    self.job.name,
                    self.job.seconds,
                    place,
                    self.job.named(),
                )
            time.sleep(0.1)
        return "ended"


def main() -> int:
    """Parse, soak, print."""
    options = parse(sys.argv[1:])
    soak = Soak(options, options.folder)
    # A scheduler's SIGTERM must end what was started as Ctrl-C does.
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
        for process in marked():
            process.kill()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; exits with a sentence and code 2 for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a pre-training recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="for everything (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the blows (default: %(default)s)")
    parser.add_argument("--kill-every", default="20..90", help="seconds (default: %(default)s)")
    parser.add_argument(
        "--max-end", type=float, default=30, help="seconds from a blow to the end (default: %(default)s)"
    )
    parser.add_argument(
        "--stall",
        type=float,
        default=120,
        help="seconds without a row that are a hang (default: %(default)s)",
    )
    parser.add_argument(
        "--growth", type=float, default=60, help="MB per hour that are no growth yet (default: %(default)s)"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        low, high = (float(text) for text in options.kill_every.split(".."))
    except ValueError:
        parser.error(f"--kill-every is {options.kill_every!r}; valid is, for instance, 20..90")
    if not 0 <= low <= high:
        parser.error(f"--kill-every is {options.kill_every!r}; the first number is not the smaller one")
    options.kill_every = (low, high)
    if options.processes < 1 or options.minutes <= 0:
        parser.error("--processes takes 1 or more, --minutes more than 0")
    try:
        load_recipe(options.recipe, [*DEFAULTS, *options.overrides])
        options.folder.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        parser.error(str(error))
    if any(options.folder.iterdir()):
        parser.error(f"--folder {str(options.folder)!r} is not empty")
    return options


def run_reference(soak: Soak) -> RunFolder | None:
    """The run without a blow, as long as a share of the time; None if it fails."""
    if not any(override.startswith("budget_") for override in soak.options.overrides):
        timing = undisturbed(soak, "timing", "budget_epochs=1", "budget_hours=null", "probe=none")
        if timing is None:
            return None
        seconds = 60 * soak.options.minutes * REFERENCE_SHARE
        epochs = epochs_for(timing.metrics(), seconds)
        soak.options.overrides += ["budget_hours=null", f"budget_epochs={epochs}"]
        soak.say(f"{epochs} equivalent epochs should take {seconds:.0f} s")
        soak.note("length", budget_epochs=epochs, seconds=seconds)
    return undisturbed(soak, "reference")


def undisturbed(soak: Soak, name: str, *overrides: str) -> RunFolder | None:
    """Launch a run and wait for its end; None if it fails."""
    job = soak.launch(name, name, *overrides)
    end = settle(soak, job, Watch(soak, job).until(None), None, None)
    return job.run if end["finished"] else None


def epochs_for(rows: Sequence[dict[str, Any]], seconds: float) -> float:
    """The budget in equivalent epochs that takes so many seconds, from another run's rows of metrics."""
    losses = [row for row in rows if "loss" in row]
    first, last = losses[0], losses[-1]
    pace = (last["seconds"] - first["seconds"]) / (last["equivalent_epochs"] - first["equivalent_epochs"])
    return max(1.0, round(seconds / pace, 2))


def run_soaked(soak: Soak, reference: RunFolder) -> None:
    """Strike and resume until the run has finished; then compare it with the reference."""
    options, number = soak.options, 0
    for launch in range(1, 1000):
        workers = plan_workers(options.seed, number, options.kill_every)
        job = soak.launch(f"soaked {launch}", "soaked", f"data.num_workers={workers}")
        watch = Watch(soak, job)
        blow = hit = None
        outcome = "due"
        while outcome == "due":
            blow = None if soak.over else plan_blow(options.seed, number, options.kill_every)
            outcome = watch.until(None if blow is None else blow.after)
            if outcome != "due" or blow is None:
                blow = None
                break
            number += 1
            step, seconds = job.place()[0], job.seconds
            hit = job.strike(blow)
            soak.note("blow", launch=launch, step=step, seconds=round(seconds, 2), hit=hit, **vars(blow))
            soak.say(f"launch {launch}, {workers} workers, step {step}: {blow.kind}, {hit or 'nobody there'}")
            if hit is not None and blow.kind != "pause worker":
                break
        end = settle(soak, job, outcome, blow, hit)
        if end["finished"]:
            soak.note("compared", differences=(found := differences(reference, job.run)))
            return soak.blame("equality", found)
        if outcome == "hangs" or (blow is None and end["lost"] is None):
            return soak.blame(job.name, ["gave up: the run cannot be brought to its end"])


def settle(soak: Soak, job: Job, outcome: str, blow: Blow | None, hit: str | None) -> dict[str, Any]:
    """Wait for the end of a launch, check what it leaves, and note it.

    Args:
        soak: gets faults and the note.
        job: the launch.
        outcome: what `Watch.until` said.
        blow, hit: what was done to whom, if anything.
    """
    step = job.place()[0]
    if outcome == "hangs":
        states = [f"{name} {process.status()}" for name, process in job.named()]
        soak.blame(job.name, [f"no row for {soak.options.stall:g} s at step {step}: {', '.join(states)}"])
        job.kill()
    pids = {process.pid for process in job.survivors()} | {
        sample.pid for sample in soak.samples if sample.stretch == job.name
    }
    seconds, left = job.wait(soak.options.max_end)
    faults = [f"still there after {soak.options.max_end:g} s: {process}" for process in left]
    job.kill()
    faults += [f"shared memory is left: {name}" for name in shared_memory(pids)]
    finished = job.exit_code == 0
    if blow is None and outcome == "ended" and not finished:
        faults.append(f"ended by itself with exit code {job.exit_code}")
    newest, printed = newest_step(job.run), job.printed()
    trained = step >= 0
    faults += folder_faults(job.run)
    if outcome != "hangs" and not (finished or (blow and blow.kind == "kill all")):
        faults += output_faults(printed, {hit} if hit and blow and blow.kind == "kill rank" else set())
    try:
        status = read_status(job.run)
    except ValueError as error:
        status, faults = None, [*faults, f"status.json: {error}"]
    if trained and blow and not finished and not left:
        main_killed = blow.kind == "kill all" or (blow.kind == "kill rank" and hit == "rank 0")
        faults += status_faults(status, newest, graceful=blow.kind in STOPS, main_killed=main_killed)
    lost = max(0, step - max(newest, 0)) if trained else None
    if lost and blow and blow.kind in STOPS:
        faults.append(f"{lost} steps are lost, though the run was asked to stop")
    end = {
        "launch": job.name,
        "kind": blow.kind if blow else None,
        "hit": hit,
        "exit_code": job.exit_code,
        "finished": finished,
        "seconds_to_end": round(seconds, 2),
        "step": step,
        "checkpoint": newest,
        "lost": lost,
        "status": status,
        "last_lines": {name: last_line(text) for name, text in printed.items()},
        "torchrun_traceback": "Traceback (most" in printed["launcher"],
        "faults": faults,
    }
    soak.ends.append(end)
    soak.note("end", **end)
    soak.blame(f"{job.name}, {end['kind'] or 'no blow'}", faults)
    soak.say(
        f"{job.name} ended with {job.exit_code} in {seconds:.1f} s; step {step}, checkpoint {newest}, "
        f"status {status and status.get('state')}: {end['last_lines'].get('rank 0', '')!r}"
    )
    return end


def shared_memory(pids: set[int]) -> list[str]:
    """Segments of torch's that processes have left."""
    found = Path("/dev/shm").glob("torch_*")
    return [file.name for file in found if any(file.name.startswith(f"torch_{pid}_") for pid in pids)]


def last_line(text: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def conclude(soak: Soak) -> int:
    """Print tables and a summary; returns the exit code."""
    finished = [end for end in soak.ends if end["finished"]]
    last_step = max((end["checkpoint"] for end in finished), default=0)
    found = growths(soak.samples, last_step=last_step, min_seconds=30)
    print("\nBlows that ended the run")
    print("\n".join(blow_table(soak.ends)))
    print("\nMemory in the second half of stretches without an end; errors allow for autocorrelation")
    print("\n".join(growth_table(found, soak.options.growth)))
    blame_growth(soak, found)
    print()
    lines = summary(soak, found, last_step)
    print("\n".join(lines))
    soak.note("summary", lines=lines, faults=soak.faults)
    return 1 if soak.faults else 0


def blame_growth(soak: Soak, found: Sequence[Growth]) -> None:
    """Growth is a fault, and so is a reference run that is too short to tell."""
    for growth in found:
        verdict = growth.verdict(soak.options.growth)
        soak.note("growth", verdict=verdict, **_plain(growth))
        if verdict == "GROWS" or (verdict == "undecided" and growth.stretch == "reference"):
            what = f"{growth.process} {growth.quantity} {verdict.lower()}"
            slope = f"{growth.per_minute.slope:+.3f} +- {growth.per_minute.error:.3f} MB/minute"
            soak.blame("memory", [f"{growth.stretch}, {what}: {slope}"])
    if not any(growth.stretch == "reference" for growth in found):
        soak.blame("memory", ["the reference run is too short to say anything"])


def _plain(growth: Growth) -> dict[str, Any]:
    return {
        **vars(growth),
        "per_minute": vars(growth.per_minute),
        "per_1000_steps": vars(growth.per_1000_steps),
    }


def blow_table(ends: Sequence[dict[str, Any]]) -> list[str]:
    """Lines to print: how often each kind ended the run, and with what."""
    lines = [f"{'kind':<14} {'count':>5}  {'longest end':>11}  {'steps lost: median, most':>24}  exit codes"]
    for kind in (*KINDS, None):
        own = [end for end in ends if end["kind"] == kind and end["launch"].startswith("soaked")]
        if not own:
            continue
        lost = sorted(end["lost"] for end in own if end["lost"] is not None)
        codes = Counter(end["exit_code"] for end in own)
        lines.append(
            f"{kind or 'none':<14} {len(own):>5}  {max(end['seconds_to_end'] for end in own):>9.1f} s  "
            f"{f'{lost[len(lost) // 2]}, {lost[-1]}' if lost else '-':>24}  "
            + ", ".join(f"{code} x {count}" for code, count in codes.items())
        )
    return lines


def summary(soak: Soak, found: Sequence[Growth], last_step: int) -> list[str]:
    """Some lines that can be quoted."""
    options = soak.options
    soaked = [end for end in soak.ends if end["launch"].startswith("soaked")]
    equal = any(end["finished"] for end in soaked) and not any(f.startswith("equality") for f in soak.faults)
    verdicts = Counter(growth.verdict(options.growth) for growth in found if growth.stretch == "reference")
    largest = max(
        (growth for growth in found if growth.stretch == "reference"),
        key=lambda growth: growth.per_minute.slope,
        default=None,
    )
    slope = (
        "no stretch is long enough"
        if largest is None
        else f"largest slope {60 * largest.per_minute.slope:+.1f} +- {60 * largest.per_minute.error:.1f} MB/hour "
        f"({largest.process}, {largest.quantity}); "
        + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        + f" at {options.growth:g} MB/hour"
    )
    struck = sum(end["kind"] is not None for end in soaked)
    minutes = (time.monotonic() - soak.start) / 60
    return [
        f"soak: {options.processes} processes, {minutes:.1f} minutes, seed {options.seed}, {last_step} steps, "
        f"{Path(options.recipe).name} {' '.join(options.overrides)}",
        f"ended {struck} times and resumed; longest end "
        f"{max((end['seconds_to_end'] for end in soaked), default=0):.1f} s; "
        f"most steps lost {max((end['lost'] or 0 for end in soaked), default=0)}",
        f"weights, optimizer, state and metrics of the reference run: {'equal to the bit' if equal else 'NOT equal'}",
        f"memory: {slope}",
        f"{'FAILED' if soak.faults else 'PASSED'}: {len(soak.faults)} faults",
    ]


if __name__ == "__main__":
    sys.exit(main())
