"""Pictures of files on disk, opened as a data source opens them."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etpp_ssl.data.formats import FORMATS, check_header, finished, open_picture
from etpp_ssl.data.formats.base import Format, Picture, Reading, UnreadableImage, one_line_reasons
from etpp_ssl.data.formats.values import ValuePicture
from etpp_ssl.data.sources.found import extension_of

WIDE = ((-1e9, 1e9),)


def deep(in_chans: int = 1, **options: Any) -> Reading:
    """A reading of values as they are."""
    return Reading(in_chans, **{"range": WIDE, **options})


def format_of(path: Path) -> Format:
    return next(form for form in FORMATS if extension_of(path.name) in form.extensions)


def opened(path: Path, reading: Reading) -> Picture:
    """By `open_path` where the format has one; what the format itself gives."""
    form = format_of(path)
    with one_line_reasons():
        return form.open_path(path, reading) if form.open_path else form.open(path.read_bytes(), reading)


def whole(picture: Picture) -> tuple[np.ndarray, np.ndarray | None]:
    """(values, valid) of all of it, having checked that regions are crops of it."""
    width, height = picture.size
    pixels, box, valid = picture.region((0, 0, width, height), (width, height))
    assert box == (0, 0, width, height)
    assert pixels.shape[:2] == (height, width)
    assert pixels.dtype.isnative
    for left, top, right, bottom in ((0, 0, 1, 1), (width // 3, height // 2, width, height)):
        part = picture.region((left, top, right, bottom), (1, 1))
        np.testing.assert_array_equal(part.pixels, pixels[top:bottom, left:right])
        if valid is not None:
            np.testing.assert_array_equal(part.valid, valid[top:bottom, left:right])
    return pixels, valid


def values(path: Path, reading: Reading) -> np.ndarray:
    """All values of a file without gaps, which are the same from its bytes."""
    pixels, valid = whole(opened(path, reading))
    assert valid is None or valid.all()
    if path.is_file():
        again = whole(format_of(path).open(path.read_bytes(), reading))[0]
        np.testing.assert_array_equal(again, pixels)
    return pixels


def refusal(path: Path, reading: Reading) -> str:
    """Why a file is not read: one line, of the format or of what is made of it."""

    def read() -> None:
        picture = finished(opened(path, reading), reading)
        picture.region((0, 0, *picture.size), picture.size)

    with pytest.raises(UnreadableImage) as caught:
        read()
    reason = str(caught.value)
    assert_sentence(reason)
    return reason


def damage(path: Path) -> None:
    """Open a file's bytes with a few of them spoilt, 300 times: each is an image or a sentence."""
    data, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        spoilt = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            within = len(spoilt) if draw.random() < 0.3 else min(len(spoilt), 2000)
            spoilt[draw.randrange(within)] = draw.choice([0, 255, draw.randrange(256)])
        if draw.random() < 0.2:
            del spoilt[draw.randrange(len(spoilt)) :]
        for read in (lambda data: open_picture(data, deep()).region((0, 0, 1, 1), (1, 1)), check_header):
            try:
                read(bytes(spoilt))
            except UnreadableImage as error:
                assert_sentence(str(error))


def assert_sentence(reason: str) -> None:
    assert reason.strip()
    assert len(reason.splitlines()) == 1
    assert not re.match(r"\w+(Error|Exception|File): ", reason), "an exception's name instead of a sentence"


def as_floats(path: Path, reading: Reading) -> np.ndarray:
    """float32 values that a view is made of, NaN where there is no data."""
    picture = finished(opened(path, reading), reading)
    assert isinstance(picture, ValuePicture)
    region = picture.region((0, 0, *picture.size), picture.size)
    found = region.pixels.copy()
    assert found.dtype == np.float32
    if region.valid is not None:
        found[~region.valid] = np.nan
    return found
