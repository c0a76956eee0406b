"""Commands look at the place of their result before the work, and print a result before they write it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from disks import SmallDisk
from tiny_runs import written

from etpp_ssl.cli import main
from etpp_ssl.recipe import FinetuneRecipe


def etpp(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_the_place_is_checked_before_the_work_and_a_result_is_printed_first(
    tiny_classifier: Callable[..., FinetuneRecipe],
    small_disk: SmallDisk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = written(tiny_classifier(f"output={small_disk.folder / 'run'}"))
    with small_disk.read_only():
        for command in ("evaluate", "embed", "export", "report"):
            assert etpp(command, run) == 2
            printed = capsys.readouterr()
            assert "cannot be written: Read-only file system" in printed.err.splitlines()[-1]
            assert printed.out == ""
        assert etpp("probe", run, "probe=knn") == 0
        printed = capsys.readouterr()
        assert printed.err.startswith("warning: ")
        assert "the result is printed only" in printed.err
        assert "\nknn_top1 " in printed.out
    with small_disk.full():
        assert etpp("evaluate", run) == 2
        printed = capsys.readouterr()
        assert "\ntop1 " in printed.out
        assert "cannot be written: No space left on device" in printed.err
    assert not list(small_disk.folder.rglob(".writing*"))
