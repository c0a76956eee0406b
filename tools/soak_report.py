"""The tables and the last lines of a soak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from soak_checks import End
from soak_memory import Growth
from soak_plan import ALL_KINDS


def blow_table(ends: Sequence[End]) -> list[str]:
    """A line per kind of blow: how often it ended the run, and with what."""
    lines = [f"{'kind':<14} {'count':>5} {'longest end':>12} {'lost steps, median and most':>28}  exit codes"]
    for kind in (*ALL_KINDS, None):
        own = [end for end in ends if end.kind == kind]
        if own:
            lost = sorted(end.lost for end in own if end.lost is not None)
            codes = Counter(end.exit_code for end in own)
            lines.append(
                f"{kind or 'none':<14} {len(own):>5} {max(end.seconds for end in own):>10.1f} s "
                f"{f'{lost[len(lost) // 2]}, {lost[-1]}' if lost else '-':>28}  "
                + ", ".join(f"{code} x {count}" for code, count in codes.items())
            )
    return lines


def step_table(ends: Sequence[End]) -> list[str]:
    """A line per end: where the run was struck, and where it went on."""
    lines = [f"{'launch':<10} {'kind':<14} {'hit':<16} {'struck at':>9} {'goes on at':>10} {'end':>7}  exit"]
    for end in ends:
        lines.append(
            f"{end.launch:<10} {end.kind or 'none':<14} {end.hit or '-':<16} "
            f"{end.step if end.step >= 0 else 'start':>9} {end.checkpoint:>10} {end.seconds:>5.1f} s  "
            f"{end.exit_code}"
        )
    return lines


def memory_faults(found: Sequence[Growth], limit: float) -> list[str]:
    """Growth of any process; and a reference run that shows no rank, or no data worker, to be steady.

    Args:
        found: slopes.
        limit: in MB per hour.
    """
    faults = []
    judged = [growth for growth in found if growth.judged]
    for growth in judged:
        if growth.verdict(limit) == "GROWS":
            fit = growth.per_minute
            slope = f"{60 * fit.slope:+.0f} +- {60 * fit.error:.0f} MB/hour"
            faults.append(f"{growth.stretch}, {growth.process}: {growth.quantity} grows by {slope}")
    for workers in (False, True):
        own = [g for g in judged if g.stretch == "reference" and ("worker" in g.process) == workers]
        if not any(growth.verdict(limit) != "undecided" for growth in own):
            what = "data worker" if workers else "rank"
            faults.append(f"the reference run is too short to tell of any {what} whether it grows")
    return faults


def summary(
    title: str, ends: Sequence[End], found: Sequence[Growth], limit: float, faults: Sequence[str]
) -> list[str]:
    """Lines that can be quoted.

    Args:
        title: what was soaked.
        ends: of the soaked run.
        found: slopes of memory.
        limit: above which they count, in MB per hour.
        faults: all of them.
    """
    struck = [end for end in ends if end.kind is not None]
    if not any(end.finished for end in ends):
        equal = "never compared, because it has not finished"
    elif unequal := [fault for fault in faults if fault.startswith("equality")]:
        equal = f"NOT those of the reference run ({len(unequal)} in all, first {unequal[0]})"
    else:
        equal = "those of the reference run to the bit"
    reference = [growth for growth in found if growth.stretch == "reference" and growth.judged]
    if reference:
        most = max(reference, key=lambda growth: growth.per_minute.slope)
        verdicts = Counter(growth.verdict(limit) for growth in reference)
        memory = (
            f"largest slope {60 * most.per_minute.slope:+.1f} +- {60 * most.per_minute.error:.1f} MB/hour "
            f"({most.process}, {most.quantity}); against {limit:g} MB/hour "
            + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        )
    else:
        memory = "the reference run is too short"
    longest = max((end.seconds for end in struck), default=0)
    lost = max((end.lost or 0 for end in struck), default=0)
    return [
        f"soak: {title}",
        f"ended by {len(struck)} blows, in {longest:.1f} s at most; at most {lost} logged steps done again",
        f"weights, optimizer, state and metrics: {equal}",
        f"memory: {memory}",
        f"{'FAILED' if faults else 'PASSED'}: {len(faults)} faults",
    ]
