"""Times and weighs the names of many images: opening, memory of the main process and of a data worker.

    python tools/bench_index.py 100000 1280000 14197122
    PYTHONPATH=OTHER/TREE python tools/bench_index.py --once ...     # the same of version 0.5

Writes a list of made names in 1,000 classes or more for each number, whose images do not exist, and opens it
twice, in processes of their own that share a cache folder. Each then starts a data worker as a run does,
which finds name and label of 10,000 samples in the run's order. Sizes of the main process are MB beyond those
of one that has imported all of a run, a worker's are its own pages altogether; seconds are of this machine,
which others may be using.
"""

from __future__ import annotations

import argparse
import gc
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


class _Step(NamedTuple):
    samples: range
    bandwidth: tuple[int, int] = (8, 8)
    progress: float = 0.0


class _Naming(Dataset[dict[str, float]]):
    def __init__(self, source: Any) -> None:
        self.source = source

    def __getitem__(self, request: Any) -> dict[str, float]:
        for index in request.indices if self.source is not None else ():
            self.source.name(index)
            self.source.label(index)
        return memory()


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


def memory() -> dict[str, float]:
    """`rss` and `private` pages of this process, in MB."""
    found = {"rss": 0.0, "private": 0.0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("Rss", "Private_Dirty", "Private_Clean"):
            found["rss" if key == "Rss" else "private"] += int(value.split()[0]) / 1000
    return found


def measured(path: Path | None) -> dict[str, Any]:
    """What this process finds; an empty run without a path."""
    from etpp_ssl.data.sampler import KeyedOrder

    try:
        from etpp_ssl.data.sources.folder import FileListConfig
        from etpp_ssl.train import launch  # noqa: F401  (all that a run imports is in an empty run)
    except ImportError:  # Version 0.5.
        from etpp_ssl.data.file_list import FileListConfig
        from etpp_ssl.engine import run  # noqa: F401

    gc.freeze()  # As the command does.
    before = memory()
    found: dict[str, Any] = {}
    source: Any = None
    if path is not None:
        start, cpu = time.perf_counter(), time.process_time()
        source = FileListConfig(file=str(path)).open("train", in_chans=3, image_size=(8, 8), seed=0)
        found["open"], found["open cpu"] = time.perf_counter() - start, time.process_time() - cpu
        start = time.perf_counter()
        found["hash"] = source.fingerprint()[:6]
        found["fingerprint"] = time.perf_counter() - start
        if hasattr(source, "describe"):
            start = time.perf_counter()
            source.describe()
            found["describe"] = time.perf_counter() - start
    order = KeyedOrder(1000 if source is None else len(source), 0)
    loader = DataLoader(
        _Naming(source),
        sampler=_requests(order, SAMPLES),
        batch_size=None,
        num_workers=1,
        worker_init_fn=_as_in_a_run,
    )
    found["worker private"] = [answer["private"] for answer in loader][-1]
    after = memory()
    found["main rss"], found["main private"] = (after[key] - before[key] for key in ("rss", "private"))
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 - before["rss"]
    if source is not None:
        start = time.perf_counter()
        requests = list(_requests(order, INDEXED))
        found["10^6 indices"] = time.perf_counter() - start
        start = time.perf_counter()
        for request in requests:
            for index in request.indices:
                source.name(index)
                source.label(index)
        found["10^6 names, labels"] = time.perf_counter() - start
    return found


def _requests(order: Any, count: int) -> Any:
    from etpp_ssl.data.sampler import RequestSampler

    def step(number: int) -> _Step:
        return _Step(range(number * 100, number * 100 + 100))

    return RequestSampler(order, step, range(count // 100))


def _as_in_a_run(worker: int) -> None:
    with suppress(ImportError):  # Version 0.5.
        from etpp_ssl.data.workers import new_note, start_worker

        start_worker([new_note()], worker)


def main() -> None:
    """Print a line a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[100_000, 1_280_000])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help="open each list once")
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measured(Path(options.child) if options.child else None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}

        def show(title: str, path: Path | str) -> None:
            command = [sys.executable, __file__, "--child", str(path)]
            found = json.loads(subprocess.check_output(command, env=environment))
            values = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
            print(f"{title}: {', '.join(values)}", flush=True)

        show("empty run", "")
        for count in options.counts:
            path = Path(folder) / f"{count}.txt"
            write_names(path, count)
            show(f"{count:,}, first", path)
            if not options.once:
                show(f"{count:,}, second", path)
            path.unlink()


if __name__ == "__main__":
    main()
