"""Time the low-frequency crop against the plain route by two-dimensional Fourier transforms.

    python tools/bench_crop.py [--batch 64] [--size 224] [--repeats 20] [--device cpu]

Both run in turns in one process, after a warm-up. The goals that are printed beside the ratios are for
64 images of 224 pixels on two CPU cores; nothing is asserted.
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
from torch import Tensor
from torch.fft import fft2, fftshift, ifft2, ifftshift

from etpp_ssl.curriculum.frequency import low_frequency_crop

AXES = (-2, -1)
GOALS = {96: 4.0, 160: 3.5}
"""Wanted speed-up by bandwidth at 224 pixels."""
REFERENCE_SIZE = 224
BANDWIDTHS = (96, 160, 192)
WARM_UP = 3


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=REFERENCE_SIZE, help="pixels (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timings (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="(default: %(default)s)")
    options = parser.parse_args()
    if min(options.batch, options.size, options.repeats) < 1:
        parser.error("--batch, --size and --repeats take 1 or more")

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    images = images.to(options.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}")
    print(f"{tuple(images.shape)} float32, {options.repeats} repeats in turns: median (min to max)")
    for reference in BANDWIDTHS:
        bandwidth = max(1, round(reference * options.size / REFERENCE_SIZE))
        goal = GOALS.get(reference) if options.size == REFERENCE_SIZE else None
        compare(images, bandwidth, options.repeats, goal)


def compare(images: Tensor, bandwidth: int, repeats: int, goal: float | None) -> None:
    """Print agreement and timings at one bandwidth."""
    plain_times, crop_times = [], []
    for repeat in range(-WARM_UP, repeats):
        # Turns change places, so that neither profits from what the other leaves in the caches.
        first, second = (plain_crop, low_frequency_crop) if repeat % 2 else (low_frequency_crop, plain_crop)
        times = {route: seconds(route, images, bandwidth) for route in (first, second)}
        if repeat >= 0:
            plain_times.append(times[plain_crop])
            crop_times.append(times[low_frequency_crop])
    ratios = [plain / crop for plain, crop in zip(plain_times, crop_times, strict=True)]

    crop, plain = low_frequency_crop(images, bandwidth), plain_crop(images, bandwidth)
    exact = plain_crop(images[:1].double(), bandwidth)
    print(f"\n{images.shape[-1]} -> {bandwidth}")
    print(f"  plain fft2          {spread([1000 * t for t in plain_times])} ms")
    print(f"  low_frequency_crop  {spread([1000 * t for t in crop_times])} ms")
    print(f"  ratio, pairwise     {spread(ratios)}" + (f"   goal {goal:g}" if goal else ""))
    print(f"  max abs difference  {largest(crop - plain):.1e}, both in float32")
    print(
        f"  max abs error       {largest(crop[:1] - exact):.1e}, plain fft2 {largest(plain[:1] - exact):.1e}"
        " (first image, against float64)"
    )


def plain_crop(images: Tensor, bandwidth: int) -> Tensor:
    """The definition as one writes it down: spectrum, centre, back, real part, scale."""
    height, width = images.shape[-2:]
    spectrum = fftshift(fft2(images), dim=AXES)
    top, left = height // 2 - bandwidth // 2, width // 2 - bandwidth // 2
    centre = spectrum[..., top : top + bandwidth, left : left + bandwidth]
    return ifft2(ifftshift(centre, dim=AXES)).real * (bandwidth**2 / (height * width))


def seconds(route: Callable[[Tensor, int], Tensor], images: Tensor, bandwidth: int) -> float:
    """Wall time of one call, device work included."""
    synchronise(images.device)
    start = time.perf_counter()
    route(images, bandwidth)
    synchronise(images.device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def largest(differences: Tensor) -> float:
    """Largest absolute value."""
    return float(differences.abs().max())


if __name__ == "__main__":
    main()
