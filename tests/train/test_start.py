"""Two processes never train in one run folder."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Server

from etpp_ssl.config import UserError
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain
from etpp_ssl.train.start import LOCK_FILE

HOLD = """
import signal
from pathlib import Path
from etpp_ssl.train.start import FolderLock
lock = FolderLock(Path({folder!r}))
lock.acquire()
print("held", flush=True)
signal.pause()
"""


def test_a_run_that_is_being_trained_is_left_alone_until_its_process_is_gone(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, ranks: Server
) -> None:
    run = pretrain(tiny_recipe("budget_epochs=0.5"))
    assert json.loads(run.folder.status_file.read_text())["state"] == "finished"
    # As one that was killed by a kill that reached its launcher only.
    aside = run.folder.checkpoint_folder / ".writing-step-00000004"
    aside.mkdir()
    (run.folder.checkpoint_folder / f"step-{run.state.step:08d}").rename(tmp_path / "elsewhere")
    (other,) = ranks.start(None, 1, before=HOLD.format(folder=str(run.folder.path)))
    try:
        other.wait_for("held")
        with pytest.raises(UserError, match=rf"is being trained by process {other.pid} on "):
            pretrain(tiny_recipe("budget_epochs=0.5"))
        assert aside.is_dir(), "the other process is writing there"
        assert json.loads(run.folder.status_file.read_text())["state"] == "finished", "so it is its status"
        other.send(signal.SIGKILL)
        assert other.wait() == -signal.SIGKILL
        assert pretrain(tiny_recipe("budget_epochs=0.5")).finished
    finally:
        other.send(signal.SIGKILL)
    assert not aside.exists()


def test_a_folder_with_nothing_but_a_lock_is_empty(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).touch()
    assert pretrain(tiny_recipe("budget_epochs=0.2")).finished
    assert RunFolder(tmp_path / "run").exists()
