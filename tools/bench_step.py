"""Time the training step of a recipe at every stage, and against the original MAE code.

    python tools/bench_step.py RECIPE [key=value ...] [--batch 16] [--stages 0,2] [--precision fp32,bf16]
        [--modes eager,compiled] [--attention auto,fused,unfused] [--repeats 6] [--against CLONE]

The step is the one of `train/loop.py`: crop, mask, forward, loss, backward, AdamW; images are random
and on the device already. All variants of a stage take turns in one process; ratios are pairwise within a
turn, of the variant to the first one that is listed (with `--against`, to the original). A share of the
machine's own rate is of 2048^3 matrix products, measured before each stage in the same precision.

`--against CLONE` times `models_mae` of a clone of facebookresearch/mae at CLONE (see `original_mae.py`), at
the recipe's dimensions, batch and bandwidth, as published (AdamW as torch makes it) in float32, and under
bf16 autocast.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from original_mae import is_clone, original_model
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.model.attention import AttentionName, BlockRunner
from etpp_ssl.model.patches import grid_of
from etpp_ssl.model.timm_net import use_attention
from etpp_ssl.recipe import Recipe
from etpp_ssl.tasks.mae import MaskedAutoencoding
from etpp_ssl.train.plan import cost_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("prepare", "forward", "target and loss", "backward", "optimizer")
WARM_UP = 2
PRODUCT = 2048


@dataclass
class Variant:
    """One way to take a step, and its times."""

    name: str
    dtype: torch.dtype
    step: Callable[[], list[float]]
    """Takes a step; returns the seconds of its parts."""
    seconds: list[float] = field(default_factory=list)
    parts: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0
    first_seconds: float = 0.0


def main() -> None:
    """Parse, time, print."""
    options = _options()
    try:
        recipe = Recipe.load(options.recipe, options.overrides)
        recipe = recipe.model_copy(update={"batch_size": options.batch, "micro_batch_size": None})
        curriculum = recipe.build_curriculum(recipe.data.num_images or 10**6)
    except UserError as error:
        sys.exit(f"bench_step: {error}")
    device = torch.device(options.device)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_device_name(device)}; "
        f"batch {options.batch}, {options.repeats} turns; median (min to max)"
    )
    bandwidths = [stage.bandwidth for stage in curriculum.stages]
    for index, bandwidth in enumerate(bandwidths):
        if options.stages is None or index in options.stages:
            _bench_stage(recipe, bandwidth, device, options)


def _options() -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="recipe file or run folder")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, as section.key=value")
    parser.add_argument("--batch", type=int, default=16, help="images per step (default: %(default)s)")
    parser.add_argument("--stages", type=lambda t: [int(i) for i in t.split(",")], help="indices, from 0")
    parser.add_argument("--precision", type=listed, default=["bf16"], help="of fp32, bf16")
    parser.add_argument("--modes", type=listed, default=["eager"], help="of eager, compiled")
    parser.add_argument("--attention", type=listed, default=["auto"], help="of auto, fused, unfused")
    parser.add_argument("--repeats", type=int, default=6, help="turns (default: %(default)s)")
    parser.add_argument("--against", type=Path, help="a clone of facebookresearch/mae")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_intermixed_args()
    for name, allowed in (
        ("precision", DTYPES),
        ("modes", ("eager", "compiled")),
        ("attention", ("auto", "fused", "unfused")),
    ):
        if unknown := [value for value in getattr(options, name) if value not in allowed]:
            parser.error(f"--{name} takes {', '.join(allowed)}, not {unknown[0]!r}")
    if options.batch < 1 or options.repeats < 1:
        parser.error("--batch and --repeats take 1 or more")
    if options.against is not None and not is_clone(options.against):
        parser.error(f"--against: {options.against} holds no models_mae.py")
    return options


def _bench_stage(
    recipe: Recipe, bandwidth: tuple[int, int], device: torch.device, options: argparse.Namespace
) -> None:
    grid = grid_of(bandwidth, recipe.patch_size)
    with torch.device("meta"):
        model = recipe.build_model()
    task = MaskedAutoencoding(recipe, model, torch.device("cpu"))
    flops = cost_of(task, SimpleNamespace(bandwidth=bandwidth, progress=1.0)).flops
    rates = {name: product_rate(DTYPES[name], device) for name in options.precision}
    print(f"\n{show_size(bandwidth)} px, grid {show_size(grid)}, {flops / 1e9:.2f} GFLOP an image")
    for name, rate in rates.items():
        print(f"  matrix products of {PRODUCT}^3 in {name}: {rate / 1e9:.0f} GFLOP/s")

    variants = []
    for precision in options.precision:
        if options.against is not None:
            step = original_step(recipe, bandwidth, precision, device, options.against)
            variants.append(Variant(f"original {precision}", DTYPES[precision], step))
        for mode in options.modes:
            for attention in options.attention:
                runner = BlockRunner(recipe.model.grad_checkpointing, mode == "compiled")
                step = our_step(recipe, bandwidth, precision, device, attention, runner)
                variants.append(Variant(f"{precision} {mode} {attention}", DTYPES[precision], step))
    for variant in variants:
        variant.first_seconds = sum(variant.step())
        for _ in range(WARM_UP - 1):
            variant.step()
        variant.peak_bytes = peak_memory(variant.step, device)
    for turn in range(options.repeats):
        # Turns change direction, so that none always follows the same neighbour.
        for variant in variants if turn % 2 == 0 else variants[::-1]:
            parts = variant.step()
            variant.parts.append(parts)
            variant.seconds.append(sum(parts))
    for variant in variants:
        report(variant, variants, rates, flops * recipe.batch_size, recipe.batch_size)


def our_step(
    recipe: Recipe,
    bandwidth: tuple[int, int],
    precision: str,
    device: torch.device,
    attention: AttentionName,
    runner: BlockRunner,
) -> Callable[..., list[float]]:
    """The step of `train/loop.py` on one process, timed part by part; with `exact=False` nothing waits."""
    torch.manual_seed(0)
    model, objective = recipe.build_model().to(device), recipe.build_objective()
    use_attention(model, attention)
    model.run_blocks_by(runner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=recipe.optim.betas, fused=True)
    images = torch.randn(recipe.batch_size, recipe.in_chans, *recipe.size, device=device)
    positions = torch.arange(recipe.batch_size, device=device)
    masker = recipe.build_masker()

    def step(exact: bool = True) -> list[float]:
        clock = Clock(device, exact)
        shown = low_frequency_crop(images, bandwidth)
        mask = masker(positions, bandwidth, 1.0)
        clock.part()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            values, ids_predicted = model(shown, *mask)
        clock.part()
        loss = objective(values, ids_predicted, shown)
        clock.part()
        loss.backward()
        clock.part()
        optimizer.step()
        optimizer.zero_grad()
        clock.part()
        return clock.parts

    return step


def original_step(
    recipe: Recipe, bandwidth: tuple[int, int], precision: str, device: torch.device, clone: Path
) -> Callable[..., list[float]]:
    """The same step with the original's model, which wants a square image of a fixed size."""
    try:
        model = original_model(recipe, bandwidth, clone).to(device)
    except ValueError as error:
        sys.exit(f"bench_step: {error}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    images = torch.randn(recipe.batch_size, recipe.in_chans, *bandwidth, device=device)

    def step(exact: bool = True) -> list[float]:
        clock = Clock(device, exact)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = model(images, mask_ratio=recipe.model.final_mask_ratio)[0]
        clock.part()
        loss.backward()
        clock.part()
        optimizer.step()
        optimizer.zero_grad()
        clock.part()
        return clock.parts

    return step


class Clock:
    """Seconds between the parts of a step, device work included where they are to be exact."""

    def __init__(self, device: torch.device, exact: bool = True) -> None:
        self.device = device
        self.exact = exact
        self.parts: list[float] = []
        self._last = self._now()

    def part(self) -> None:
        """A part ends here."""
        now = self._now()
        self.parts.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        if self.exact and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def product_rate(dtype: torch.dtype, device: torch.device, size: int = PRODUCT) -> float:
    """Operations per second of large matrix products: what the machine can do at best."""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for turn in range(8):
        clock = Clock(device)
        a @ a
        clock.part()
        if turn >= WARM_UP:
            seconds += clock.parts
    return 2 * size**3 / statistics.median(seconds)


def peak_memory(step: Callable[[], list[float]], device: torch.device) -> int:
    """Largest memory in use during a step: of the device, or of this process on a CPU (0: unknown)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def report(
    variant: Variant, variants: list[Variant], rates: dict[str, float], flops: int, batch: int
) -> None:
    """Print one variant's numbers, and its ratios to what it is compared with."""
    seconds = statistics.median(variant.seconds)
    ours = not variant.name.startswith("original")
    print(f"  {variant.name}")
    print(f"    step {spread([1000 * s for s in variant.seconds])} ms, {batch / seconds:.1f} images/s")
    rate = next(rates[name] for name, dtype in DTYPES.items() if dtype == variant.dtype)
    if ours:
        print(f"    {flops / seconds / 1e9:.0f} GFLOP/s, {flops / seconds / rate:.0%} of the matrix products")
        shares = [statistics.median(part) / seconds for part in zip(*variant.parts, strict=True)]
        named = ", ".join(f"{name} {share:.1%}" for name, share in zip(PARTS, shares, strict=True))
        print(f"    of the step: {named}")
    memory = f"{variant.peak_bytes / 1e9:.2f} GB" if variant.peak_bytes else "unknown"
    whose = "" if torch.cuda.is_available() else ", other variants' weights included"
    print(f"    peak memory {memory}{whose}; first step {variant.first_seconds:.1f} s")
    originals = [v for v in variants if v.name.startswith("original")]
    for reference in originals or variants[:1]:
        if ours and reference is not variant:
            ratios = [a / b for a, b in zip(variant.seconds, reference.seconds, strict=True)]
            print(f"    ratio to {reference.name}: {spread(ratios)}")


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    digits = 3 if max(values) < 10 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    main()
