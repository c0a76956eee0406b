"""Watch the memory of a run that trains on a large stream.

    python tools/stream_memory.py [--samples 100000] [--shards 100] [--workers 2] [--buffer 1000]

Writes tars of small JPEGs into a temporary folder, trains a tiny masked autoencoder for one epoch of them in
a process of its own, and prints the resident memory of that process and of its data workers over the images
trained on. The last lines say how it grew after the first tenth of the run, by least squares. Nothing is
asserted: a stream is read in blocks, so that the slope should be about 0 whatever `--samples` is.

The C library's allocator keeps up to 32 MB of what each process has freed, and takes its time to get there
(glibc raises its M_MMAP_THRESHOLD as it goes). That looks like a leak that stops by itself, so it is turned
off here; `--allocator` leaves it on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

RECIPE = """
output: {output}
image_size: 32
budget_epochs: 1
batch_size: 250
precision: fp32
log_every_steps: 4
data:
  name: webdataset
  urls: {urls}
  num_images: {samples}
  num_workers: {workers}
  shuffle_buffer: {buffer}
curriculum: {{name: constant}}
model:
  name: vit
  patch_size: 8
  embed_dim: 16
  depth: 1
  num_heads: 2
  decoder: {{embed_dim: 8, depth: 1, num_heads: 2}}
checkpoint: {{every_minutes: null}}
"""
NUM_IMAGES = 50
"""Different images; their samples differ by key."""
SECONDS = 0.5
"""Between two looks."""
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Keeps glibc from raising both by itself."""


def main() -> None:
    """Parse, write, train, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--shards", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--buffer", type=int, default=1000, help="data.shuffle_buffer (default: %(default)s)")
    parser.add_argument("--allocator", action="store_true", help="let the allocator keep what is freed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_tars(folder / "tars", options.samples, options.shards)
        print(f"{options.samples:,} samples in {options.shards} tars, {size / 1e6:.0f} MB")
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(
                output=folder / "run",
                urls=folder / "tars",
                samples=options.samples,
                workers=options.workers,
                buffer=options.buffer,
            )
        )
        report(watch(recipe, folder / "run" / "metrics.jsonl", {} if options.allocator else FRUGAL))


def write_tars(folder: Path, num_samples: int, num_shards: int) -> int:
    """Write the samples; returns the bytes of all tars."""
    folder.mkdir()
    pictures = []
    for number in range(NUM_IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((48, 40)).save(file, "jpeg")
        pictures.append(file.getvalue())
    for shard in range(num_shards):
        numbers = range(num_samples * shard // num_shards, num_samples * (shard + 1) // num_shards)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers:
                for extension, content in (("jpg", pictures[number % NUM_IMAGES]), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return sum(file.stat().st_size for file in folder.iterdir())


def watch(recipe: Path, metrics: Path, variables: dict[str, str]) -> list[tuple[int, list[float]]]:
    """Train, and look at it again and again.

    Args:
        recipe: the run.
        metrics: its log.
        variables: of its environment.

    Returns:
        For each look the images trained on, and MB of the main process and of each data worker.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with open(os.devnull, "w") as silence:
        run = subprocess.Popen(
            [sys.executable, "-m", "etpp_ssl", "pretrain", str(recipe)], stdout=silence, env=environment
        )
    looks: list[tuple[int, list[float]]] = []
    while run.poll() is None:
        time.sleep(SECONDS)
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        try:
            main = psutil.Process(run.pid)
            memory = [process.memory_info().rss / 1e6 for process in (main, *main.children())]
        except psutil.Error:
            # It has just ended.
            continue
        # A worker that has ended has no memory any more.
        if rows and min(memory) > 0:
            looks.append((json.loads(rows[-1])["images_seen"], memory))
    if run.returncode:
        raise SystemExit(f"the run ended with exit code {run.returncode}")
    return looks


def report(looks: list[tuple[int, list[float]]]) -> None:
    """Print some of the looks, the peaks and the slopes."""
    # Those at the very end may lack a worker.
    looks = [look for look in looks if len(look[1]) == len(looks[0][1])]
    last = looks[-1][0]
    settled = [look for look in looks if last / 10 <= look[0]]
    names = ["main", *(f"worker {number}" for number in range(len(looks[0][1]) - 1))]
    print("   images" + "".join(f"{name:>12}" for name in names) + "   (MB resident)")
    shown = -1
    for images, memory in looks:
        if images * 10 // last > shown:
            shown = images * 10 // last
            print(f"{images:9,}" + "".join(f"{number:12.1f}" for number in memory))
    images = np.array([look[0] for look in settled])
    for place, name in enumerate(names):
        memory = np.array([look[1][place] for look in settled])
        slope = np.polyfit(images, memory, 1)[0] * 10_000
        print(f"{name}: at most {memory.max():.1f} MB, {slope:+.3f} MB per 10,000 images")


if __name__ == "__main__":
    main()
