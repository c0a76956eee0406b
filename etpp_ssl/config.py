"""The frozen base of every Config, and the errors that users see."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from etpp_ssl import moved

MAX_SIDE = 1 << 14
"""Pixels per axis of an image that a network sees."""


class UserError(ValueError):
    """A mistake in a recipe, path, size or checkpoint, told in one sentence.

    The message names the key, the value and what would be valid. The command line prints it on one
    line and exits with code 2; library users catch ValueError.
    """

    exit_code = 2
    everywhere = False
    """Whether all processes raise the same, so that one of them is enough to tell."""


class NotAtHand(UserError):
    """Data, or the library that reads it, is not on this machine; a run can still be planned here."""


class RunFault(UserError):
    """A failure during a run that is not its recipe's fault, told in one sentence.

    A full disk, a data worker, another process, a loss that is not finite. The command line exits with
    code 1; the newest checkpoint is intact, and the same command resumes from it.
    """

    exit_code = 1


class Interrupted(Exception):
    """A run or a long probe was asked to stop, and has written what it resumes from.

    Args:
        signum: the signal that asked; `exit_code` tells it.
        step: the last step that is done.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        # 75 is EX_TEMPFAIL: a scheduler may start the same command again. 130 is a shell's Ctrl-C.
        self.exit_code = 130 if signum == signal.SIGINT else 75


class Config(BaseModel):
    """Immutable settings of one component; an unknown key is an error, so a typo is not ignored."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, defer_build=True
    )


def may_change(default: Any = ..., **constraints: Any) -> Any:
    """A field that may change on resume, because it never changes the trained weights.

    "Never" is up to floating-point summation order, as for `micro_batch_size`.
    """
    return Field(default, json_schema_extra={"may_change": True}, **constraints)


def may_change_on_resume(config: type[BaseModel], field: str) -> bool:
    """Whether `field` of `config` was declared with `may_change`."""
    extra = config.model_fields[field].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("may_change"))


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from one number for both or from a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def legal_size(size: int | tuple[int, int]) -> int | tuple[int, int]:
    """`size` as it is, for a validator; a slip would cost memory before it is noticed.

    Raises:
        ValueError: for a side below 1 or beyond `MAX_SIDE` pixels.
    """
    if not all(1 <= side <= MAX_SIDE for side in as_pair(size)):
        raise ValueError(f"{size} is not a size in pixels: use 1 to {MAX_SIDE} per axis")
    return size


def show_size(size: tuple[int, int]) -> str:
    """`224` for a square, `192x256` (height x width) otherwise."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def shown_bytes(count: int) -> str:
    """`1.5 GB`, for instance."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The first five items, and how many more there are."""
    more = f", and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


if not TYPE_CHECKING:
    __getattr__ = moved.names_of("config")
