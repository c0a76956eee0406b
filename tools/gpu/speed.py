"""How fast training steps are, what keeps the host waiting in them, and what the loop adds to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from bench_step import original_step, our_step, product_rate
from torch.utils.data import Dataset

from etpp_ssl.data.loader import Batch
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.model.attention import BlockRunner
from etpp_ssl.recipe import Recipe
from etpp_ssl.tasks.mae import MaskedAutoencoding
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.plan import cost_of
from etpp_ssl.train.run import Run
from gpu.arithmetic import step_recipe
from gpu.parts import Cases, Failed, Figures, Place, Skipped
from gpu.results import ROOT
from gpu.runs import FINETUNE, PRETRAIN, at_step_end, recipe_of, trained
from gpu.synchronisations import waits_of_steps

RECIPES = {
    "S": "imagenette_vit_small", "B": "in1k_vit_base_etpp400",
    "L": "in1k_vit_large_etpp", "H": "in1k_vit_huge14_etpp",
}  # fmt: skip
STEPS = (
    ("B", 224, 256), ("B", 96, 256), ("L", 224, 256), ("B", 160, 256), ("S", 224, 256), ("S", 96, 256),
    ("L", 96, 256), ("H", 224, 128), ("B", 224, 64), ("B", 224, 1024), ("B", 96, 1024), ("S", 224, 1024),
    ("S", 160, 256), ("L", 160, 256), ("H", 98, 128), ("H", 168, 128),
)  # fmt: skip
"""Models, bandwidths and batches, those with a goal first."""
GOALS = {("B", 224): "1.5 of original", ("B", 96): "2 of original", ("L", 224): "share 0.45"}
WITH_SGD, FP16 = "classifier with SGD", "fp16"
TURNS, BURST_SECONDS = 5, 0.4
PRODUCT = 8192
"""Side of the matrix products that a GPU's rate is measured by."""


def waits(place: Place) -> Cases:
    """Waits of each step but a stage's first; on a CPU, those that a GPU would have."""
    cross = "model.decoder={name: cross, embed_dim: 32, depth: 1, num_heads: 2}"
    kinds: dict[str, tuple[str, ...]] = {
        "pre-training": (PRETRAIN,),
        "pixels and HOG, micro-batches, clipped": (
            PRETRAIN, "target=combined", "micro_batch_size=6", "optim.clip_grad=1.0"
        ),
        "cross decoder, learned positions": (PRETRAIN, "model.pos_embed=learned", cross),
        "compiled": (PRETRAIN, "model.compiled=true"),
        "classifier": (FINETUNE,),
        WITH_SGD: (FINETUNE, "optim.name=sgd"),
        FP16: (PRETRAIN, "precision=fp16"),
    }  # fmt: skip
    for name, (text, *keys) in kinds.items():
        if place.smoke and name in ("compiled", FP16):
            continue

        def run(name: str = name, text: str = text, keys: Any = keys) -> Figures:
            # Whether a step was finite is read before the optimizer steps.
            allowed = 1 if name in (WITH_SGD, FP16) else 0
            recipe = recipe_of(
                place, name.replace(" ", "_").replace(",", ""), text, "deterministic=false", *keys
            )
            opened = open_run(recipe)
            opened.late_verdicts = allowed == 0 if place.device == "cpu" else None
            steps = waits_of_steps(opened)
            most = max(len(step) for step in steps)
            figures: Figures = {"steps": len(steps), "most in a step": most, "allowed": allowed}
            if most > allowed:
                raise Failed(next(step for step in steps if len(step) == most)[0], figures)
            return figures

        yield name, run


@contextmanager
def instant_loading() -> Iterator[None]:
    """Runs inside get the same images again and again, at once, pinned where they would be."""
    made: dict[tuple[Any, ...], Batch] = {}

    def load(
        builder: Dataset[Batch], requests: Iterable[BatchRequest], *, pin_memory: bool, **others: Any
    ) -> Generator[Batch, None, None]:
        for request in requests:
            key = (len(request.indices), request.bandwidth)
            if key not in made:
                made[key] = builder[request]
            like = made[key]
            batch = Batch(
                like.images, like.labels, torch.tensor(request.sample_ids), request.sample_ids[0], request, ()
            )
            yield batch.pin_memory() if pin_memory else batch

    with patch("etpp_ssl.train.batches.load_batches", load):
        yield


def loop_recipe(place: Place, *overrides: str) -> Recipe:
    """A run of some dozen steps: ViT-B at three stages, or a tiny one."""
    shares = {96: 0.12, 160: 0.29, 224: 0.59} if not place.smoke else {16: 0.3, 32: 0.7}
    table = ", ".join(f"{{bandwidth: {size}, share: {share}}}" for size, share in shares.items())
    stages = f"curriculum={{name: efficienttrain, stages: [{table}]}}"
    batch, images = (256, 4096) if not place.smoke else (8, 96)
    name = () if place.smoke else ("model.name=vit_base_patch16_224", "precision=bf16")
    return step_recipe(
        place, stages, *name, f"batch_size={batch}", f"data.num_images={images}", "budget_epochs=2",
        "data.num_workers=0", "log_every_steps=1000", "checkpoint.every_minutes=null",
        f"output={place.folder / 'loop'}", *overrides,
    )  # fmt: skip


def gaps(place: Place) -> Cases:
    """The last stage's and the first stage's steps in the loop, against the time that kernels take."""
    yield "ViT-B" if not place.smoke else "tiny", lambda: loop_gaps(place)


