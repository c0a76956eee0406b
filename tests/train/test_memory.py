"""What a CPU run frees between steps stays with the process, unless the environment decides."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from ranks import Server

PAGES = """
import resource
import torch
from etpp_ssl.train.memory import freed_memory_kept

def fault():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(1_000_003) for _ in range(4)]  # 4 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fault()
counts = []
for device in "cuda", "cpu":
    with freed_memory_kept(torch.device(device)):
        fault()
        counts.append(fault())
print(*counts)
"""


"""Prints the pages that the system maps for twenty times 16 MB, after the first time: of a GPU's run, of a
CPU's."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_cpu_run_uses_freed_memory_again_unless_the_environment_decides(ranks: Server) -> None:
    # Without settings, what glibc gives back depends on what else lies in its heap.
    (printed,) = ranks.run(None, 1, before=PAGES)
    kept = int(printed.split()[1])
    # glibc reads its environment when a process starts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    decided = subprocess.run([sys.executable, "-c", PAGES], env=environment, capture_output=True, check=True)
    mapped = min(int(count) for count in decided.stdout.split())
    assert 10 * kept + 100 < mapped
