"""What loading costs a curriculum, against constant resolution at equal counted operations.

    python tools/bench_feed.py RECIPE data.root=FOLDER [KEY=VALUE ...] [--epochs 0.1] [--repeats 3] [--core 0]

Training and its data worker share one core. The four runs (curriculum and constant, `data.cache` off and ram)
take turns; printed are the ratios of their CPU time, workers included, and of their wall time, median (min to
max). Filling the cache, once before the first step, does not count. On a machine with other work only CPU
time counts, and that by half: caches and clocks are shared. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch

from etpp_ssl.recipe import Recipe
from etpp_ssl.train import loop
from etpp_ssl.train.launch import launch
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.run import Run

ARMS = [(curriculum, cache) for cache in ("off", "ram") for curriculum in ("own", "constant")]
UNTIMED = 2
"""Steps of a run in which it warms up."""


def main() -> None:
    """Parse, run in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="of a masked autoencoder")
    parser.add_argument("values", nargs="*", help="keys of the recipe, as for etpp")
    parser.add_argument("--epochs", type=float, default=0.1, help="budget of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--core", type=int, default=0, help="that all runs on (default: %(default)s)")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    taken: dict[tuple[str, str], list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
    flops = {}
    for turn in range(options.repeats):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            with tempfile.TemporaryDirectory() as output:
                recipe = recipe_of(options, arm, output)
                plan = plan_run(recipe)
                untimed = UNTIMED * recipe.batch_size * plan.stages[0].cost.flops
                flops[arm] = plan.total_flops - untimed
                taken[arm].append(timed(recipe))
            print(
                turn,
                *arm,
                "CPU {:.2f} s, workers {:.2f} s of it, wall {:.2f} s".format(*taken[arm][-1]),
                flush=True,
            )
    for what, one, other in (
        ("curriculum / constant, cache off", ARMS[0], ARMS[1]),
        ("curriculum / constant, cache ram", ARMS[2], ARMS[3]),
        ("cache ram / off, curriculum", ARMS[2], ARMS[0]),
        ("cache ram / off, constant", ARMS[3], ARMS[1]),
    ):
        per_flop = flops[other] / flops[one]
        for number, clock in enumerate(("CPU", "workers' CPU", "wall")):
            pairs = zip(taken[one], taken[other], strict=True)
            ratios = sorted(a[number] / b[number] * per_flop for a, b in pairs)
            print(f"{what}, {clock}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def recipe_of(options: argparse.Namespace, arm: tuple[str, str], output: str) -> Recipe:
    """One arm's recipe."""
    curriculum, cache = arm
    values = [f"output={output}", f"budget_epochs={options.epochs}", "probe=none", f"data.cache={cache}"]
    values += ["curriculum=constant"] if curriculum == "constant" else []
    recipe = Recipe.load(options.recipe, ["data.num_workers=1", *options.values, *values])
    assert isinstance(recipe, Recipe)
    return recipe


def timed(recipe: Recipe) -> tuple[float, float, float]:
    """(CPU, that of the workers, wall) seconds after the first `UNTIMED` steps of a run."""
    run = open_run(recipe, shown=False)
    marks = []

    def mark(run: Run, *_: object) -> None:
        if run.state.step in (UNTIMED, run.curriculum.num_steps):
            marks.append((*cpu_seconds(), time.perf_counter()))

    loop.on_step_end.append(mark)
    try:
        launch(run)
    finally:
        loop.on_step_end.remove(mark)
    (own, workers, wall), (own_end, workers_end, wall_end) = marks
    return own_end - own + workers_end - workers, workers_end - workers, wall_end - wall


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of its data workers, which are alive."""
    here = psutil.Process()
    own, *workers = [sum(p.cpu_times()[:2]) for p in (here, *here.children(recursive=True))]
    return own, sum(workers)


if __name__ == "__main__":
    main()