def loop_gaps(place: Place) -> Figures:
    """Milliseconds of a step at each stage, in the loop and of it in kernels, from two windows of steps."""
    recipe = loop_recipe(place)
    figures: Figures = {}
    started: dict[str, float] = {}
    kernels: list[Any] = []

    def note(run: Run) -> None:
        stage = run.curriculum.stage_at(run.state.step - 1)
        done, size = run.state.step - stage.first_step, stage.bandwidth[0]
        quarter = max(1, stage.num_steps // 4)
        if done in (quarter, 2 * quarter, 3 * quarter):
            _wait(place)
        if done == quarter:
            started["time"] = time.perf_counter()
        elif done == 2 * quarter:
            figures[f"{size} px ms"] = 1000 * (time.perf_counter() - started["time"]) / quarter
            if place.device == "cuda":
                kernels.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]))
                kernels[-1].__enter__()
        elif done == 3 * quarter and kernels:
            kernels[-1].__exit__(None, None, None)
            busy = (
                sum(event.self_device_time_total for event in kernels.pop().key_averages()) / 1000 / quarter
            )
            figures[f"{size} px in kernels"] = busy / float(figures[f"{size} px ms"])

    with instant_loading(), at_step_end(note):
        trained(recipe)
    return figures


def _wait(place: Place) -> None:
    if place.device == "cuda":
        torch.cuda.synchronize()


def steps(place: Place) -> Cases:
    """All ways to take a step in turns, each for `BURST_SECONDS`."""
    for model, size, batch in STEPS if not place.smoke else (("tiny", 24, 2),):

        def run(model: str = model, size: int = size, batch: int = batch) -> Figures:
            return time_steps(place, model, size, batch)

        yield f"ViT-{model}, {size} px, batch {batch}", run


def time_steps(place: Place, model: str, size: int, batch: int) -> Figures:
    """Images per second of each way, ratios to the others' code, and the share of the matrix rate."""
    device, precision = torch.device(place.device), "bf16" if not place.smoke else "fp32"
    path = ROOT / "recipes" / f"{RECIPES.get(model)}.yaml"
    recipe = step_recipe(place) if place.smoke else Recipe.load(path)
    recipe = recipe.model_copy(update={"batch_size": batch, "micro_batch_size": None})
    bandwidth = (size, size)
    ways: dict[str, Callable[..., list[float]]] = {}
    ways["eager"] = our_step(recipe, bandwidth, precision, device, "auto", BlockRunner())
    if not place.smoke:
        ways["compiled"] = our_step(recipe, bandwidth, precision, device, "auto", BlockRunner(compiled=True))
    if place.original is not None:
        ways["original"] = original_step(recipe, bandwidth, precision, device, place.original)
    with_transformers = transformers_step(recipe, bandwidth, precision, device)
    if with_transformers is not None:
        ways["transformers"] = with_transformers
    try:
        seconds = in_turns(ways, place)
    except torch.OutOfMemoryError:
        raise Skipped("not enough memory for this batch") from None
    figures: Figures = {name: batch / statistics.median(times) for name, times in seconds.items()}
    best = min(("eager", "compiled"), key=lambda way: statistics.median(seconds.get(way, [float("inf")])))
    for other in ("original", "transformers"):
        if other in seconds:
            ratios = [b / a for a, b in zip(seconds[best], seconds[other], strict=True)]
            figures[f"of {other}"] = statistics.median(ratios)
    with torch.device("meta"):
        model_without_memory = recipe.build_model()
    task = MaskedAutoencoding(recipe, model_without_memory, torch.device("cpu"))
    flops = cost_of(task, SimpleNamespace(bandwidth=bandwidth, progress=1.0)).flops * batch
    figures["share of matrix rate"] = flops / statistics.median(seconds[best]) / matrix_rate(place, precision)
    if (model, size) in GOALS:
        figures["goal"] = GOALS[model, size]
    return figures


@cache
def matrix_rate(place: Place, precision: str) -> float:
    """Operations per second of large products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return product_rate(dtype, torch.device(place.device), PRODUCT if not place.smoke else 256)


def in_turns(ways: dict[str, Callable[..., list[float]]], place: Place) -> dict[str, list[float]]:
    """Seconds per step of each way in each turn; turns change direction."""
    counts = {}
    for name, step in ways.items():
        for _ in range(3):
            one = burst(step, 1, place)
        counts[name] = max(1, min(100, round(BURST_SECONDS / one))) if not place.smoke else 1
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            seconds[name].append(burst(ways[name], counts[name], place) / counts[name])
    return seconds


def burst(step: Callable[..., list[float]], count: int, place: Place) -> float:
    """Seconds of so many steps, among which nothing waits."""
    _wait(place)
    start = time.perf_counter()
    for _ in range(count):
        step(exact=False)
    _wait(place)
    return time.perf_counter() - start


def transformers_step(
    recipe: Recipe, bandwidth: tuple[int, int], precision: str, device: torch.device
) -> Callable[..., list[float]] | None:
    """The same step with transformers' ViTMAE, or None where that is not installed."""
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        return None
    _, encoder = recipe.model.encoder_args(recipe.size, recipe.in_chans)
    decoder = recipe.model.decoder
    config = ViTMAEConfig(
        hidden_size=encoder["embed_dim"],
        num_hidden_layers=encoder["depth"],
        num_attention_heads=encoder["num_heads"],
        intermediate_size=4 * encoder["embed_dim"],
        image_size=bandwidth[0],
        patch_size=recipe.patch_size[0],
        num_channels=recipe.in_chans,
        decoder_hidden_size=decoder.embed_dim,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=4 * decoder.embed_dim,
        mask_ratio=recipe.model.final_mask_ratio,
        norm_pix_loss=True,
    )
    model = ViTMAEForPreTraining(config).train()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = torch.randn(recipe.batch_size, recipe.in_chans, *bandwidth, device=device)

    def step(exact: bool = True) -> list[float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return []

    return step
