"""Time training views of windows of a large file, and of 16-bit PNGs, against the usual way.

    taskset -c 1 python tools/bench_windows.py [--side 8192] [--format cog|npy] [--png] [--profile]

A scene of 12 uint16 bands is written to a temporary folder: as a cloud-optimised GeoTIFF (deflate,
overviews by averaging), or as a .npy of (H, W, C). Ours is what a data worker does for a bandwidth; theirs
is rasterio's window read (of .npy: a copy of the window), float32 in [0, 1], and torchvision v2's
RandomResizedCrop to that bandwidth, with the same crop scale and kernel, and a mirror. One process and one
thread; runs take turns, and rates are compared turn by turn, in processor time, which other programs
disturb less. GDAL's block cache holds a few windows, for a data set does not fit in it. `--png` compares a
folder of 16-bit PNGs under `data.range` with the same pictures of 8 bits. `--profile` says where the time
of ours goes.

The goals that are printed are those for 8,192 pixels a side; nothing is asserted.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.sources.splits import open_split
from etpp_ssl.data.views import TrainView
from etpp_ssl.randomness import keyed_random

SIZE = (224, 224)
TILE = 512
SCALE = (0.2, 1.0)
HIGH = 4000
GOALS = {96: 3.0, 160: 2.0, 224: 1.3}
"""Wanted speed-up by bandwidth."""
PNG_GOAL = 0.6
CACHE_MB = 16


def main() -> None:
    """Parse, write, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8192, help="pixels of the scene (default: %(default)s)")
    parser.add_argument("--bands", type=int, default=12)
    parser.add_argument(
        "--block", type=int, default=512, help="pixels of a COG's blocks (default: %(default)s)"
    )
    parser.add_argument("--format", choices=("cog", "npy"), default="cog")
    parser.add_argument("--windows", type=int, default=32, help="per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    parser.add_argument("--overviews", choices=("auto", "never"), default="auto")
    parser.add_argument("--png", action="store_true", help="16-bit PNGs instead of windows")
    parser.add_argument("--profile", action="store_true", help="say where the time of ours goes")
    options = parser.parse_args()
    if options.side < TILE or min(options.windows, options.rounds) < 1:
        parser.error(f"--side takes {TILE} or more, --windows and --rounds 1 or more")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if options.png:
            compare_png(Path(folder), options.windows, options.rounds)
        else:
            compare_windows(Path(folder), options)


def compare_windows(folder: Path, options: argparse.Namespace) -> None:
    """Print rates and ratios of windows."""
    path = folder / f"scene.{'npy' if options.format == 'npy' else 'tif'}"
    start = time.process_time()
    if options.format == "npy":
        write_npy(path, options.side, options.bands)
    else:
        write_cog(path, options.side, options.bands, options.block)
    print(
        f"{options.format} of {options.side} pixels a side, {options.bands} bands, "
        f"{path.stat().st_size / 1e6:,.0f} MB, written in {time.process_time() - start:.0f} s"
    )
    config = FolderConfig(root=str(folder), range=(0, HIGH), tile=TILE, overviews=options.overviews)
    source = open_split(config, "train", in_chans=options.bands, image_size=SIZE, seed=0)
    print(source.describe())
    for bandwidth, goal in GOALS.items():
        view = TrainView(
            SIZE, SCALE, True, False, 0, decode="reduced", interpolation=options.interpolation, deep=True
        )
        ours = OurPass(source, view, bandwidth, options.windows)
        theirs = TheirPass(path, source, bandwidth, options.interpolation, options.windows)
        print(f"\nbandwidth {bandwidth}")
        compare({"usual way": theirs, "etpp_ssl": ours}, options.windows, options.rounds, goal, "windows")
        if options.profile:
            profile(ours)


class OurPass:
    """Views as a data worker makes them, of other windows in each turn."""

    def __init__(self, source: ImageSource, view: TrainView, bandwidth: int, count: int) -> None:
        self.source, self.view, self.shown, self.count = source, view, (bandwidth, bandwidth), count

    def __call__(self, turn: int) -> None:
        """One turn."""
        views = []
        for number in range(self.count):
            sample = turn * self.count + number
            index = keyed_random(0, "window", sample).randrange(len(self.source))
            views.append(self.view(self.source.open(index), sample, self.shown, 0.0))
        torch.stack(views)


class TheirPass:
    """The same windows, read whole and resized by torchvision."""

    def __init__(self, path: Path, source: Any, bandwidth: int, interpolation: str, count: int) -> None:
        self.source, self.count = source, count
        if path.suffix == ".npy":
            values = np.load(path, mmap_mode="r")
            self.read = lambda row, column: np.array(
                values[row : row + TILE, column : column + TILE].transpose(2, 0, 1)
            )
        else:
            import rasterio
            from rasterio.windows import Window

            self.scene = rasterio.open(path)
            self.read = lambda row, column: self.scene.read(window=Window(column, row, TILE, TILE))
        kernel = InterpolationMode(interpolation)
        self.change = v2.Compose(
            [
                v2.RandomResizedCrop(bandwidth, scale=SCALE, interpolation=kernel, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __call__(self, turn: int) -> None:
        """One turn."""
        views = []
        for number in range(self.count):
            sample = turn * self.count + number
            index = keyed_random(0, "window", sample).randrange(len(self.source))
            _, row, column = self.source.window(index)
            views.append(self.change(torch.from_numpy(self.read(row, column).astype(np.float32)) / HIGH))
        torch.stack(views)


def compare_png(folder: Path, count: int, rounds: int) -> None:
    """Print rates and the ratio of PNGs of both depths, which show the same."""
    import imagecodecs

    for number in range(count):
        scene = scene_of(375, 500, 3, number) / HIGH
        for bits in (8, 16):
            values = np.rint(scene * (2**bits - 1)).astype(f"u{bits // 8}")
            path = folder / f"{bits}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(imagecodecs.png_encode(values))
    sizes = [sum(file.stat().st_size for file in (folder / bits).iterdir()) for bits in ("8", "16")]
    print(f"PNGs of 500 x 375 pixels, {sizes[0] / count / 1000:.0f} and {sizes[1] / count / 1000:.0f} kB")
    for bandwidth in GOALS:
        passes: dict[str, Any] = {}
        for bits, keys in (("8", {}), ("16", {"range": (0, 65535)})):
            config = FolderConfig(root=str(folder / bits), **keys)
            source = open_split(config, "train", in_chans=3, image_size=SIZE, seed=0)
            view = TrainView(SIZE, SCALE, True, False, 0, decode="reduced", deep=bits == "16")
            passes[f"{bits} bits"] = OurPass(source, view, bandwidth, count)
        print(f"\nbandwidth {bandwidth}")
        compare(passes, count, rounds, PNG_GOAL, "images")


def compare(
    passes: dict[str, Callable[[int], None]], count: int, rounds: int, goal: float, what: str
) -> None:
    """Print rates of two ways, and that of the second over that of the first."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(-1, rounds):
        # Turns change places, so that neither profits from what the other leaves in the caches.
        for name in list(passes)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            passes[name](max(turn, 0))
            if turn >= 0:
                times[name].append(time.process_time() - start)
    for name, found in times.items():
        print(f"  {name:<16} {spread([count / t for t in found])} {what}/s")
    first, second = times.values()
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    print(f"  ratio, pairwise  {spread(ratios)}   goal {goal:g}")


def spread(values: Sequence[float]) -> str:
    """Median, and from where to where."""
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def profile(run: Callable[[int], None]) -> None:
    """Print what takes the time of a turn."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(run, 0)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def scene_of(height: int, width: int, num_bands: int, seed: int) -> np.ndarray:
    """float32 (H, W, C) in [0, HIGH]: a spectrum of one over the frequency, and the noise of a sensor."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    weights = (1 / frequency).astype(np.float32)
    scene = np.empty((height, width, num_bands), np.float32)
    for band in range(num_bands):
        waves = draw.standard_normal((*weights.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
        field = np.fft.irfft2(waves * weights, s=(height, width)).astype(np.float32)
        scene[:, :, band] = 1200 + 300 * field / field.std() + draw.normal(0, 5, (height, width))
    return scene.clip(0, HIGH)


def part_of_scene(row: int, column: int, size: int, num_bands: int) -> np.ndarray:
    """uint16 (size, size, C), which repeats, so that a large scene needs no more memory than a part of it."""
    key = (size, num_bands)
    if key not in _PARTS:
        _PARTS[key] = np.rint(scene_of(size, size, num_bands, 0)).astype(np.uint16)
    turns = (row // size + column // size) % 4
    return np.rot90(_PARTS[key], turns)


_PARTS: dict[tuple[int, int], np.ndarray] = {}


def write_npy(path: Path, side: int, num_bands: int) -> None:
    """The scene as an array on disk."""
    values = np.lib.format.open_memmap(path, "w+", np.uint16, (side, side, num_bands))
    for row, column in places(side):
        part = values[row : row + TILE, column : column + TILE]
        part[:] = part_of_scene(row, column, TILE, num_bands)[: part.shape[0], : part.shape[1]]
    values.flush()


def write_cog(path: Path, side: int, num_bands: int, block: int) -> None:
    """The scene as a cloud-optimised GeoTIFF: GDAL copies a plain one."""
    import rasterio
    from rasterio.shutil import copy

    os.environ["GDAL_CACHEMAX"] = str(CACHE_MB)
    plain = path.with_suffix(".plain")
    layout = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "interleave": "pixel", "bigtiff": "yes"}
    with rasterio.open(
        plain, "w", driver="GTiff", width=side, height=side, count=num_bands, dtype="uint16",
        crs="EPSG:32633", transform=rasterio.Affine(10, 0, 500_000, 0, -10, 5_600_000), **layout,
    ) as scene:  # fmt: skip
        for row, column in places(side):
            height, width = min(TILE, side - row), min(TILE, side - column)
            part = part_of_scene(row, column, TILE, num_bands)[:height, :width]
            window = rasterio.windows.Window(column, row, width, height)
            scene.write(part.transpose(2, 0, 1), window=window)
    copy(
        plain, path, driver="COG", compress="DEFLATE", blocksize=block, bigtiff="YES",
        overview_resampling="AVERAGE",
    )  # fmt: skip
    plain.unlink()


def places(side: int) -> list[tuple[int, int]]:
    """Upper left corners of blocks."""
    return [(row, column) for row in range(0, side, TILE) for column in range(0, side, TILE)]


if __name__ == "__main__":
    main()
