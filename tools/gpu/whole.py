"""Whole runs: the curriculum against constant resolution, and the quickstart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.run import Run
from gpu.parts import Cases, Failed, Figures, Place, Skipped
from gpu.results import ROOT
from gpu.runs import at_step_end, trained
from gpu.speed import instant_loading, loop_recipe

EPOCHS = 24
"""Equivalent epochs of 4,096 images at 224 pixels: 384 steps of ViT-B at full resolution."""
HOURS = 0.08
SMOKE = [
    "budget_epochs=4",
    "batch_size=8",
    "data.strict=false",
    "model.depth=1",
    "model.decoder.depth=1",
    "precision=fp32",
]
PROBES = ("knn", "linear_cached")
TOLERANCE = 0.05


def equal(place: Place) -> Cases:
    """Equal budgets: the wall time of constant resolution over the curriculum's, by what is computed."""

    def run() -> Figures:
        epochs = f"budget_epochs={EPOCHS if not place.smoke else 2}"
        own = loop_recipe(place, epochs)
        constant = loop_recipe(place, epochs, "curriculum=constant", f"output={place.folder / 'constant'}")
        walls = [_seconds(recipe, place) for recipe in (own, constant)]
        flops = [plan_run(recipe).total_flops for recipe in (own, constant)]
        wall, computed = walls[1] / walls[0], flops[1] / flops[0]
        figures: Figures = {
            "curriculum s": walls[0], "constant s": walls[1], "wall": wall, "computed": computed,
            "wall over computed": wall / computed,
        }  # fmt: skip
        if place.device == "cuda" and wall / computed < 1 - TOLERANCE:
            raise Failed(f"the wall time is {1 - wall / computed:.0%} behind what is computed", figures)
        return figures

    yield "ViT-B, loading left out" if not place.smoke else "tiny", run


def _seconds(recipe: object, place: Place) -> float:
    """Wall time of a run's steps, the first one left out."""
    times: list[float] = []

    def note(run: Run) -> None:
        if run.state.step == 1 or run.finished:
            if place.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with instant_loading(), at_step_end(note):
        trained(recipe)  # type: ignore[arg-type]
    return times[1] - times[0]


def imagenette(place: Place) -> Cases:
    """Equal hours: epochs that each comes to, and accuracies of the frozen encoders."""

    def run(curriculum: str) -> Figures:
        if place.images is None:
            raise Skipped("needs --images")
        images = _few(place.images, place.folder / "few") if place.smoke else place.images
        output = str(place.folder / curriculum)
        workers = max(1, len(os.sched_getaffinity(0)) - 1)
        keys = [f"data.root={images}", f"output={output}", "probe=none", f"data.num_workers={workers}"]
        keys += SMOKE if place.smoke else ["budget_epochs=null", f"budget_hours={HOURS}"]
        keys += ["curriculum={name: constant}"] if curriculum == "constant" else []
        etpp("pretrain", str(ROOT / "recipes" / "imagenette_vit_small.yaml"), *keys)
        last = [row for row in RunFolder(output).metrics() if "loss" in row][-1]
        for probe in PROBES if not place.smoke else PROBES[:1]:
            etpp("probe", output, f"probe={probe}")
        numbers: Figures = {
            name: value
            for row in RunFolder(output).later_probes()
            for name, value in row.items()
            if name.endswith("top1")
        }
        return {
            "equivalent epochs": last["equivalent_epochs"],
            "images/s": last["images_per_second"],
            "waits for data": last["data_wait_share"],
            **numbers,
        }

    for curriculum in ("efficienttrain", "constant"):
        yield curriculum, partial(run, curriculum)


def _few(images: Path, folder: Path) -> Path:
    """A folder with links to three images of each class."""
    for split in ("train", "val"):
        for of_class in sorted((images / split).iterdir()):
            target = folder / split / of_class.name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(of_class.iterdir())[:3]:
                (target / file.name).unlink(missing_ok=True)
                (target / file.name).symlink_to(file)
    return folder


def quickstart(place: Place) -> Cases:
    """Plan, pre-train, probe, export."""
    output = str(place.folder / "quickstart")
    short = ["budget_epochs=0.1", "data.num_images=640", "data.num_eval_images=64"] if place.smoke else []
    recipe = [str(ROOT / "recipes" / "quickstart.yaml"), f"output={output}", *short]
    for name, command in {
        "plan": ["plan", *recipe],
        "pretrain": ["pretrain", *recipe],
        "probe": ["probe", output],
        "export": ["export", output, "--to", "timm"],
    }.items():

        def run(command: list[str] = command) -> Figures:
            start = time.perf_counter()
            last = etpp(*command)
            return {"seconds": time.perf_counter() - start, "last line": last}

        yield name, run


def etpp(*arguments: str) -> str:
    """Run a command; the last line that it prints.

    Raises:
        Failed: if it fails, with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "etpp_ssl", *arguments], capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise Failed(f"etpp {arguments[0]} ended with {done.returncode}: {lines[-1] if lines else ''}")
    return lines[-1] if lines else ""
