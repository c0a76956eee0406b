"""What a GPU computes, against the CPU: float64 for real numbers, the same bits for draws.

An error is the norm of the difference over the norm of what is right. Bounds are a few times what a CPU has
in the same precision; TF32 where float32 is promised would be hundreds of times above its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.augmentation import RandomErasing
from etpp_ssl.model.attention import PLAIN, BlockRunner
from etpp_ssl.model.mask_patterns import BlockMaskingConfig, GridMaskingConfig, UniformMaskingConfig
from etpp_ssl.model.masking import Masker
from etpp_ssl.randomness import freshly_initialised, keyed_words
from etpp_ssl.recipe import Recipe
from etpp_ssl.targets.hog import _histograms, hog_features
from etpp_ssl.tasks.mae import MaskedAutoencoding
from gpu.parts import Cases, Failed, Figures, Place, bounded, same

FLOAT32 = 2e-6
HOG_CELL, HOG_CELLS = 1e-3, 2e-3
"""A cell is off beyond this error; so many may be: an angle on the border of two bins falls into either."""
STEP = {"fp32": (1e-6, 2e-5), "tf32": (1e-3, 5e-3), "bf16": (2e-2, 8e-2), "fp16": (3e-3, 1e-2)}
"""Bounds of a step's loss and of its gradients, by precision."""
SCALE = 2.0**12
"""Of a loss in fp16, as the scaler's."""


def error_of(found: Tensor, right: Tensor) -> float:
    """The relative error, in float64 on the CPU."""
    right = right.detach().double().cpu()
    return float((found.detach().double().cpu() - right).norm() / right.norm())


@contextmanager
def tf32(allowed: bool, device: str) -> Iterator[None]:
    """Whether float32 products may be of reduced precision; on a CPU, in bfloat16 where it can."""
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = ("tf32" if device == "cuda" else "bf16") if allowed else "ieee"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def crop(place: Place) -> Cases:
    """Its error is float32's with TF32 on, inside autocast and of images in half precision."""
    size, batch = ((224, 224), 64) if not place.smoke else ((56, 40), 2)
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    for share in (3 / 7, 5 / 7, 101 / 112):
        bandwidth = (round(size[0] * share), round(size[1] * share))

        def exact(dtype: torch.dtype, bandwidth: tuple[int, int] = bandwidth) -> Tensor:
            return low_frequency_crop(images.to(dtype).double(), bandwidth)

        for name, dtype, reduced, autocast in (
            ("float32", torch.float32, False, None),
            ("float32, TF32 on", torch.float32, True, None),
            ("float32 in bf16 autocast", torch.float32, True, torch.bfloat16),
            ("of bfloat16", torch.bfloat16, True, torch.bfloat16),
            ("of float16", torch.float16, True, torch.float16),
        ):

            def run(
                dtype: torch.dtype = dtype,
                reduced: bool = reduced,
                autocast: torch.dtype | None = autocast,
                exact: Callable[[torch.dtype], Tensor] = exact,
                bandwidth: tuple[int, int] = bandwidth,
            ) -> Figures:
                there = images.to(place.device, dtype)
                within = torch.autocast(
                    place.device, autocast or torch.bfloat16, enabled=autocast is not None
                )
                with tf32(reduced, place.device), within:
                    found = low_frequency_crop(there, bandwidth)
                if found.dtype != torch.float32:
                    raise Failed(f"the crop is {found.dtype}")
                return bounded(error_of(found, exact(dtype)), FLOAT32)

            yield f"{bandwidth[0]} px, {name}", run


def hog(place: Place) -> Cases:
    """Histograms; also inside autocast, and twice the same bits where they must be."""
    batch, size = (16, 224) if not place.smoke else (2, 48)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    right = _histograms(F.pad(images.double(), (1, 1, 1, 1), mode="reflect"), (8, 8), 9)
    right = right.permute(0, 1, 4, 2, 3)

    def run(autocast: bool) -> Figures:
        with torch.autocast(place.device, torch.bfloat16, enabled=autocast), tf32(True, place.device):
            found = hog_features(images.to(place.device), 8)
        errors = (found.double().cpu() - right).norm(dim=2)
        off = float((errors > HOG_CELL).double().mean())
        return bounded(off, HOG_CELLS, median=float(errors.median()))

    def twice() -> Figures:
        torch.use_deterministic_algorithms(True)
        try:
            there = images.to(place.device)
            first, second = hog_features(there, 8), hog_features(there, 8)
        finally:
            torch.use_deterministic_algorithms(False)
        return same(torch.equal(first, second), "two passes")

    yield "float32", lambda: run(False)
    yield "in bf16 autocast, TF32 on", lambda: run(True)
    yield "deterministic", twice


