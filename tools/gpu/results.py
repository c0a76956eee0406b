"""Results of the GPU check: JSON lines, what of them is still to be done, and tables for the docs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from gpu.parts import PARTS, Figures

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
ENDS = ("ok", "failed", "skipped")
"""States of a part that is finished; others (`out of time`, `crashed`) are taken up again."""
BEGUN = "begun"
"""State of a part that starts anew, after which its earlier cases do not count."""


@cache
def machine() -> Row:
    """The device, driver and versions."""
    import torch

    import etpp_ssl

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "driver": _driver() if gpu else "",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "etpp_ssl": etpp_ssl.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if gpu else None,
            "cudnn": torch.backends.cudnn.version() if gpu else None,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "code": _code(),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query).splitlines()[0] if shutil.which("nvidia-smi") else "unknown"


def _commit() -> str:
    return _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]) or "unknown"


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _code() -> str:
    """What tells two states of the code apart, committed or not, with git or without."""
    digest = hashlib.sha256()
    for folder in ("etpp_ssl", "tools"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def row(
    part: str,
    case: str | None,
    state: str,
    *,
    what: str = "",
    figures: Figures | None = None,
    seconds: float = 0.0,
) -> Row:
    """A line of the file; `case` is None for the end of a part."""
    return {
        "part": part,
        "case": case,
        "state": state,
        "what": what,
        "figures": figures or {},
        "seconds": round(seconds, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python tools/gpu_check.py --only {part}",
        **machine(),
    }


def append(file: Path, line: Row) -> None:
    """Add a line, written in one go."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def rows_of(file: Path) -> list[Row]:
    """All lines so far; one that was cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def of_here(rows: Iterable[Row]) -> list[Row]:
    """Those of this code on this device."""
    here = machine()
    return [line for line in rows if (line["code"], line["device"]) == (here["code"], here["device"])]


def finished_parts(rows: Iterable[Row]) -> set[str]:
    """Parts that have ended here."""
    return {line["part"] for line in of_here(rows) if line["case"] is None and line["state"] in ENDS}


def cases_of(rows: Iterable[Row], part: str) -> dict[str, str]:
    """State of each case of a part that has ended here, since the part was last begun anew."""
    states: dict[str, str] = {}
    for line in of_here(rows):
        if line["part"] == part and line["state"] == BEGUN:
            states = {}
        elif line["part"] == part and line["case"] is not None:
            states[line["case"]] = line["state"]
    return states


def state_of(cases: Iterable[str]) -> str:
    """State of a part whose cases have these."""
    states = set(cases)
    if states == {"skipped"}:
        return "skipped"
    return "ok" if states <= {"ok", "skipped"} else "failed"


def tables(rows: Sequence[Row]) -> str:
    """A Markdown table for each part and device, of the newest row of each case."""
    newest: dict[tuple[str, str, str], Row] = {}
    for line in rows:
        if line["case"] is not None:
            newest[line["device"], line["part"], line["case"]] = line
    found = []
    for device in dict.fromkeys(device for device, _, _ in newest):
        found.append(f"## {device}")
        for part in PARTS:
            own = [line for key, line in newest.items() if key[:2] == (device, part.name)]
            if own:
                found += ["", f"`{part.name}`: {part.what} ({_where(own[-1])}).", "", *_table(own)]
        found.append("")
    return "\n".join(found)


def _where(line: Row) -> str:
    versions, driver = line["versions"], line["driver"]
    shown = f"torch {versions['torch']}" + (f", driver {driver}" if driver else "")
    return f"{line['time'][:10]}, {line['commit']}, {shown}"


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for line in rows for name in line["figures"]))
    lines = [f"| case | {' | '.join([*columns, 'result'])} |", "|---" * (len(columns) + 2) + "|"]
    for line in rows:
        cells = [shown(line["figures"].get(name, "")) for name in columns]
        result = line["state"] + (f": {line['what']}" if line["what"] else "")
        lines.append(f"| {' | '.join([line['case'], *cells, result])} |")
    return lines


def shown(value: float | int | str) -> str:
    """A figure for people."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value
