"""Memory of a training step: the peak against what `etpp plan` estimates, and how many images fit."""

from __future__ import annotations

import statistics

import torch
from bench_step import our_step, peak_memory

from etpp_ssl.config import show_size
from etpp_ssl.model.attention import BlockRunner
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.plan import StagePlan, plan_run
from gpu.arithmetic import step_recipe
from gpu.parts import Cases, Failed, Figures, Place
from gpu.results import ROOT
from gpu.speed import RECIPES, burst

TOLERANCE = 0.1
"""Of the estimate."""
MOST = 16384


def _recipes(place: Place) -> dict[str, Recipe]:
    if place.smoke:
        return {"tiny": step_recipe(place)}
    batch = ["batch_size=128", "micro_batch_size=null"]
    return {
        f"ViT-{model}": Recipe.load(ROOT / "recipes" / f"{RECIPES[model]}.yaml", batch) for model in "BSLH"
    }


def memory(place: Place) -> Cases:
    """A step with its optimizer's moments, at each stage."""
    for name, recipe in _recipes(place).items():
        for row in plan_run(recipe).stages:

            def run(row: StagePlan = row, recipe: Recipe = recipe) -> Figures:
                return _peak(place, recipe, row)

            yield f"{name}, {show_size(row.stage.bandwidth)} px, batch {row.micro_batch}", run


def _peak(place: Place, recipe: Recipe, row: StagePlan) -> Figures:
    device = torch.device(place.device)
    step = our_step(recipe, row.stage.bandwidth, recipe.precision, device, "auto", BlockRunner())
    for _ in range(2):
        step(exact=False)
    peak = peak_memory(step, device)
    ratio = row.memory_bytes / peak if peak else 0.0
    figures: Figures = {
        "GB": peak / 1e9,
        "planned GB": row.memory_bytes / 1e9,
        "planned over measured": ratio,
    }
    # On a CPU the peak is the whole process's.
    if place.device == "cuda" and abs(ratio - 1) > TOLERANCE:
        raise Failed(f"the estimate is off by {ratio - 1:+.0%}", figures)
    return figures


def largest(place: Place) -> Cases:
    """The largest micro-batch at each stage, in steps of a half of a power of two, and its speed."""
    for name, recipe in _recipes(place).items():
        for row in plan_run(recipe).stages:

            def run(row: StagePlan = row, recipe: Recipe = recipe) -> Figures:
                return _largest(place, recipe, row.stage.bandwidth)

            yield f"{name}, {show_size(row.stage.bandwidth)} px", run


def _largest(place: Place, recipe: Recipe, bandwidth: tuple[int, int]) -> Figures:
    batch, fits, speed = 64 if not place.smoke else 2, 0, 0.0
    most = MOST if not place.smoke else 8
    while batch <= most:
        found = _speed(place, recipe, bandwidth, batch)
        if not found:
            break
        batch, fits, speed = 2 * batch, batch, found
    half = fits + fits // 2
    found = _speed(place, recipe, bandwidth, half) if fits and half <= most else 0.0
    if found:
        fits, speed = half, found
    if not fits:
        raise Failed(f"not even {batch} images fit")
    return {"images": fits, "images/s": speed}


def _speed(place: Place, recipe: Recipe, bandwidth: tuple[int, int], batch: int) -> float:
    """Images per second, or 0 where so many do not fit."""
    recipe = recipe.model_copy(update={"batch_size": batch})
    try:
        step = our_step(
            recipe, bandwidth, recipe.precision, torch.device(place.device), "auto", BlockRunner()
        )
        burst(step, 1, place)
        return batch / statistics.median(burst(step, 1, place) for _ in range(3))
    except torch.OutOfMemoryError:
        return 0.0
    finally:
        step = None  # type: ignore[assignment]
        if place.device == "cuda":
            torch.cuda.empty_cache()
