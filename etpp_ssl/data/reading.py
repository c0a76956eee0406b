"""Which image a process is reading, for whoever waits for it: told in memory that outlives the process."""

from __future__ import annotations

import struct
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple

NAME_BYTES = 1024
"""Of a longer name the end is kept, which tells more of a path."""
_HEAD = struct.Struct("qq")
_PLACE = _HEAD.size + NAME_BYTES


class Reading(NamedTuple):
    """An image that is being read."""

    position: int
    """The number of the sample that it is for."""
    name: str
    """What a person would look for; another image's than the sample's own where that was unreadable."""


class ReadingBoard:
    """A place for each process that reads, empty between two batches.

    Args:
        num_processes: places.
    """

    def __init__(self, num_processes: int) -> None:
        self._memory = RawArray("c", _PLACE * num_processes)

    def write(self, number: int, reading: Reading | None) -> None:
        """Say what process `number` is reading."""
        start = _PLACE * number
        if reading is None:
            _HEAD.pack_into(self._memory, start, 0, 0)
            return
        # Names of files may hold bytes that are no text.
        name = reading.name.encode(errors="surrogateescape")[-NAME_BYTES:]
        self._memory[start + _HEAD.size : start + _HEAD.size + len(name)] = name
        _HEAD.pack_into(self._memory, start, reading.position, 1 + len(name))

    def read(self, number: int) -> Reading | None:
        """What process `number` was reading when it last said so; None between two batches."""
        start = _PLACE * number
        position, length = _HEAD.unpack_from(self._memory, start)
        if length == 0:
            return None
        name = bytes(self._memory[start + _HEAD.size : start + _HEAD.size + length - 1])
        return Reading(position, name.decode(errors="surrogateescape"))


_place: tuple[ReadingBoard, int] | None = None


def use_board(board: ReadingBoard, number: int) -> None:
    """From now on this process's `note_reading` writes to place `number` of a board."""
    global _place
    _place = board, number


def note_reading(reading: Reading | None) -> None:
    """Say what this process is about to read; nothing happens where nobody wants to know."""
    if _place is not None:
        board, number = _place
        board.write(number, reading)
