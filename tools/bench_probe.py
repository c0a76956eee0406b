"""Time what probes on features do: extraction, the sweep of linear heads, nearest neighbours.

    python tools/bench_probe.py [--images 64] [--batch 32] [--size 224] [--precisions fp32 bf16]
                                [--features 50000] [--queries 10000] [--width 192] [--epochs 3]
                                [--repeats 3] [--device cpu]

Extraction goes from pictures in memory, at their final size, through the evaluation view and a ViT-Ti/16
to features; the plain forward gets the same batches, normalised beforehand. What is compared runs in turns
in one process, after a warm-up. The goals that are printed are for two CPU cores; nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator
from PIL import Image

from etpp_ssl.data.formats.base import Picture
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.evaluation.features import EvaluationLoader, extract_features, pooled_features
from etpp_ssl.evaluation.knn import knn_sweep
from etpp_ssl.evaluation.linear_cached import LinearCachedConfig, train_heads
from etpp_ssl.model.mae import ModelConfig
from etpp_ssl.randomness import keyed_numpy

NUM_CLASSES = 10
RATE_GOAL, KNN_GOAL = 0.9, 5.0
"""Wanted: extraction at this share of the plain forward's rate at least, neighbours in so many seconds."""


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="to extract from (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images of a forward (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument(
        "--precisions", nargs="*", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="of extraction"
    )
    parser.add_argument("--features", type=int, default=50_000, help="of training (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=10_000, help="for kNN (default: %(default)s)")
    parser.add_argument("--width", type=int, default=192, help="of a feature (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of the heads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timings (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=None, help="(default: accelerate's)")
    options = parser.parse_args()
    numbers = (options.images, options.batch, options.features, options.queries, options.width)
    if min(*numbers, options.epochs, options.repeats) < 1 or options.size < 16 or options.size % 16:
        parser.error("numbers are 1 or more, and --size is a multiple of 16")

    accelerator = Accelerator(cpu=options.device is not None and options.device.type == "cpu")
    device = accelerator.device
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    print(f"{options.repeats} repeats in turns: median (min to max)")
    for precision in options.precisions:
        compare_extraction(accelerator, precision, options)
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(options.features, options.width, generator=generator).to(device)
    labels = torch.randint(0, NUM_CLASSES, (options.features,), generator=generator).to(device)
    queries = torch.randn(options.queries, options.width, generator=generator).to(device)
    compare_heads(train, labels, options.epochs, options.repeats)
    compare_neighbours(train, labels, queries, options.repeats)


class InMemory:
    """Pictures of noise, kept decoded."""

    def __init__(self, count: int, size: int) -> None:
        self.classes: list[str] | None = [str(label) for label in range(NUM_CLASSES)]
        shape = (size, size, 3)
        draws = [keyed_numpy(0, "bench", i) for i in range(count)]
        self.pictures = [Image.fromarray(draw.integers(0, 256, shape, dtype="uint8")) for draw in draws]

    def __len__(self) -> int:
        return len(self.pictures)

    def open(self, index: int) -> Picture:
        """See `ImageSource`."""
        return DecodedPicture((self.pictures[index],))

    def label(self, index: int) -> int:
        """See `ImageSource`."""
        return index % NUM_CLASSES

    def name(self, index: int) -> str:
        """See `ImageSource`."""
        return str(index)

    def fingerprint(self) -> str:
        """See `ImageSource`."""
        return f"noise/{len(self)}"


def compare_extraction(accelerator: Accelerator, precision: str, options: argparse.Namespace) -> None:
    """Print the rates of extraction and of the forward alone."""
    device, size = accelerator.device, (options.size, options.size)
    source, view = InMemory(options.images, options.size), EvalView(size, 1.0)
    normalise = Normalise((0.5,) * 3, (0.25,) * 3, device)
    torch.manual_seed(0)
    model = ModelConfig(name="vit", patch_size=16, embed_dim=192, depth=12, num_heads=3)
    encoder = model.build(image_size=size, in_chans=3, num_values=768).encoder.to(device).eval()
    pixels = torch.stack([view(source.open(i), i, size) for i in range(len(source))]).to(device)
    batches = [normalise(part) for part in pixels.split(options.batch)]

    def plain() -> None:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            for images in batches:
                pooled_features(encoder, images, "avg")

    def extraction() -> None:
        extract_features(
            EvaluationLoader(accelerator=accelerator, view=view, normalise=normalise, num_workers=0),
            encoder,
            source,
            list(range(len(source))),
            pool="avg",
            batch_size=options.batch,
            precision=precision,
        )

    times = in_turns({"plain": plain, "extraction": extraction}, device, options.repeats)
    shares = [a / b for a, b in zip(times["plain"], times["extraction"], strict=True)]
    print(f"\nViT-Ti/16 at {options.size}, {options.images} images, {precision}")
    for name, seconds in times.items():
        print(f"  {name:26}{spread([options.images / t for t in seconds])} images/s")
    print(f"  ratio, pairwise           {spread(shares)}     goal {RATE_GOAL:g} or more")


def compare_heads(train: torch.Tensor, labels: torch.Tensor, epochs: int, repeats: int) -> None:
    """Print the time of the default sweep against that of its heads one after another."""
    config = LinearCachedConfig()
    settings = [(lr, decay) for lr in config.base_lrs for decay in config.weight_decays]

    def heads(settings: list[tuple[float, float]]) -> None:
        train_heads(
            train,
            labels,
            num_classes=NUM_CLASSES,
            settings=settings,
            epochs=epochs,
            batch_size=config.batch_size,
            seed=0,
        )

    routes = {
        "in one pass": lambda: heads(settings),
        "one after another": lambda: [heads([setting]) for setting in settings],
    }
    times = in_turns(routes, train.device, repeats)
    print(f"\n{len(settings)} linear heads, {tuple(train.shape)}, seconds per epoch")
    for name, seconds in times.items():
        print(f"  {name:26}{spread([t / epochs for t in seconds])} s")


def compare_neighbours(
    train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, repeats: int
) -> None:
    """Print the time of one vote and of a sweep."""
    pairs = [(k, t) for k in (5, 10, 20, 50, 100) for t in (0.02, 0.04, 0.07, 0.1, 0.2)]
    routes = {
        "k = 20": lambda: knn_sweep(train, labels, queries, num_classes=NUM_CLASSES, pairs=[(20, 0.07)]),
        f"{len(pairs)} votes, k to 100": lambda: knn_sweep(
            train, labels, queries, num_classes=NUM_CLASSES, pairs=pairs
        ),
    }
    times = in_turns(routes, train.device, repeats)
    print(f"\nkNN, {tuple(train.shape)} and {tuple(queries.shape)}")
    for name, seconds in times.items():
        print(f"  {name:26}{spread(seconds)} s   goal {KNN_GOAL:g} or less")


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
