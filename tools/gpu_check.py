"""Prove and measure on a GPU what was only ever run on CPUs, part by part, in half an hour.

    python tools/gpu_check.py [--only PART ...] [--minutes 9] [--original CLONE] [--images IMAGENETTE]
    python tools/gpu_check.py --smoke        # every part on the CPU, with tiny shapes
    python tools/gpu_check.py --list
    python tools/gpu_check.py --table        # Markdown, from the results

Each part runs in a process of its own, within its time limit; each case is appended to the results as it
ends. The same command resumes: what has ended with this code on this device is left out, unless `--again` is
given. `--minutes` limits the whole; a part that is cut short is resumed behind the case that was in work.

It needs this repository and torch; what else is missing is named, with the command that brings it as wheels.
`--original` is a clone of facebookresearch/mae, `--images` holds Imagenette's train/ and val/.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gpu import results  # noqa: E402
from gpu.parts import PARTS, Failed, Part, Place, Skipped  # noqa: E402

LEAST_SECONDS = 20
"""A part is not begun with less time left."""
SMOKE_SECONDS = 300
TAIL_LINES = 12
LOG, CASE = "log.txt", "case.txt"
"""In a part's folder: what it prints, and the name of the case in work."""
OUT_OF_TIME = "out of time"
CASES_LEFT = 75
"""Exit code of a part's process that has stopped between two cases, to be resumed."""
STARTING_SECONDS = 10
"""Of a part's time limit, for what comes before its first case."""


