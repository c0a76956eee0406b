"""One training at a time in a run folder."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from etpp_ssl.config import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


class FolderLock:
    """Held by the process that writes to a run folder; the system releases it with the process.

    A launcher that was killed alone leaves its processes training: a second start must not write beside
    them. Data workers, which outlive a killed process for a moment, do not inherit the lock.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.held = False
        """Whether the folder is this process's; where there are no locks, whether it has asked."""
        self._file: TextIOWrapper | None = None

    def acquire(self) -> None:
        """Take the lock, where there is a folder; nothing happens if it is held already.

        A file system without locks gives none, and no error.

        Raises:
            UserError: if another process holds it, naming that process.
            OSError: if the folder cannot be written to.
        """
        if self.held or not os.path.isdir(self.path.parent):
            return
        if fcntl is None:
            self.held = True
            return
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise UserError(
                f"run {str(self.path.parent)!r} is being trained by {holder}; stop that first, or choose "
                f"another output"
            ) from error
        except OSError:
            file.close()
            self.held = True
            return
        self._file, self.held = file, True
        # Only for the message; on a full disk the lock holds all the same.
        with suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()

    def release(self) -> None:
        """Give the lock back, where it is held."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file, self.held = None, False
