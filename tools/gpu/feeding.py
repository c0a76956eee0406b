"""What a core loads in a second, against what the device's steps take."""

from __future__ import annotations

import statistics
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from bench_loader import our_pass
from bench_step import our_step
from PIL import Image

from etpp_ssl.data.sources.found import find_images
from etpp_ssl.data.views import TrainView
from etpp_ssl.model.attention import BlockRunner
from etpp_ssl.recipe import Recipe
from gpu.arithmetic import step_recipe
from gpu.parts import Cases, Figures, Place
from gpu.results import ROOT
from gpu.speed import RECIPES, burst

SIDES = (500, 375)
"""Of the JPEGs that are made where there are none: as ImageNet's are on average, 110 kB of them."""
REPLAY = {96: 4, 160: 2, 224: 1}
"""How often an image is trained on in the paper's stages with replay."""


def feeding(place: Place) -> Cases:
    """One process and thread, from the page cache; a step of ViT-S and ViT-B at 256 images."""
    files = _files(place)
    for size, times in (REPLAY if not place.smoke else {96: 4}).items():

        def run(size: int = size, times: int = times) -> Figures:
            rate = _rate(files, size, place)
            figures: Figures = {"images/s per core": rate}
            for model in ("S", "B") if not place.smoke else ("tiny",):
                demand = _demand(place, model, size)
                figures[f"ViT-{model} images/s"] = demand
                figures[f"cores for ViT-{model}"] = demand / rate
                figures[f"cores with replay, ViT-{model}"] = demand / rate / times
            return figures

        yield f"{size} px", run


def _files(place: Place) -> list[Path]:
    count = 256 if not place.smoke else 8
    if place.images is not None:
        names = find_images(place.images / "train").paths()
        return [place.images / "train" / name for name in islice(names, 0, None, 37)][:count]
    draw = np.random.default_rng(0)
    files = []
    for number in range(min(count, 64)):
        coarse = Image.fromarray(draw.integers(256, size=(90, 120, 3), dtype=np.uint8))
        files.append(place.folder / f"{number:03d}.jpg")
        coarse.resize(SIDES, Image.Resampling.BICUBIC).save(files[-1], quality=92)
    return files


def _rate(files: list[Path], size: int, place: Place) -> float:
    torch.set_num_threads(1)
    view = TrainView((224, 224), (0.2, 1.0), True, False, 0)
    seconds = []
    for _ in range(4 if not place.smoke else 2):
        start = time.perf_counter()
        our_pass(files, view, size)
        seconds.append(time.perf_counter() - start)
    return len(files) / statistics.median(seconds[1:])


def _demand(place: Place, model: str, size: int) -> float:
    if place.smoke:
        recipe, size = step_recipe(place), 24
    else:
        keys = ["batch_size=256", "micro_batch_size=null"]
        recipe = Recipe.load(ROOT / "recipes" / f"{RECIPES[model]}.yaml", keys)
    step = our_step(recipe, (size, size), recipe.precision, torch.device(place.device), "auto", BlockRunner())
    burst(step, 3, place)
    count = 10 if not place.smoke else 1
    return recipe.batch_size * count / burst(step, count, place)
