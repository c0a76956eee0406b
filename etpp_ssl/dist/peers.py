"""The processes of a run: what they agree on, and what those that are left do when one ends or hangs.

A process that ends closes its connections, and whoever waits for it in a collective gets an error of the
transport at once. Before it ends it leaves its last words in the store in which the processes have found
each other, so that the others can say why, and so that what all of them say is said by one.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import distributed_c10d

from etpp_ssl.config import Interrupted, RunFault, UserError

OF_A_MACHINE = {"output", "data.root", "data.index", "data.num_workers", "data.prefetch"}
"""Settings that machines may differ in: paths, and what suits their processors."""


class Agreement:
    """Tells all processes of a signal that one received, and of a checkpoint that rank 0 wants.

    The exchange runs on the CPU over gloo, so that it never waits for a GPU, and learns at once that another
    process has ended.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.alone = accelerator.num_processes == 1
        self.is_main = accelerator.is_main_process
        self._group: Any = None
        # A new group waits its whole time limit for a process that has ended before: none where one will do.
        if not self.alone and dist.get_backend() != "gloo":
            handler = accelerator.init_handler
            self._group = dist.new_group(backend="gloo", timeout=handler.timeout if handler else None)

    def reach(self, signum: int, checkpoint_due: bool) -> tuple[int, bool]:
        """(signal that any process received or 0, whether rank 0 wants a checkpoint)."""
        if self.alone:
            return signum, checkpoint_due
        votes = torch.tensor([signum, int(checkpoint_due and self.is_main)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return int(votes[0]), bool(votes[1])

    def main_says(self, text: str) -> str:
        """The main process's text, on all; every process must call it."""
        if self.alone:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, src=0, group=self._group)
        return texts[0]


def agree_on_start(
    accelerator: Accelerator, recipe: Mapping[str, Any], where: Mapping[str, Any], *, is_stream: bool
) -> None:
    """See that all processes have opened the same run; every process must call it.

    Each has read folder and data for itself. File systems of several machines may show one of them an older
    state, or another folder altogether, and the processes would wait for each other for ever.

    Args:
        accelerator: of the run.
        recipe: this process's recipe, as nested dicts.
        where: what else must be the same: step, number of steps, data.
        is_stream: whether the images are a stream, of which every data worker reads its own part.

    Raises:
        UserError: on all processes, if they have not.
    """
    if accelerator.num_processes == 1:
        return
    exempt = OF_A_MACHINE - {"data.num_workers"} if is_stream else OF_A_MACHINE
    main, *others = gather_object([{**where, **_flat(recipe)}])
    for process, there in enumerate(others, 1):
        for what in [*main, *(there.keys() - main.keys())]:
            if there.get(what) != main.get(what) and what not in exempt:
                raise UserError(
                    f"process {process} has opened another run than process 0: {what} {there.get(what)!r} "
                    f"instead of {main.get(what)!r}; output {recipe['output']!r}, recipe and data must be "
                    f"the same for all"
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


SECONDS_FOR_WORDS = 1.0
"""What a process waits for words of another one."""

# gloo raises RuntimeErrors; the store and NCCL raise DistErrors, NCCL also for its own misconfiguration.
_ENDED = re.compile(
    "closed by peer|connection was closed|connection closed|reset by peer|broken pipe|socket closed|"
    "connection refused|remote process exited|ncclRemoteError|communicator was aborted",
    re.IGNORECASE,
)
_SILENT = re.compile(r"timed out|time ?out", re.IGNORECASE)


Result = TypeVar("Result")


class PeerLost(RunFault):
    """Another process has ended or does not answer."""


@contextmanager
def with_peers() -> Iterator[None]:
    """Inside, an error is told to the other processes, and their end becomes a `PeerLost`.

    An error that the main process has told already is marked as known `everywhere`.
    """
    try:
        yield
    except Exception as error:
        fault = lost_peer(error)
        if fault is not None:
            raise fault from error
        leave_words(error)
        raise


def lost_peer(error: BaseException) -> PeerLost | None:
    """The fault behind an error of a collective or of the store, or None where it is another one."""
    text = str(error)
    of_torch = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    if not of_torch:
        return None
    if _SILENT.search(text):
        return PeerLost(
            "another process did not answer within peer_timeout_minutes; it may hang, or have been stopped; "
            "the same command resumes from the newest checkpoint"
        )
    if _ENDED.search(text):
        return PeerLost(
            f"another process ended ({_words_of_others()}); the same command resumes from the newest "
            f"checkpoint"
        )
    return None


def words_of(error: Exception) -> str:
    """An error in one line: what it says to a user, and of another error its type, too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def leave_words(error: Exception) -> None:
    """Leave the other processes word of an error that they may see as nothing but this one's end.

    An error that the main process has told already is marked as known `everywhere`.
    """
    if not _met() or isinstance(error, PeerLost | Interrupted):
        return
    words = words_of(error)

    def tell(store: Any) -> bool:
        rank = dist.get_rank()
        store.set(_key(rank), words)
        if not isinstance(error, UserError):
            return False
        # Started without torchrun, the main process keeps the store: it waits until the others, where they
        # say the same, have seen so. Not by `store.wait`: torch reports the end of its patience on stderr.
        awaited = [_key(0)] if rank else [_heard(other) for other in range(1, dist.get_world_size())]
        deadline = time.monotonic() + SECONDS_FOR_WORDS
        while not store.check(awaited):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        if rank == 0:
            return False
        same = bool(store.get(_key(0)).decode() == words)
        store.set(_heard(rank), "")
        return same

    if _from_store(tell):
        assert isinstance(error, UserError)
        error.everywhere = True


def leave(accelerator: Accelerator) -> None:
    """Part from the other processes, once all have come here with nothing left to do.

    Of several processes none may end before the main one has written everything: torchrun takes an exit
    code of 75 for a failure and ends the others, and a connection that closes may be in use. Not to be
    called after an error: the others may be waiting in a collective.

    Raises:
        PeerLost: on the other processes, if one of them, perhaps the main one, ended too early.
    """
    finish_trackers(accelerator)
    try:
        with with_peers():
            accelerator.wait_for_everyone()
    except PeerLost:
        # What the main process had to write is written.
        if not accelerator.is_main_process:
            raise
    accelerator.state.destroy_process_group()


def finish_trackers(accelerator: Accelerator) -> None:
    """Let the trackers of a run write what they have, so that the next run of this process gets its own."""
    while accelerator.trackers:
        accelerator.trackers.pop().finish()


def told_already(error: UserError) -> bool:
    """Whether another process says the same, so that this one need not."""
    if error.everywhere:
        return os.environ.get("RANK", "0") != "0"
    # Until they have found each other, the processes of a machine read the same files.
    return not isinstance(error, PeerLost) and not _met() and os.environ.get("LOCAL_RANK", "0") != "0"


def _words_of_others() -> str:
    def ask(store: Any) -> str | None:
        for rank in range(dist.get_world_size()):
            if rank != dist.get_rank() and store.check([_key(rank)]):
                return f"process {rank}: {store.get(_key(rank)).decode()}"
        return None

    # If the process that has ended kept the store, that goes a moment after its other connections.
    time.sleep(0.3)
    said = _from_store(ask) if _met() else None
    return said or "without a word: it was killed, or its own output says why"


def _from_store(ask: Callable[[Any], Result]) -> Result | None:
    """What the store answers, or None: the process that keeps it may have ended, or hang."""
    answers: list[Result] = []

    def run() -> None:
        try:
            # Asked for a store that is gone, torch prints its own stack.
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address, SECONDS_FOR_WORDS).close()
            answers.append(ask(distributed_c10d._get_default_store()))
        except (OSError, KeyError, RuntimeError, ValueError):
            return

    # torch's own time limit of a store does not end every wait for one whose process was stopped.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(3 * SECONDS_FOR_WORDS)
    return answers[0] if answers else None


def _met() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _key(rank: int) -> str:
    return f"etpp_ssl/last-words/{rank}"


def _heard(rank: int) -> str:
    return f"etpp_ssl/heard/{rank}"
