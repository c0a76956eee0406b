"""Which image a process is reading, for whoever waits for it: told in memory that outlives the process."""

from __future__ import annotations

import ctypes
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple


class Reading(NamedTuple):
    """An image that is being read."""

    position: int
    """The number of the sample that it is for."""
    image: int
    """Its number in the data set: another one than the sample's own where that was unreadable."""


class ReadingBoard:
    """A place for each process that reads, empty between two batches.

    Args:
        num_processes: places.
    """

    def __init__(self, num_processes: int) -> None:
        self._numbers: ctypes.Array[ctypes.c_longlong] = RawArray(ctypes.c_longlong, 2 * num_processes)
        for number in range(num_processes):
            self.write(number, None)

    def write(self, number: int, reading: Reading | None) -> None:
        """Say what process `number` is reading."""
        self._numbers[2 * number], self._numbers[2 * number + 1] = reading or (-1, -1)

    def read(self, number: int) -> Reading | None:
        """What process `number` was reading when it last said so; None between two batches."""
        position, image = self._numbers[2 * number], self._numbers[2 * number + 1]
        return Reading(position, image) if image >= 0 else None


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
