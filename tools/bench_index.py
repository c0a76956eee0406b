"""Times and weighs the names of many images: opening, memory of the main process and of data workers.

    python tools/bench_index.py 100000 1280000 14197122
    PYTHONPATH=OTHER/TREE python tools/bench_index.py ...       # the same of another version

Writes a list of made names in 1,000 classes or more for each number, whose images do not exist, and opens it
twice, in processes of their own that share a cache folder. Each then starts a data worker as a run does,
which finds path and label of 10,000 samples in the run's order. Sizes of the main process are MB beyond those
of one that has imported all of a run; seconds are of this machine, which others may be using.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

SAMPLES = 10_000
INDEXED = 10**6


def write_names(path: Path, count: int) -> None:
    """A list with lines as ImageNet has them."""
    num_classes = 21_841 if count > 2_000_000 else 1000
    per_class = -(-count // num_classes)
    with path.open("w") as file:
        for number in range(num_classes):
            left = min(per_class, count - number * per_class)
            word = f"n{number * 97 + 1440764:08d}"
            file.write("".join(f"{word}/{word}_{i * 7 + 3}.JPEG\t{word}\n" for i in range(left)))
    # An index of what changed a moment ago is not trusted.
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def memory(process: str = "self") -> dict[str, float]:
    """`rss` and `private`, in MB."""
    found: dict[str, float] = {"rss": 0.0, "private": 0.0}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        key, _, value = line.partition(":")
        name = "rss" if key == "Rss" else "private" if key in ("Private_Dirty", "Private_Clean") else None
        if name:
            found[name] += int(value.split()[0]) / 1000
    return found


def measured(path: Path | None, sample: bool) -> dict[str, Any]:
    """What this process finds; an empty run without a path."""
    from etpp_ssl.data.sampler import KeyedOrder, RequestSampler

    try:
        from etpp_ssl.data.sources.folder import FileListConfig
        from etpp_ssl.train import launch  # noqa: F401  (all that a run imports is in an empty run)
    except ImportError:  # Version 0.5.
        from etpp_ssl.data.file_list import FileListConfig

        import etpp_ssl.run  # noqa: F401

    before = memory()
    found: dict[str, Any] = {}
    source: Any = None
    if path is not None:
        start, cpu = time.perf_counter(), time.process_time()
        source = FileListConfig(file=str(path)).open("train", in_chans=3, image_size=(8, 8), seed=0)
        found["open"], found["open cpu"] = time.perf_counter() - start, time.process_time() - cpu
        start = time.perf_counter()
        found["fingerprint"] = source.fingerprint()
        found["fingerprint s"] = time.perf_counter() - start
        start = time.perf_counter()
        found["describe"] = source.describe()
        found["describe s"] = time.perf_counter() - start
    order = KeyedOrder(len(source) if source is not None else 1000, 0)
    if sample:
        order.index(0)
        steps = range(INDEXED // 100)
        sampler = RequestSampler(order, lambda step: _Step(range(step * 100, step * 100 + 100)), steps)
        start = time.perf_counter()
        for _ in sampler:
            pass
        found["order s"] = time.perf_counter() - start
        if source is not None:
            indices = [order.index(i) for i in range(INDEXED)]
            start = time.perf_counter()
            for index in indices:
                source.path(index)
                source.label(index)
            found["path and label s"] = time.perf_counter() - start
            del indices
    sampler = RequestSampler(
        order, lambda step: _Step(range(step * 100, step * 100 + 100)), range(SAMPLES // 100)
    )
    loader = DataLoader(
        _Naming(source), sampler=sampler, batch_size=None, num_workers=1, worker_init_fn=_as_in_a_run
    )
    found["worker private"] = [answer["private"] for answer in loader][-1]
    after = memory()
    found["main rss"] = after["rss"] - before["rss"]
    found["main private"] = after["private"] - before["private"]
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 - before["rss"]
    return found


class _Step(NamedTuple):
    samples: range
    bandwidth: tuple[int, int] = (8, 8)
    progress: float = 0.0


class _Naming(Dataset[dict[str, float]]):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, request: Any) -> dict[str, float]:
        for index in request.indices if self.source is not None else ():
            self.source.path(index)
            self.source.label(index)
        return memory()


def _as_in_a_run(worker: int) -> None:
    with suppress(ImportError):  # Version 0.5.
        from etpp_ssl.data.workers import new_note, start_worker

        start_worker([new_note()], worker)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[100_000, 1_280_000])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help="open each list once only")
    options = parser.parse_args()
    if options.child:
        path, sample = options.child
        print(json.dumps(measured(Path(path) if path else None, sample == "yes")))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}

        def child(path: str, sample: str) -> dict[str, Any]:
            command = [sys.executable, __file__, "--child", path, sample]
            found: dict[str, Any] = json.loads(subprocess.check_output(command, env=environment))
            return found

        print("empty run", child("", "yes"), flush=True)
        for count in options.counts:
            path = Path(folder) / f"{count}.txt"
            write_names(path, count)
            for run in ("first", "second")[: 1 if options.once else 2]:
                found = child(str(path), "yes" if run == "second" or options.once else "no")
                rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
                print(f"{count:,} {run}", rounded, flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
