"""What a data worker process does: notes the image that it reads, hands batches over, ends with its parent.

A note lies in memory that all processes share. It outlives a worker that dies, and tells which images were in
work.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import get_worker_info

from etpp_ssl.messages import shown_text

NOTE_BYTES = 8192
_note: Any = None


def new_note() -> Any:
    """An empty note for one process, a ctypes array."""
    return RawArray("c", NOTE_BYTES)


def use_note(memory: Any) -> None:
    """From now on `note` writes to this shared array of `NOTE_BYTES`."""
    global _note
    _note = memory


def note_reading(sample_id: int, name: str, batch: str) -> None:
    """Note what this process is about to read, for whoever waits for its batch.

    Args:
        sample_id: the number of the sample that the image is for.
        name: of the image; not the sample's own where that is unreadable.
        batch: what the image's batch is called (`BatchRequest.described`).
    """
    note(f"reading image {shown_text(name)!r} (sample {sample_id})\n{batch}")


def note(text: str) -> None:
    """Note what this process is doing; "" between two batches."""
    if _note is not None:
        _note.value = text.encode(errors="replace")[: NOTE_BYTES - 1]


def hand_over(batch: Any) -> Any:
    """The batch as it leaves the process that built it: from a worker, in shared memory."""
    # A worker's queue would move the tensors there by itself, in a thread whose errors get lost, and the
    # batch with them.
    return batch if get_worker_info() is None else batch.share_memory()


def start_worker(notes: list[Any], worker: int) -> None:
    """Called by torch's loader in each worker; `notes` are those of all workers."""
    use_note(notes[worker])
    sys.excepthook = _quiet_if_main_has_left
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the main process still needs its
    # batches to finish the step, and ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it: there a SIGTERM ends the workers.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main, daemon=True).start()


def _quiet_if_main_has_left(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # multiprocessing's thread that hands files over reports here when the main process hangs up.
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _end_with_main() -> None:
    # Ignoring SIGTERM altogether would make Python wait for the workers for ever when it exits.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
