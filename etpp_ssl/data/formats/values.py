"""Values of any depth: which channels are taken, what has no data, and float32 of all.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Picture,
    Reading,
    Region,
    UnreadableImage,
    WithoutData,
    place_of,
    reads_parts,
)

MAX_CHANNELS = 65_535
"""A file that claims more is damaged: TIFF has no larger number for them."""


class ValuePicture:
    """A picture's values as float32, those of the file or their share of its type's range.

    Args:
        picture: with values as a file has them.
        reading: says what they mean.

    Raises:
        UnreadableImage: for values that no float32 stands for, or floats where integers tell the range.
    """

    deep = True

    def __init__(self, picture: Picture, reading: Reading) -> None:
        self._picture = picture
        self._reading = reading
        self.size = picture.size
        self.place = place_of(picture)
        self.reads_parts = reads_parts(picture)
        self.outside = False
        """Whether a value outside the range has been read."""

    def channels(self) -> Channels:
        """Not of 8 bits."""
        raise TypeError("a deep picture has regions only")

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """float32 pixels, those without data filled; see `Picture.region`."""
        reading = self._reading
        pixels, part, valid = self._picture.region(box, at_least, decoder)
        missing = without_data(pixels, reading.nodata)
        if valid is not None:
            missing |= ~valid
        has_gaps = bool(missing.any())
        with np.errstate(over="ignore"):
            values = pixels.astype(np.float32)
        if reading.range == "dtype":
            values /= np.float32(largest_of(pixels.dtype))
        low, high = (bound.astype(np.float32) for bound in reading.bounds())
        if reading.sampled:
            # One range for all, however many there are.
            low, high = low[:1], high[:1]
            if values.shape[2] < reading.in_chans:
                plural = "s" if values.shape[2] > 1 else ""
                raise UnreadableImage(
                    f"it has {values.shape[2]} channel{plural}, but data.channel_sampling is "
                    f"{reading.in_chans}"
                )
        inside = values[~missing][None] if has_gaps else values
        if not inside.size and box == (0, 0, *self.size):
            raise WithoutData("it has no pixel with data")
        if inside.size:
            least, most = extremes(inside)
            if not np.isfinite([least, most]).all():
                raise UnreadableImage("it has values that float32 does not reach")
            if (least < low).any() or (most > high).any():
                self.outside = True
                if reading.clip:
                    np.clip(values, low, high, out=values)
        if has_gaps:
            values[missing] = low + np.asarray(reading.fill or (0.5,), np.float32) * (high - low)
        return Region(values, part, ~missing if has_gaps else None)


def without_data(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """Pixels of (H, W, C) of which a channel has no data: not a finite number, or `nodata`; bool (H, W).

    Raises:
        UnreadableImage: for values that are not numbers.
    """
    dtype = values.dtype
    if dtype.kind not in "uifb":
        raise UnreadableImage(f"its values are {dtype}: integers and floats are read")
    missing = np.zeros(values.shape[:2], bool)
    if dtype.kind == "f" and values.size and not np.isfinite([values.min(), values.max()]).all():
        missing = ~np.isfinite(values).all(axis=2)
    if nodata is not None and not np.isnan(nodata):
        # In the values' own type: -3.4e38 in a tag is not the same number as a double.
        with np.errstate(over="ignore"):
            own = dtype.type(nodata) if dtype.kind == "f" else nodata
        found = values == own
        if found.any():
            missing |= found.any(axis=2)
    return missing


_ROWS = 64


def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(least, most) of each channel of (H, W, C), none of them 0: (C,) each, NaN where a value is NaN."""
    if not values.flags.c_contiguous:
        return values.min(axis=(0, 1)), values.max(axis=(0, 1))
    # Along rows of a few channels numpy takes ten times as long as along rows of many.
    flat = values.reshape(-1, values.shape[2])
    whole = max(len(flat) // _ROWS, 1) * min(_ROWS, len(flat))
    rows = flat[:whole].reshape(-1, min(_ROWS, len(flat)) * flat.shape[1])
    least, most = (
        np.concatenate([found.reshape(-1, flat.shape[1]), flat[whole:]])
        for found in (rows.min(axis=0), rows.max(axis=0))
    )
    return least.min(axis=0), most.max(axis=0)


def largest_of(dtype: np.dtype) -> int:
    """The largest value of a type of integers.

    Raises:
        UnreadableImage: for floats, whose type tells no range.
    """
    if dtype.kind == "f":
        raise UnreadableImage(
            f"its values are {dtype}, whose type tells no range: give data.range=[LOW, HIGH]"
        )
    return 1 if dtype.kind == "b" else int(np.iinfo(dtype).max)


def chosen(values: np.ndarray, reading: Reading, names: Sequence[str] = ()) -> np.ndarray:
    """The channels of (H, W, channels) that `data.channels` names, which must be `Reading.in_chans`.

    Raises:
        UnreadableImage: if they are not there, or are others in number.
    """
    numbers = channel_numbers(values.shape[2], reading, names)
    return values if numbers is None else values[:, :, numbers]


def channel_numbers(num_channels: int, reading: Reading, names: Sequence[str] = ()) -> list[int] | None:
    """Which channels of a file are taken, in their order; None for all of them.

    Raises:
        UnreadableImage: if they are not there, or are others in number than `Reading.in_chans`.
    """
    check_channels(num_channels)
    if reading.channels is None:
        if reading.in_chans in (num_channels, 0):
            return None
        plural = "s" if num_channels > 1 else ""
        raise UnreadableImage(
            f"it has {num_channels} channel{plural}, but in_chans is {reading.in_chans}; data.channels "
            f"chooses among a file's"
        )
    numbers = []
    for channel in reading.channels:
        number = names.index(channel) if channel in names else channel
        if not isinstance(number, int) or not 0 <= number < num_channels:
            there = f"0 to {num_channels - 1}" + (f", {', '.join(names)}" if names else "")
            raise UnreadableImage(f"it has no channel {channel!r} of data.channels; there are {there}")
        numbers.append(number)
    return numbers


def check_channels(num_channels: int) -> None:
    """Check how many channels a file claims, before anything is made for each of them.

    Raises:
        UnreadableImage: if it is more than `MAX_CHANNELS`.
    """
    if num_channels > MAX_CHANNELS:
        raise UnreadableImage(f"it claims {num_channels:,} channels, more than {MAX_CHANNELS:,}")
