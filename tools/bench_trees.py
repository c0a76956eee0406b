"""Steps of two checkouts, in alternating turns: what a change costs, or saves, in training itself.

    python tools/bench_trees.py ../etpp-0.5.1

Each turn is a run of its own process from one of the two trees, on images that are drawn; only what a run
writes is read, so the other tree may be of any version since 0.5. The time of a step is that between two rows
of `metrics.jsonl`, without the share that it waited for data; the first row of a run does not count.
Printed are the median time per step of each tree and the median of the turns' ratios, with their range.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
DRAWN = [
    "data={name: synthetic, num_images: 4096}", "data.num_workers=0", "probe=none", "log_every_steps=2",
    "curriculum=constant", "checkpoint.every_minutes=null",
]  # fmt: skip
CASES = {
    "cifar10_vit_micro": (["batch_size=256", "budget_epochs=1"], 256),
    "in1k_vit_base_mae400": (["batch_size=8", "budget_epochs=0.02"], 8),
}
"""Recipe -> overrides and batch size."""


def seconds_per_step(tree: Path, recipe: str, overrides: list[str], batch_size: int) -> float:
    """The median over the rows of a run from `tree`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "etpp_ssl", "pretrain", str(tree / "recipes" / f"{recipe}.yaml")]
        done = subprocess.run(
            [*command, *DRAWN, *overrides, f"output={folder}/run"],
            env={**os.environ, "PYTHONPATH": str(tree)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row][1:]
    return statistics.median(
        batch_size / row["images_per_second"] * (1 - row["data_wait_share"]) for row in rows
    )


def main() -> None:
    """A line for each case."""
    parser = argparse.ArgumentParser(description="Steps of two checkouts, in alternating turns.")
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=7, help="runs of each tree")
    options = parser.parse_args()
    trees = {"here": HERE, "other": options.other.resolve()}
    for recipe, (overrides, batch_size) in CASES.items():
        times: dict[str, list[float]] = {name: [] for name in trees}
        for turn in range(options.turns):
            # Who goes first changes, so that a drift of the machine favours none.
            for name in list(trees)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(seconds_per_step(trees[name], recipe, overrides, batch_size))
        ratios = [here / other for here, other in zip(times["here"], times["other"], strict=True)]
        medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
        print(
            f"{recipe}: {medians['here']:.1f} ms here, {medians['other']:.1f} ms there; ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
            f"{options.turns} turns)",
            flush=True,
        )


if __name__ == "__main__":
    main()
