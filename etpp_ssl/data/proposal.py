"""The range, mean and deviation that a recipe should state for what its images hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from etpp_ssl.data.formats.values import largest_of
from etpp_ssl.data.statistics import Channel, Values

TOPS = sorted({2**k - 1 for k in range(1, 65)} | {10**k for k in range(3, 20)})
"""Ends of the range of integers: what so many bits hold, and round numbers."""
BOTTOMS = (0, *sorted({2**k for k in range(7, 64)} | {10**k for k in range(3, 20)}))
"""What lies below zero, without its sign."""
APART = 16
"""Channels whose ranges differ by more than this factor get one each."""
MISSING = (-9999.0, -99999.0, -999.0, -32768.0, -32767.0, float(-np.finfo(np.float32).max), 1e20)
"""What is often written where there is no data."""


@dataclass(frozen=True)
class Proposal:
    """What a recipe should say of the values."""

    in_chans: int
    range: Literal["dtype"] | tuple[tuple[float, float], ...] | None
    """(low, high), one for all channels or one each; None for 8 bits, `dtype` for several types."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of values in [0, 1] of the range; 1 for a channel without any difference."""
    nodata: float | None
    outside: float
    """Share of values outside of the range, of the channel that has most."""

    def bounds(self) -> tuple[tuple[float, float], ...]:
        """(low, high) of each channel; 0 and 1 where the range is that of several types."""
        if self.range is None or self.range == "dtype":
            return ((0.0, 255.0 if self.range is None else 1.0),) * self.in_chans
        return self.range * (self.in_chans if len(self.range) == 1 else 1)

    def layer(self) -> dict[str, Any]:
        """Its keys, as a recipe has them."""
        data: dict[str, Any] = {}
        if self.range is not None:
            pairs = self.range if self.range == "dtype" else [[plain(v) for v in p] for p in self.range]
            data["range"] = pairs[0] if len(pairs) == 1 else pairs
            if self.nodata is not None and not math.isnan(self.nodata):
                data["nodata"] = plain(self.nodata)
        data["mean"] = [float(f"{value:.4g}") for value in self.mean]
        data["std"] = [float(f"{value:.4g}") for value in self.std]
        return {"in_chans": self.in_chans, "data": data}


def propose(
    values: Values,
    given: Literal["dtype", "raw"] | tuple[tuple[float, float], ...] | None,
    nodata: float | None,
) -> Proposal | None:
    """The range, and what mean and deviation the values have in it.

    For integers: from 0 to the smallest of 2^k - 1 and 1000, 10,000 ... that 99.9 % of the values do not
    exceed; where some are negative, from the first of -2^k and -1000, -10,000 ... below 99.9 % of them. For
    floats: the quantiles, rounded outwards to a tenth of the power of ten that their distance has; from 0
    where that adds less than half of it.

    Args:
        values: of the images.
        given: the range of the recipe, which stays; None for none.
        nodata: the value of pixels without data.

    Returns:
        None where the images have no common range.
    """
    types = [name for name, channels in values.channels.items() if channels]
    all_channels = list(zip(*(values.channels[name] for name in types), strict=True))
    pairs: Any = given
    if given in (None, "raw"):
        if len(types) > 1:
            pairs = "dtype"
        elif types == ["uint8"] and not values.num_missing:
            pairs = None
        else:
            pairs = _together([_pair(channel) for (channel,) in all_channels])
    if pairs == "dtype" and any(np.dtype(name).kind == "f" for name in types):
        return None
    mean, std, outside = [], [], 0.0
    for number, channels in enumerate(all_channels):
        scaled = []
        for channel in channels:
            if pairs in (None, "dtype"):
                low, high = 0.0, float(largest_of(channel.dtype))
            else:
                low, high = pairs[number if len(pairs) > 1 else 0]
            middle, spread = channel.moments()
            scaled.append((channel.total, (middle - low) / (high - low), spread / (high - low)))
            outside = max(outside, channel.outside(low, high))
        total = sum(count for count, _, _ in scaled)
        middle = sum(count * m for count, m, _ in scaled) / total
        square = sum(count * (s * s + (m - middle) ** 2) for count, m, s in scaled) / total
        mean.append(middle)
        std.append(math.sqrt(square) or 1.0)
    return Proposal(len(all_channels), pairs, tuple(mean), tuple(std), nodata, outside)


def missing_value(values: Values) -> float | None:
    """A value that is often written where there is no data, if it lies farther out than all others spread."""
    for channel in (channel for channels in values.channels.values() for channel in channels):
        found, _ = channel.filled()
        if len(found) < 2:
            continue
        if channel.least in MISSING and found[1] - channel.least > channel.most - found[1]:
            return channel.least
        if channel.most in MISSING and channel.most - found[-2] > found[-2] - channel.least:
            return channel.most
    return None


def _pair(channel: Channel) -> tuple[float, float]:
    """(low, high) of one channel; see `propose`."""
    least, most = channel.quantile(0.001), channel.quantile(0.999)
    if channel.dtype.kind != "f":
        low = -next(bottom for bottom in BOTTOMS if bottom >= -least)
        return low, next(top for top in TOPS if top >= max(most, low + 1))
    distance = most - least
    if distance == 0:
        return (0.0, most) if most > 0 else (least, least + 1)
    unit = 10.0 ** (math.floor(math.log10(distance)) - 1)
    # To four digits more: 0.93 of float32 is a little more than 0.93.
    low, high = math.floor(round(least / unit, 4)) * unit, math.ceil(round(most / unit, 4)) * unit
    if 0 < low < distance / 2:
        low = 0.0
    # Ten digits are more than float32 has; they take away what binary fractions add.
    return float(f"{low:.10g}"), float(f"{high:.10g}")


def _together(pairs: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """One pair for all channels, unless their ranges differ much."""
    extents = [high - low for low, high in pairs]
    if max(extents) > APART * min(extents):
        return tuple(pairs)
    return ((min(low for low, _ in pairs), max(high for _, high in pairs)),)


def plain(value: float) -> int | float:
    """A number as YAML should have it: whole ones without a point."""
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(value)
