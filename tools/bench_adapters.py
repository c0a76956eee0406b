"""Compare what fine-tuning costs by the parts that are trained (`model.train`), with what `etpp plan` says.

    python tools/bench_adapters.py [RECIPE] [key=value ...] [--train all,head,norms,lora,last_2] [--turns 3]

A step is the task's own, with its optimizer, on random images that are on the device already. The ways take
turns in one process; seconds, on a CPU the processor's, are compared with the first way's of the same turn.
Memory is the peak of three steps above what the process had before the model was built, each way in a process
of its own (on a GPU that of its allocator). As in a run, freed memory is kept.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from etpp_ssl.config import UserError, show_size
from etpp_ssl.optim.schedules import set_learning_rate
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.train.memory import freed_memory_kept
from etpp_ssl.train.opening import bare_task
from etpp_ssl.train.plan import plan_run

RECIPE = "recipes/imagenette_finetune.yaml"
SETTINGS = ["data={name: synthetic}", "batch_size=8", "precision=fp32", "model.num_classes=10"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("words", nargs="*", help=f"recipe ({RECIPE} by default), then overrides")
    parser.add_argument("--train", default="all,head,norms,lora,last_2", help="ways (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    words = options.words if options.words and "=" not in options.words[0] else [RECIPE, *options.words]
    ways = options.train.split(",")
    try:
        recipes = [
            FinetuneRecipe.load(words[0], [*SETTINGS, *words[1:], f"model.train={way}"]) for way in ways
        ]
    except UserError as error:
        sys.exit(f"bench_adapters: {error}")
    if options.peak:
        print(_peak(recipes[0]))
        return
    print(
        f"torch {torch.__version__}, {DEVICE.type}, {torch.get_num_threads()} threads: "
        f"{recipes[0].model.name}, {show_size(recipes[0].size)} px, batch {recipes[0].batch_size}, "
        f"{recipes[0].precision}"
    )
    steps, counts = zip(*(_step(recipe) for recipe in recipes), strict=True)
    seconds: list[list[float]] = [[] for _ in ways]
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    with freed_memory_kept(DEVICE):
        for turn in range(-1, options.turns):
            for index in range(len(ways)) if turn % 2 == 0 else reversed(range(len(ways))):
                began = clock()
                steps[index]()
                if turn >= 0:
                    seconds[index].append(clock() - began)
    print("way        trained      s/step  ratio (min to max)   counted   peak GB  ratio   plan GB  ratio")
    first: list[float] = []
    for way, recipe, own, trained in zip(ways, recipes, seconds, counts, strict=True):
        row = plan_run(recipe).stages[-1]
        flops, planned = row.cost.flops, row.memory_bytes
        command = [sys.executable, __file__, *words, "--train", way, "--peak"]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        first = first or [flops, peak, planned]
        ratios = [a / b for a, b in zip(own, seconds[0], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{way:<9}{trained:>10,}{statistics.median(own):>10.2f}  {spread:<22}{flops / first[0]:>6.2f}"
            f"{peak / 1e9:>10.3f}{peak / first[1]:>7.2f}{planned / 1e9:>10.3f}{planned / first[2]:>7.2f}"
        )


def _step(recipe: FinetuneRecipe) -> tuple[Callable[[], None], int]:
    """What takes an optimizer step of a recipe, and how many values it trains."""
    task = bare_task(recipe, DEVICE, recipe.model.num_classes, lambda b: freshly_initialised(0, b).to(DEVICE))
    task.model.train()
    optimizer = recipe.optim.build(task.net, DEVICE)
    set_learning_rate(optimizer, 1e-4)
    count = recipe.batch_size
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "images": torch.randn(count, recipe.in_chans, *recipe.size, generator=generator).to(DEVICE),
        "positions": torch.arange(count, device=DEVICE),
        "targets": torch.eye(recipe.model.num_classes or 2, device=DEVICE)[:1].expand(count, -1),
    }

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = task.forward(task.model, inputs)
        task.losses(output, inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step, sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def _peak(recipe: FinetuneRecipe) -> int:
    """Bytes at the peak of three steps, beyond those before the model."""
    before = 0 if DEVICE.type == "cuda" else _resident("VmRSS")
    step, _ = _step(recipe)
    with freed_memory_kept(DEVICE):
        for _ in range(3):
            step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(row: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(row))


if __name__ == "__main__":
    main()