def masks(place: Place) -> Cases:
    """Every draw of a sample is integer arithmetic, the same on any device."""
    ids = torch.arange(3, 67 if not place.smoke else 9)
    there = ids.to(place.device)
    grids = ((14, 14), (10, 7), (6, 6))

    def words() -> Figures:
        found = keyed_words(5, "mask", there, 196).cpu()
        return same(torch.equal(found, keyed_words(5, "mask", ids, 196)), "words")

    yield "words", words
    for pattern in (UniformMaskingConfig(), BlockMaskingConfig(), GridMaskingConfig()):

        def run(pattern: Any = pattern) -> Figures:
            masker = Masker(pattern, 0.75, 0.5, (16, 16), seed=7, min_valid=0.3)
            for grid in grids:
                size = (16 * grid[0], 16 * grid[1])
                valid = torch.rand(len(ids), 1, *size, generator=torch.Generator().manual_seed(2)) > 0.5
                for gaps in (None, valid):
                    counted = None if gaps is None else masker.counted(gaps)
                    on_device = None if gaps is None else masker.counted(gaps.to(place.device))
                    right = masker(ids, size, 0.5, counted)
                    found = masker(there, size, 0.5, on_device)
                    if not all(torch.equal(a.cpu(), b) for a, b in zip(found, right, strict=True)):
                        raise Failed(
                            f"masks of {grid} differ, {'with' if gaps is not None else 'without'} gaps"
                        )
            return same(True, "masks")

        yield f"{pattern.name} masks", run

    def erasing() -> Figures:
        erase, images = RandomErasing(0.5, 3), torch.zeros(len(ids), 3, 48, 32)
        boxes = torch.equal(erase.boxes(there, 48, 32).cpu(), erase.boxes(ids, 48, 32))
        noise = error_of(erase(images.to(place.device), there), erase(images, ids))
        return bounded(noise if boxes else math.inf, FLOAT32)

    yield "random erasing", erasing
    yield "drop-path", lambda: _drop_path(place, ids)


def _drop_path(place: Place, ids: Tensor) -> Figures:
    """Outputs of a classifier in training, whose blocks are dropped sample by sample."""
    from etpp_ssl.model.classifier import ClassifierConfig

    config = ClassifierConfig.model_validate_json(
        '{"name": "vit", "patch_size": [4, 4], "embed_dim": 24, "depth": 4, "num_heads": 2, "drop_path": 0.5}'
    )
    model = freshly_initialised(
        0, lambda: config.build(image_size=(16, 16), in_chans=3, num_classes=5, seed=9)
    ).train()
    images = torch.randn(len(ids), 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        right = model.double()(images.double(), ids)
        model.float().to(place.device)
        found = model(images.to(place.device), ids.to(place.device))
    # A block that is dropped for another sample is an error of order one.
    return bounded(error_of(found, right), 1e-5)


def step_recipe(place: Place, *overrides: str) -> Recipe:
    """ViT-S at 224 pixels, or a tiny one at 32."""
    tiny = ("image_size=32", "model={name: vit, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
            "model.decoder={name: mae, embed_dim: 16, depth: 1, num_heads: 2}")  # fmt: skip
    recipe = (
        "image_size: 224\nmodel: {name: vit_small_patch16_224}\ndata: {name: synthetic, num_images: 64}\n"
    )
    return Recipe.parse(
        f"{recipe}output: unused\nbudget_epochs: 1\nbatch_size: 8\n",
        [*(tiny if place.smoke else ()), *overrides],
    )


def gradients(place: Place) -> Cases:
    """A whole forward and backward pass of the task, from images that are cropped and masked the same."""
    overrides = {
        "pixels and HOG": ("target=combined",),
        "cross decoder": ("model.decoder.name=cross",),
        "learned positions": ("model.pos_embed=learned",),
    }
    for name, keys in overrides.items():
        recipe = step_recipe(place, *keys)
        size = recipe.size[0]
        bandwidth = (size * 5 // 7 // 16 * 16,) * 2 if not place.smoke else (24, 24)
        right = loss_and_gradients(recipe, bandwidth, "cpu", "fp64")
        for precision, bounds in STEP.items():

            def run(
                precision: str = precision,
                bounds: tuple[float, float] = bounds,
                recipe: Recipe = recipe,
                bandwidth: tuple[int, int] = bandwidth,
                right: tuple[Tensor, Tensor] = right,
            ) -> Figures:
                if precision in ("tf32", "fp16"):
                    place.needs_gpu()
                loss, gradient = loss_and_gradients(recipe, bandwidth, place.device, precision)
                of_loss = error_of(loss, right[0])
                if not of_loss <= bounds[0]:
                    raise Failed(f"the loss is off by {of_loss:.2g}, more than {bounds[0]:.2g}")
                return bounded(error_of(gradient, right[1]), bounds[1], loss_error=of_loss)

            yield f"{name}, {precision}", run


def loss_and_gradients(
    recipe: Recipe,
    bandwidth: tuple[int, int],
    device: str,
    precision: str,
    runner: BlockRunner = PLAIN,
) -> tuple[Tensor, Tensor]:
    """The loss of a step, and the gradients of all parameters in one row, float64 on the CPU."""
    model = freshly_initialised(0, recipe.build_model).train()
    model.run_blocks_by(runner)
    task = MaskedAutoencoding(recipe, model, torch.device("cpu"))
    levels = torch.randint(256, (8, 3, *recipe.size), generator=torch.Generator().manual_seed(4)).float()
    batch: Any = SimpleNamespace(images=levels, sample_ids=torch.arange(8), has_gaps=False)
    inputs = task.inputs(batch, SimpleNamespace(bandwidth=bandwidth, progress=0.5))
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model.to(device, dtype)
    images = inputs.pop("images").to(device, dtype)
    inputs = {"images": images, **{name: ids.to(device) for name, ids in inputs.items()}}
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with tf32(precision == "tf32", device):
        with torch.autocast(device, half or torch.bfloat16, enabled=half is not None):
            output = task.forward(model, inputs)
        loss = task.losses(output, inputs)["loss"]
        scale = SCALE if precision == "fp16" else 1.0
        (loss * scale).backward()
    parts = [p.grad.double().flatten().cpu() / scale for p in model.parameters() if p.grad is not None]
    return loss, torch.cat(parts)
