"""Time a training step of a masked autoencoder with MAE's decoder and with the cross-attention decoder.

    python tools/bench_decoder.py [--model vit_base_patch16_224] [--batch 16] [--repeats 2] [--device cpu]
    python tools/bench_decoder.py --task pixio --batch 4

`--task pixio` compares decoders of 32 blocks, with Pixio's class tokens, positions and aligned blocks: its
own, which attends over all patches and predicts every masked one, against cross-attention that predicts every
masked patch, or a quarter of them, drawn by block. `etpp plan` counts their operations. `--clock cpu` counts
processor time, for a processor that others use, too.

A step is mask, forward, loss, backward and AdamW, on random images at full resolution. The decoders run in
turns in one process, after a warm-up: MAE's (8 blocks, every masked patch) against CrossMAE's (12 blocks)
predicting every masked patch and predicting a quarter of all patches. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from etpp_ssl.model.mae import ModelConfig
from etpp_ssl.targets.pixels import PixelsConfig

DEEP = {"depth": 32, "pos_embed": "learned"}
TASKS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "mae": (
        {},
        {
            "mae": {"name": "mae"},
            "cross": {"name": "cross"},
            "cross 0.25": {"name": "cross", "predict_ratio": 0.25},
        },
    ),
    "pixio": (
        {"class_tokens": 8, "pos_embed": "learned", "masking": {"name": "aligned", "block": 2}},
        {
            "pixio": {"name": "mae", **DEEP},
            "cross": {"name": "cross", **DEEP},
            "cross 1/4": {"name": "cross", "predict_ratio": 0.1875, **DEEP},
            "output 1/4": {"name": "cross", "predict_ratio": 0.1875, "reads": "output", **DEEP},
        },
    ),
}
"""Keys of the model, and its decoders by label; the first one is what the others are compared with. A
predict_ratio counts all patches: 0.1875 is a quarter of the masked 0.75."""
WARM_UP_IMAGES = 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Step:
    """A model with its optimizer; each call trains on the next batch and returns the seconds it took.

    Args:
        config: the model.
        size: pixels per side.
        batch: images per step.
        device: where to train.
    """

    def __init__(self, config: ModelConfig, size: int, batch: int, device: torch.device) -> None:
        image_size = (size, size)
        patch_size = config.resolved_patch(image_size, 3)
        self.objective = PixelsConfig().build(patch_size=patch_size, in_chans=3)
        self.masker = config.masker(image_size=image_size, patch_size=patch_size, seed=0)
        torch.manual_seed(0)
        self.model = config.build(image_size=image_size, in_chans=3, num_values=self.objective.num_values).to(
            device
        )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type in ("cpu", "cuda"))
        self.image_size = image_size
        self.images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        self.positions = torch.arange(batch, device=device)

    def __call__(self, precision: str, clock: str = "wall", num_images: int | None = None) -> float:
        """Seconds of one step on the first `num_images` (None is all), device work included."""
        images, positions = self.images[:num_images], self.positions[:num_images]
        device = images.device
        synchronise(device)
        start = CLOCKS[clock]()
        mask = self.masker(positions, self.image_size, 0.0)
        with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
            values, ids_predicted = self.model(images, *mask)
        self.objective(values, ids_predicted, images).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronise(device)
        return CLOCKS[clock]() - start


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="mae", help="(default: %(default)s)")
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="timings (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="(default: %(default)s)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="(default: both)"
    )
    options = parser.parse_args()
    if min(options.batch, options.size, options.repeats) < 1:
        parser.error("--batch, --size and --repeats take 1 or more")

    keys, decoders = TASKS[options.task]
    steps = {
        label: Step(
            ModelConfig(name=options.model, decoder=decoder, **keys),
            options.size,
            options.batch,
            options.device,
        )
        for label, decoder in decoders.items()
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print(
        f"{options.model}, {options.batch} images of {options.size} px, {options.repeats} repeats in turns: "
        f"median (min to max)"
    )
    for precision in options.precision:
        compare(steps, precision, options.repeats, options.clock)


def compare(steps: dict[str, Step], precision: str, repeats: int, clock: str) -> None:
    """Print step times in one precision, and how many times shorter than the first one's they are."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    for step in steps.values():
        step(precision, num_images=WARM_UP_IMAGES)
    for repeat in range(repeats):
        # Turns change places, so that none profits from what another leaves in the caches.
        for label in list(steps)[:: -1 if repeat % 2 else 1]:
            times[label].append(steps[label](precision, clock))
    first = next(iter(steps))
    print(f"\n{precision}")
    for label, own in times.items():
        ratios = [a / b for a, b in zip(times[first], own, strict=True)]
        against = f"   {first} / {label}, pairwise {spread(ratios)}" if label != first else ""
        print(f"  {label:<11}{spread([1000 * t for t in own])} ms{against}")


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
