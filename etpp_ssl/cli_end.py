"""What a command says beside its result, and how it ends, alone or as one of several processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from etpp_ssl.config import UserError


def say(text: str) -> None:
    """A message beside the result."""
    print(text, file=sys.stderr)


def is_main_process() -> bool:
    """Whether this is the only process or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether other processes train the same run."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def stops() -> Iterator[None]:
    """A run inside that was told to stop, and has said so, ends the process with its exit code."""
    from etpp_ssl.dist.signals import Interrupted

    try:
        yield
    except Interrupted as interrupted:
        raise typer.Exit(interrupted.exit_code) from None


def tell(error: UserError) -> None:
    """Print an error, of several processes with the number of this one, unless another one tells the same."""
    rank = ""
    if is_one_of_several():
        from etpp_ssl.dist.peers import told_already

        if told_already(error):
            return
        rank = "" if is_main_process() else f" [process {os.environ['RANK']}]"
    say(f"etpp: error:{rank} {' '.join(str(error).split())}")


def end(code: int) -> NoReturn:
    """End this process after an error."""
    if is_one_of_several():
        # Python's own end would wait for threads of connections that nobody serves any more; and for as
        # long as it takes, the other processes do not notice that this one has failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
