"""Train one recipe with 1, 2 and 4 processes, and stopped under one number and resumed by another.

    python tools/processes_table.py [RECIPE] [key=value ...]

Prints for each run its largest relative difference to the losses of the undisturbed run of one process, step
by step. The defaults are recipes/quickstart.yaml for two epochs, with a batch of 62 in micro-batches of 13,
which neither 4 processes nor the micro-batches divide. CPU processes, started by torchrun, one thread each.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from etpp_ssl.run_folder import RunFolder

DEFAULTS = [
    "budget_epochs=2",
    "batch_size=62",
    "micro_batch_size=13",
    "log_every_steps=1",
    "data.num_workers=0",
    "checkpoint.every_minutes=null",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ETPP = ["-m", "etpp_ssl", "pretrain"]
COUNTS = (2, 4)
CHANGES = ((2, 1), (2, 4), (1, 2), (4, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        table = Table([arguments.recipe, *DEFAULTS, *arguments.overrides], Path(name))
        for count in COUNTS:
            table.row(str(count), [count])
        for before, after in CHANGES:
            table.row(f"{before}, then {after}", [before, after])


class Table:
    """The differences to one process's run, which it trains first.

    Args:
        command: recipe and overrides.
        folder: for the runs.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command = command
        self.folder = folder
        start = time.monotonic()
        self.expected = self._train("one", [1])
        stages = len({tuple(row["bandwidth"]) for row in self.expected.values()})
        print(
            f"1 process: {len(self.expected)} steps, {stages} bandwidths, {time.monotonic() - start:.0f} s\n"
            f"{'processes':<10} {'steps':>5} {'worst':>8} {'at step':>7} {'last':>8}"
        )

    def row(self, title: str, counts: list[int]) -> None:
        """Train with the first count; with two of them, stop halfway and go on with the other one."""
        losses = self._train(title.replace(", ", "-").replace(" ", "-"), counts)
        assert list(losses) == list(self.expected), "other steps than those of one process"
        differences = {
            step: abs(row["loss"] - self.expected[step]["loss"]) / abs(self.expected[step]["loss"])
            for step, row in losses.items()
        }
        seen = [row["num_processes"] for row in losses.values()]
        assert sorted(set(seen), key=seen.index) == counts, f"trained by {sorted(set(seen))} processes"
        worst = max(differences, key=differences.__getitem__)
        last = list(differences.values())[-1]
        print(f"{title:<10} {len(losses):>5} {differences[worst]:>8.1e} {worst:>7} {last:>8.1e}", flush=True)

    def _train(self, name: str, counts: list[int]) -> dict[int, dict[str, Any]]:
        """Rows with a loss, by step."""
        run = RunFolder(self.folder / name)
        for number, count in enumerate(counts):
            job = subprocess.Popen(
                [*TORCHRUN, f"--nproc_per_node={count}", *ETPP, *self.command, f"output={run.path}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            last = number == len(counts) - 1
            if not last:
                while job.poll() is None and len(run.metrics()) < len(self.expected) // 2:
                    time.sleep(0.05)
                job.send_signal(signal.SIGTERM)
            said = job.communicate()[1]
            assert (job.returncode == 0) == last, said
        return {row["step"]: row for row in run.metrics() if "loss" in row}


if __name__ == "__main__":
    main()
