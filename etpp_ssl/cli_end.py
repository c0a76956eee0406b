"""How a command starts, speaks and ends, alone or as one of several processes."""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from etpp_ssl.config import Interrupted, UserError


class _Process:
    """What is known of this process."""

    has_nothing_open = False


_process = _Process()


@contextmanager
def no_garbage() -> Iterator[None]:
    """No garbage is collected inside, nor later looked for in what was made there.

    Importing torch makes a million objects that stay. A collection would write to each, so that data workers
    no longer share their memory.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def short_process() -> Iterator[None]:
    """A command inside computes, prints and leaves nothing open: torch need not be taken down in order."""
    with no_garbage():
        yield
    _process.has_nothing_open = True


def table_console() -> Console:
    """Prints tables to stdout; a pipe has no width, so they get one."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def say(text: str) -> None:
    """A message beside the result."""
    print(text, file=sys.stderr)


def is_main_process() -> bool:
    """Whether this is the only process or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def only_main_process() -> None:
    """End the other ones of several processes: the command is done by one."""
    if not is_main_process():
        raise typer.Exit


def is_one_of_several() -> bool:
    """Whether other processes train the same run."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def stops(what: str | None = None) -> Iterator[None]:
    """A run inside that was told to stop ends the process with its exit code.

    Args:
        what: for the message; None for what has told it already.
    """
    try:
        yield
    except Interrupted as interrupted:
        if what is not None and is_main_process():
            say(f"etpp: {what} {interrupted}; the same command resumes it")
        raise typer.Exit(interrupted.exit_code) from None


@contextmanager
def endings(*, process_ends: bool) -> Iterator[None]:
    """An error inside ends the process, a user's mistake and a run's fault with one line on stderr.

    Args:
        process_ends: whether it does so without an error, too.
    """
    try:
        with _without_log_lines():
            yield
    except UserError as error:
        _tell(error)
        _end(error.exit_code)
    except Exception as error:
        mistake = _usage_sentence(error)
        if mistake is not None:
            _tell(UserError(mistake))
            _end(UserError.exit_code)
        if not is_one_of_several():
            raise
        traceback.print_exc()
        _end(1)
    finally:
        if process_ends:
            # Its objects are left to the system, which takes a third of a second less.
            gc.freeze()
            if _process.has_nothing_open:
                _end_at_once(0)


@contextmanager
def _without_log_lines() -> Iterator[None]:
    """Log lines and warnings of libraries are not for the screen, unless someone asks for them."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        if "TORCH_LOGS" not in os.environ:
            logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _usage_sentence(error: Exception) -> str | None:
    """What is wrong with a command's words, or None for an error of another kind."""
    if not hasattr(error, "format_message"):  # Of click, or of the copy that Typer has of it since 0.26.
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        _end(UserError.exit_code)
    text = str(error.format_message()).replace("Value error, ", "").replace("Input should", "it should")
    text = text.replace(". Did you mean", "; did you mean").rstrip(".?")
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None) or ""
    if type(error).__name__ == "NoSuchOption" and ("." in option or "_" in option):
        # The names of options have neither; those of keys have.
        text += f"; a key of the recipe is given as {option.lstrip('-')}=VALUE"
    return f"{text[0].lower()}{text[1:]}; see {context.command_path if context else 'etpp'} -h"


def _tell(error: UserError) -> None:
    """Print an error, of several processes with the number of this one, unless another one tells the same."""
    rank = ""
    if is_one_of_several():
        from etpp_ssl.dist.peers import told_already

        if told_already(error):
            return
        rank = "" if is_main_process() else f" [process {os.environ['RANK']}]"
    say(f"etpp: error:{rank} {' '.join(str(error).split())}")


def _end(code: int) -> NoReturn:
    """End this process after an error."""
    if is_one_of_several():
        # Python's own end would wait for threads of connections that nobody serves any more; and for as
        # long as it takes, the other processes do not notice that this one has failed.
        _end_at_once(code)
    sys.exit(code)


def _end_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