def main() -> None:
    """Parse; list, print, or run."""
    options = _options()
    wheels = missing_wheels()
    if wheels:
        names = " ".join(shlex.quote(name) for name in wheels)
        print(f"missing: {', '.join(wheels)}\nthere:  pip download -d wheels {names}")
        sys.exit(f"here:   pip install --no-index --find-links wheels {names}")
    if options.run is not None:
        part = next(part for part in PARTS if part.name == options.run)
        say, deadline = _own_terminal(options.folder), time.monotonic() + options.seconds
        sys.exit(0 if run_cases(part, place_of(options), options.results, say, deadline) else CASES_LEFT)
    if options.table:
        print(results.tables(results.rows_of(options.results)))
        return
    done = set() if options.again else results.finished_parts(results.rows_of(options.results))
    if options.list:
        for part in PARTS:
            state = "done" if part.name in done else "open"
            print(f"{state}  {part.name:14} {part.seconds:5} s  {part.what}")
        return
    sys.exit(run_parts(options, done))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", metavar="PART", default=[], help="only these parts")
    parser.add_argument("--again", action="store_true", help="also what has ended already")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, and stop")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--minutes", type=float, help="stop by then; the same command goes on")
    parser.add_argument("--results", type=Path, help="JSON lines (default: tools/studies/gpu.jsonl)")
    parser.add_argument("--original", type=Path, metavar="CLONE", help="a clone of facebookresearch/mae")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="Imagenette")
    parser.add_argument("--run", metavar="PART", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = {part.name for part in PARTS}
    if unknown := [name for name in options.only if name not in names]:
        parser.error(f"--only: there is no part {unknown[0]!r}; --list shows them")
    for name in ("original", "images"):
        path = getattr(options, name)
        if path is not None and not path.is_dir():
            parser.error(f"--{name}: {path} is not a folder")
    if options.results is None:
        smoke = Path(tempfile.gettempdir()) / f"gpu_check-{os.getuid()}.jsonl"
        options.results = smoke if options.smoke else ROOT / "tools" / "studies" / "gpu.jsonl"
        if options.smoke and not (options.table or options.list):
            smoke.unlink(missing_ok=True)
    return options


def missing_wheels() -> list[str]:
    """Requirements of the package that are not installed, as pip takes them; torch itself goes first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = []
    for requirement in project["dependencies"]:
        try:
            importlib.metadata.version(re.split(r"[<>=!~ ]", requirement)[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing


def place_of(options: argparse.Namespace) -> Place:
    """Where the parts run."""
    import torch

    device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    return Place(device, options.smoke, options.folder, options.original, options.images)


def run_parts(options: argparse.Namespace, done: set[str]) -> int:
    """Run what is open, each part in its own process; the exit code is 1 where something failed."""
    import torch

    if not options.smoke and not torch.cuda.is_available():
        print("there is no GPU: --smoke runs every part on the CPU")
        return 2
    here = results.machine()
    print(f"{here['device']}, {here['cores']} cores, torch {here['versions']['torch']}, {here['commit']}")
    print(f"results: {options.results}", flush=True)
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    bad = []
    for part in PARTS:
        if part.name in done or (options.only and part.name not in options.only):
            continue
        limit = min(SMOKE_SECONDS if options.smoke else part.seconds, deadline - time.monotonic())
        if limit < LEAST_SECONDS:
            print(f"no time is left for {part.name}; the same command goes on")
            break
        state = run_part(part, options, limit)
        if state not in ("ok", "skipped"):
            bad.append(part.name)
    print(f"not as they should be: {', '.join(bad)}" if bad else "nothing failed")
    return 1 if bad else 0


def run_part(part: Part, options: argparse.Namespace, limit: float) -> str:
    """Run a part in a process of its own, end it when its time is up, and record how it ended."""
    start, file = time.monotonic(), options.results
    if options.again:
        results.append(file, results.row(part.name, None, results.BEGUN))
    print(f"{part.name}: {part.what}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        command = [sys.executable, __file__, "--run", part.name, "--folder", folder, "--results", str(file)]
        command += ["--seconds", str(limit - STARTING_SECONDS)]
        command += ["--smoke"] if options.smoke else []
        for name in ("original", "images"):
            path = getattr(options, name)
            command += [f"--{name}", str(path.absolute())] if path is not None else []
        code = _wait(subprocess.Popen(command, start_new_session=True, env=_environment()), limit)
        what = f"after {limit:.0f} s" if code is None else f"exit code {code}" if code else ""
        if code == CASES_LEFT:
            state, what = OUT_OF_TIME, "cases are left"
        elif what:
            state = OUT_OF_TIME if code is None else "crashed"
            print(f"  {state} {what}\n{_tail(folder)}")
            case = _read(folder, CASE)
            if case:
                # It has had its chance: the next start goes on behind it.
                results.append(file, results.row(part.name, case, state, what=what, seconds=limit))
        else:
            state = results.state_of(results.cases_of(results.rows_of(file), part.name).values())
    seconds = time.monotonic() - start
    results.append(file, results.row(part.name, None, state, what=what, seconds=seconds))
    print(f"  {part.name}: {state}, {seconds:.0f} s", flush=True)
    return state


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit code, or None after the time limit; then nothing that the process has started is left."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _own_terminal(folder: Path) -> Callable[[str], None]:
    """Says a line where this process printed so far; what else it and its children print goes to a log."""
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    return lambda line: print(line, file=terminal)


def run_cases(
    part: Part, place: Place, file: Path, say: Callable[[str], None], deadline: float = float("inf")
) -> bool:
    """Run a part's open cases, and record each.

    Args:
        part, place: what, and where.
        file: of the results.
        say: is told of each.
        deadline: by `time.monotonic`; a case is begun if one as long as the longest so far would end by then.

    Returns:
        Whether none is left.
    """
    longest = 0.0
    done = results.cases_of(results.rows_of(file), part.name)
    cases = getattr(importlib.import_module(f"gpu.{part.file}"), part.name)
    for case, run in cases(place):
        if case in done:
            continue
        if time.monotonic() + longest > deadline:
            return False
        (place.folder / CASE).write_text(case)
        start, what, figures = time.monotonic(), "", {}
        try:
            figures, state = run(), "ok"
        except Skipped as reason:
            state, what = "skipped", str(reason)
        except Failed as fault:
            state, what, figures = "failed", str(fault), fault.figures
        except Exception as error:
            # Whatever it is, the other cases go on.
            traceback.print_exc()
            state, what = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        seconds = time.monotonic() - start
        results.append(file, results.row(part.name, case, state, what=what, figures=figures, seconds=seconds))
        shown = ", ".join(f"{name} {results.shown(value)}" for name, value in figures.items())
        said = "; ".join(text for text in (shown, what) if text)
        longest = max(longest, seconds)
        (place.folder / CASE).unlink()
        say(f"  {state:8} {case}: {said} ({seconds:.1f} s)")
    return True


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _read(folder: str, name: str) -> str:
    file = Path(folder) / name
    return file.read_text(errors="replace") if file.is_file() else ""


def _tail(folder: str) -> str:
    return "\n".join(f"    {line}" for line in _read(folder, LOG).splitlines()[-TAIL_LINES:])


if __name__ == "__main__":
    main()
