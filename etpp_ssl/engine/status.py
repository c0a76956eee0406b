"""`status.json`: where a run stands, for a scheduler's script."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from typing import Literal

from etpp_ssl.engine.run import BaseRun

RunState = Literal["running", "stopped", "finished", "failed"]


def write_status(run: BaseRun, state: RunState, *, exit_code: int | None = None, message: str = "") -> None:
    """Say in the run folder how the run stands; only the main process writes.

    `stopped` means that it was asked to stop and that its checkpoint is written: the same command goes on.
    torchrun turns the exit code 75 of its processes into its own 1, so a script looks here. A run that is
    `running`, while its process (`host`, `pid`) is gone, was killed.

    Args:
        run: the run.
        state: how it stands.
        exit_code: of its processes, where it has ended.
        message: what the user was told last.
    """
    if not run.accelerator.is_main_process or not run.folder.exists():
        return
    values = {
        "state": state,
        "step": run.state.step,
        "num_steps": run.curriculum.num_steps,
        "exit_code": exit_code,
        "message": message,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_processes": run.accelerator.num_processes,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    aside = run.folder.status_file.with_suffix(".writing")
    try:
        aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, run.folder.status_file)
    except OSError as error:
        # A full disk ends no run here: the checkpoint's own error says more.
        run.progress.say(f"warning: {str(run.folder.status_file)!r} cannot be written: {error.strerror}")
