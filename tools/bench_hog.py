"""Time the HOG target against a training step of ViT-B/16 MAE, and against the plain dense histogram.

    python tools/bench_hog.py [--batch 16] [--size 224] [--repeats 3] [--precisions fp32 bf16] [--device cpu]

A step is forward, backward and AdamW with the target given. Both run in turns in one process, after a
warm-up. The goal that is printed beside the ratio is for two CPU cores; nothing is asserted.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor

from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import num_visible, random_masking, removed_ids
from etpp_ssl.model.patches import gather_patches, grid_of, patchify
from etpp_ssl.targets.hog import HogConfig, hog_features
from etpp_ssl.targets.pixels import PixelsConfig

GOAL = 5.0
"""Wanted share of a step, in percent, at most."""
CELL, BINS = 8, 9


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timings (default: %(default)s)")
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="of the steps"
    )
    parser.add_argument("--device", type=torch.device, default="cpu", help="(default: %(default)s)")
    options = parser.parse_args()
    if min(options.batch, options.repeats) < 1 or options.size < 16 or options.size % 16:
        parser.error("--batch and --repeats take 1 or more, --size a multiple of 16")

    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print(f"{tuple(images.shape)}, {options.repeats} repeats in turns: median (min to max)")
    compare_targets(images, max(5, options.repeats))
    for precision in options.precisions:
        compare_with_step(images, precision, options.repeats)


def compare_targets(images: Tensor, repeats: int) -> None:
    """Print timings and agreement of the ways to a target."""
    hog, pixels = (config.build(patch_size=(16, 16), in_chans=3) for config in (HogConfig(), PixelsConfig()))
    _, ids_removed = mask(images)

    def of_all_patches() -> Tensor:
        features = hog_features(images, CELL, BINS).flatten(1, 2)
        return gather_patches(patchify(features, hog.cells_per_patch), ids_removed)

    routes = {
        "plain dense histogram": lambda: plain_hog(images),
        "hog_features": lambda: hog_features(images, CELL, BINS),
        "hog of all, 3/4 taken": of_all_patches,
        "hog target, 3/4 masked": lambda: hog.target(images, ids_removed),
        "pixel target, 3/4 masked": lambda: pixels.target(images, ids_removed),
    }
    times = in_turns(routes, images.device, repeats)
    print()
    for name in routes:
        print(f"  {name:26}{spread([1000 * t for t in times[name]])} ms")
    difference = (hog_features(images, CELL, BINS) - plain_hog(images)).abs().max()
    print(f"  largest difference of hog_features from the plain histogram {difference:.1e}")


def compare_with_step(images: Tensor, precision: str, repeats: int) -> None:
    """Print the target's time as a share of a step's."""
    objective = HogConfig().build(patch_size=(16, 16), in_chans=3)
    size = (images.shape[2], images.shape[3])
    model = ModelConfig().build(image_size=size, in_chans=3, num_values=objective.num_values)
    model.to(images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids_keep, ids_removed = mask(images)
    target = objective.target(images, ids_removed)
    routes = {
        "step": lambda: train_step(model, optimizer, images, ids_keep, target, precision),
        "target": lambda: objective.target(images, ids_removed),
    }
    times = in_turns(routes, images.device, repeats)
    shares = [100 * t / step for t, step in zip(times["target"], times["step"], strict=True)]
    print(f"\nViT-B/16 MAE step, {precision}")
    print(f"  step                      {spread([1000 * t for t in times['step']])} ms")
    print(f"  hog target                {spread([1000 * t for t in times['target']])} ms")
    print(f"  share, pairwise           {spread(shares)} %   goal {GOAL:g} or less")


def train_step(
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    ids_keep: Tensor,
    target: Tensor,
    precision: str,
) -> None:
    """Forward, backward, AdamW."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        values = model(images, ids_keep).values_BMV
    (values.float() - target).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def plain_hog(images: Tensor) -> Tensor:
    """The definition as one writes it down: convolutions, a histogram per pixel, sums over cells."""
    batch, channels, height, width = images.shape
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=images.device)
    kernel = kernel.expand(channels, 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx, gy = F.conv2d(padded, kernel, groups=channels), F.conv2d(padded, kernel.mT, groups=channels)
    level = (torch.atan2(gx, gy) / math.pi * BINS).floor().long() % BINS
    dense = images.new_zeros(batch, channels, BINS, height, width)
    dense.scatter_add_(2, level[:, :, None], torch.hypot(gx, gy)[:, :, None])
    cells = dense.unflatten(4, (width // CELL, CELL)).unflatten(3, (height // CELL, CELL)).sum((4, 6))
    return F.normalize(cells, dim=2)


def mask(images: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of the visible and of the masked patches, three of four masked."""
    grid = grid_of((images.shape[2], images.shape[3]), (16, 16))
    num_patches = grid[0] * grid[1]
    positions = torch.arange(len(images), device=images.device)
    ids_keep = random_masking(positions, num_patches, num_visible(num_patches, 0.75), seed=0)
    return ids_keep, removed_ids(ids_keep, num_patches)


def in_turns(
    routes: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, device work included; the first turn is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    for repeat in range(-1, repeats):
        # The order turns round, so that none profits from what another leaves in the caches.
        for name in sorted(routes, reverse=repeat % 2 == 1):
            synchronise(device)
            start = time.perf_counter()
            routes[name]()
            synchronise(device)
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):8.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
