"""A format of files with overviews and a place on the earth, for tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import etpp_ssl.data.formats
from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Format,
    Picture,
    Place,
    Reading,
    Region,
    level_for,
    whole_pixels,
)

Shrink = Callable[[np.ndarray, int], np.ndarray]
asked: list[int] = []


class Pyramid:
    """A picture with overviews."""

    deep = True
    place: Place | None = None
    reads_parts = True

    def __init__(self, levels: list[np.ndarray], reading: Reading, valid: np.ndarray | None = None) -> None:
        self._levels = levels
        self._overviews = reading.overviews
        self._valid = valid
        self.size = levels[0].shape[1::-1]

    def channels(self) -> Channels:
        raise TypeError

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        sizes = [level.shape[1::-1] for level in self._levels[: None if self._overviews else 1]]
        number, part = level_for(sizes, box, at_least)
        asked.append(number)
        (left, top, right, bottom), inner = whole_pixels(part)
        valid = self._valid[top:bottom, left:right] if self._valid is not None and number == 0 else None
        return Region(self._levels[number][top:bottom, left:right], inner, valid)


def open_pyramid(path: str | os.PathLike[str], reading: Reading) -> Picture:
    arrays = np.load(path)
    picture = Pyramid([arrays[f"level{n}"] for n in range(len(arrays) - 1)], reading)
    text = arrays["place"].item()
    picture.place = Place(*json.loads(text)) if text else None
    return picture


FORMAT = Format(frozenset({".pyr"}), (b"PK",), open=None, check=None, open_path=open_pyramid)  # type: ignore[arg-type]


def write_pyramid(
    path: Path, values: np.ndarray, shrink: Shrink | None, place: Any = None, factors: Any = (2, 4)
) -> None:
    levels = [values, *(np.rint(shrink(values, n)).clip(0, 65535).astype("u2") for n in factors if shrink)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        text = json.dumps(place) if place else ""
        np.savez(file, **{f"level{n}": level for n, level in enumerate(levels)}, place=np.array(text))


def know_pyramids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `.pyr` a format that is read."""
    formats = etpp_ssl.data.formats
    monkeypatch.setattr(formats, "FORMATS", (FORMAT, *formats.FORMATS))
    monkeypatch.setattr(formats, "EXTENSIONS", formats.EXTENSIONS | {".pyr"})
