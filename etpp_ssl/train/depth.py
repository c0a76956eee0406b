"""Whether 8 bits can hold what a run is about to read without `data.range`."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import Subset, read_anew
from etpp_ssl.data.sources.synthetic import SyntheticSource
from etpp_ssl.data.statistics import Channel, Values, values_of
from etpp_ssl.data.training import StreamedImages, TrainingImages
from etpp_ssl.randomness import derive_key

SAMPLE = 32
"""Images that are looked at: of photographs their headers only."""
MOST_PIXELS = 1024
"""On a side, of the middle of an image that is looked at."""
FEWEST_LEVELS = 64
"""Different values of 8 bits that each channel of 16 bits should keep."""
LEAST_SHARE = 1 / 16
"""Of the range of 16 bits, that values should reach over."""
REMEDY = "`etpp inspect` with this recipe proposes data.range, which keeps them"


def check_depth(images: TrainingImages, reading: Reading, stall_seconds: float | None) -> str:
    """What a start says of images that a run without `data.range` reads; "" for those of 8 bits.

    Streams are not looked at. Nor is what cannot be read in time: the loader has a sentence for that.

    Args:
        images: to train on.
        reading: how they become pictures.
        stall_seconds: how long the look may take; None is for ever.

    Raises:
        UserError: if 8 bits lose what the images hold: integers of 16 bits that use few of them, other types,
            or several types.
    """
    if reading.deep or isinstance(images, StreamedImages):
        return ""
    source = images.source
    whole = source.source if isinstance(source, Subset) else source
    if isinstance(whole, SyntheticSource) and whole.dtype == "uint8":
        return ""  # They have no header: each would be drawn.
    seen = Future[tuple[Values, int]]()

    def look() -> None:
        try:
            seen.set_result(_look(source, reading, images.seed))
        except BaseException as error:
            seen.set_exception(error)

    # An executor would wait for its thread when the process ends.
    threading.Thread(target=look, daemon=True).start()
    try:
        values, num_shallow = seen.result(stall_seconds)
    except TimeoutError:
        return ""
    count = dict(values.num_images)
    if num_shallow:
        count["uint8"] = count.get("uint8", 0) + num_shallow
    if len(count) > 1:
        found = ", ".join(f"{number} of {name}" for name, number in sorted(count.items()))
        raise UserError(f"data: images of several types ({found} in a sample) are read as 8 bits: {REMEDY}")
    if not count or "uint8" in count:
        return ""
    ((name, channels),) = values.channels.items()
    differing = [channel for channel in channels if channel.least < channel.most] or channels
    if not differing:
        return ""
    extent = f"from {_plain(min(c.least for c in channels))} to {_plain(max(c.most for c in channels))}"
    if name != "uint16":
        raise UserError(f"data: the images hold {name} values {extent}, which 8 bits do not: {REMEDY}")
    fewest = min(_levels(channel) for channel in differing)
    if fewest < FEWEST_LEVELS or any(c.most - c.least < LEAST_SHARE * 2**16 for c in differing):
        raise UserError(
            f"data: the images hold uint16 values {extent}, of which 8 bits leave {fewest} "
            f"level{'s' * (fewest != 1)}: {REMEDY}"
        )
    return "data: of 16 bits the high byte is kept; data.range=[0,65535] keeps all"


def _levels(channel: Channel) -> int:
    """Values that are left of 16 bits."""
    levels = channel.levels(shift=8)
    assert levels is not None
    return levels


def _look(source: ImageSource, reading: Reading, seed: int) -> tuple[Values, int]:
    """What a keyed sample holds that is deep, and how many images of 8 bits are not even decoded."""
    raw, values, num_shallow = read_anew(source, replace(reading, range="raw")), Values(), 0
    for index in sorted({derive_key(seed, "depth", number) % len(raw) for number in range(SAMPLE)}):
        try:
            picture = raw.open(index)
            if picture.deep:
                values.add(values_of(picture, raw.name(index), None, most_pixels=MOST_PIXELS))
            else:
                num_shallow += 1
        except UnreadableImage:
            continue
    return values, num_shallow


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
