"""Shared by the tests of faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import SmallDisk
from forked_runs import ForkedRuns
from ranks import Server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of its own; the test is skipped where no disk may be mounted."""
    try:
        disk = SmallDisk(tmp_path / "disk", megabytes=4)
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no tmpfs can be mounted: {error}")
    yield disk
    disk.unmount()


@pytest.fixture(scope="session")
def forked_runs(ranks: Server) -> ForkedRuns:
    """Processes for runs; see there."""
    return ForkedRuns(ranks)
