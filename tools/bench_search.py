"""Time an exact search: one query in n features of width D.

    python tools/bench_search.py [--images 100000] [--width 384] [--repeats 20] [--threads 2]

The goal is 0.1 s a query on two CPU cores; nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from etpp_ssl.commands.search import nearest

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=100_000)
parser.add_argument("--width", type=int, default=384)
parser.add_argument("--repeats", type=int, default=20)
parser.add_argument("--threads", type=int, default=2)
wanted = parser.parse_args()
torch.set_num_threads(wanted.threads)
draw = torch.Generator().manual_seed(0)
features = torch.randn(wanted.images, wanted.width, generator=draw)
query = torch.randn(1, wanted.width, generator=draw)
nearest(query, features, 8)
seconds = []
for _ in range(wanted.repeats):
    start = time.perf_counter()
    nearest(query, features, 8)
    seconds.append(time.perf_counter() - start)
print(f"{statistics.median(seconds):.3f} s a query (least {min(seconds):.3f}, most {max(seconds):.3f})")
