"""`status.json`: where a run stands, for a scheduler's script."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from typing import Literal

from etpp_ssl.config import UserError
from etpp_ssl.files import write_text
from etpp_ssl.train.run import Run

RunState = Literal["running", "stopped", "finished", "failed"]


def write_status(run: Run, state: RunState, *, exit_code: int | None = None, message: str = "") -> None:
    """Say in the run folder how the run stands; only the main process writes, and only where it trains.

    `stopped` means that it was asked to stop and that its checkpoint is written: the same command goes on.
    torchrun turns the exit code 75 of its processes into its own 1, so a script looks here. The step of a
    `running` run is that of its start or of its newest checkpoint; if its process (`host`, `pid`) is gone, it
    was killed.

    Args:
        run: the run.
        state: how it stands.
        exit_code: of its processes, where it has ended.
        message: what the user was told last.
    """
    if not run.accelerator.is_main_process or not run.lock.held:
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
    try:
        write_text(run.folder.status_file, json.dumps(values, indent=1) + "\n")
    except UserError as error:
        # A full disk ends no run here: the checkpoint's own error says more.
        run.progress.say(f"warning: {error}")
