"""Time reading images from a folder against reading them from shards made of it.

    etpp prepare FOLDER SHARDS
    python tools/bench_shards.py FOLDER SHARDS [--images 1000] [--repeats 5] [--drop-caches]

Both are read in turns by one process, the same images in the same keyed random order, another part of the
data set in each turn. Nothing is asserted.

`--drop-caches` asks the kernel to forget the files' contents before each turn (posix_fadvise, no root
needed). It cannot make it forget folders and file attributes, which a network file system would have to
ask for too: the real advantage of shards there is larger than what is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.data.sources.folder import FileSource, FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig, ShardSource

Read = Callable[[FileSource, int], object]
DISK_COUNTER = Path("/proc/self/io")
WAYS: dict[str, Read] = {
    "bytes": lambda source, index: source.read(index),
    "bytes and decoding": lambda source, index: [channel.load() for channel in source.open(index).channels()],
}


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="images per turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--drop-caches", action="store_true", help="read from the disk, not from memory")
    options = parser.parse_args()
    if min(options.images, options.repeats) < 1:
        parser.error("--images and --repeats take 1 or more")
    if options.drop_caches and not hasattr(os, "posix_fadvise"):
        parser.error("--drop-caches: this system has no posix_fadvise")
    try:
        sources = {
            "folder": open_one(FolderConfig, options.folder),
            "shards": open_one(ShardsConfig, options.shards),
        }
    except UserError as error:
        parser.error(str(error))
    if sources["folder"].files != sources["shards"].files:
        parser.error("the shards were not made of this folder: names or order differ")

    count = len(sources["folder"])
    size = sum(sources["shards"].stored_size(index) for index in range(count))
    print(f"{count:,} images, {size / 1e6:,.0f} MB, in {len(sources['shards'].shards)} shards")
    cache = "contents dropped from the cache before each turn" if options.drop_caches else "cache left alone"
    print(f"{options.images} images a turn, {options.repeats} turns of each, {cache}: median (min to max)")
    for title, read in WAYS.items():
        compare(title, read, sources, options)


def open_one(config: type[FolderConfig] | type[ShardsConfig], root: Path) -> FileSource:
    """The training split."""
    return config(root=str(root)).open("train", in_chans=3, image_size=(1, 1), seed=0)


def compare(title: str, read: Read, sources: dict[str, FileSource], options: argparse.Namespace) -> None:
    """Print images per second of both, and their ratio turn by turn."""
    order = KeyedOrder(len(sources["folder"]), options.seed)
    rates: dict[str, list[float]] = {name: [] for name in sources}
    from_disk = dict.fromkeys(sources, 0)
    for repeat in range(-1, options.repeats):
        first = (repeat + 1) * options.images
        part = [order.index(position) for position in range(first, first + options.images)]
        if not options.drop_caches:
            for source in sources.values():
                turn(WAYS["bytes"], source, part)
        # Turns change places, so that neither profits from what the other leaves behind.
        for name in sorted(sources, reverse=bool(repeat % 2)):
            if options.drop_caches:
                drop(sources[name], part)
            before = disk_bytes()
            rate = turn(read, sources[name], part)
            if repeat >= 0:
                rates[name].append(rate)
                from_disk[name] += disk_bytes() - before
    ratios = [shards / folder for folder, shards in zip(rates["folder"], rates["shards"], strict=True)]
    print(f"\n{title}")
    for name, values in rates.items():
        disk = from_disk[name] / options.repeats / 1e6
        print(f"  {name:16}{spread(values, 0)} images/s   {disk:.1f} MB from the disk a turn")
        if options.drop_caches and not from_disk[name]:
            print(f"  {name}: not measured cold: the system read nothing from a disk, or does not say so")
    print(f"  {'ratio, pairwise':16}{spread(ratios, 2)}")


def turn(read: Read, source: FileSource, part: Sequence[int]) -> float:
    """Images per second."""
    start = time.perf_counter()
    for index in part:
        try:
            read(source, index)
        except UnreadableImage as error:
            raise SystemExit(f"{source.name(index)} cannot be read: {error}") from error
    return len(part) / (time.perf_counter() - start)


def drop(source: FileSource, part: Sequence[int]) -> None:
    """Have the kernel forget the files that hold these images."""
    if isinstance(source, ShardSource):
        files = {source.shards[source.rows.shards[index]] for index in part}
    else:
        files = {source.files[index] for index in part}
    for file in files:
        descriptor = os.open(source.folder / file, os.O_RDONLY)
        # Pages that are not written yet cannot be forgotten.
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_bytes() -> int:
    """Bytes that this process has had the disk read; 0 where the system does not count them."""
    try:
        lines = DISK_COUNTER.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def spread(values: list[float], digits: int) -> str:
    """Median, smallest and largest."""
    return (
        f"{statistics.median(values):8,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
    )


if __name__ == "__main__":
    main()
