"""What values images hold: counts that add up to the same numbers for any number of workers, on any machine.

Integers of 8 and 16 bits are counted value by value, so that all their numbers are exact. Values of other
types are counted in bins, 2,048 for each power of two: a quantile is off by 1/4,096 of itself at most. Their
means and deviations are sums in float64, image by image in the images' order. Memory does not grow with the
number of images.

Legend: H, W pixels, C channels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from etpp_ssl.data.formats.base import Picture, UnreadableImage
from etpp_ssl.data.formats.values import without_data
from etpp_ssl.data.loader import evaluation_requests
from etpp_ssl.data.sampler import BatchRequest, safe_name
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.found import extension_of
from etpp_ssl.data.workers import MonitoredLoader, note, note_reading

AT_ONCE = 4
"""Images of a request to a worker."""
STRIP_VALUES = 1 << 22
"""Values that are counted together: a large image is read in strips."""
_PART = re.compile(r"#\d+(,\d+)*$")
"""Of a file: what its name ends in."""
FLOAT_BITS = 20
"""Upper bits of a float32 that its bin is known by: sign, exponent and 11 bits of the fraction."""


class Part(NamedTuple):
    """The values of one channel of one image."""

    bins: np.ndarray
    """Ascending; see `Binning`."""
    counts: np.ndarray
    """Of each of them."""
    least: float
    most: float
    bits: int
    """Of integers, all magnitudes joined by `or`."""
    mean: float
    """Of values that are not exact by their bins; and the sum of squares of what is left without it."""
    squares: float


class ImageValues(NamedTuple):
    """What one image holds, or why it cannot be read."""

    name: str
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    """(width, height)."""
    dtype: str = ""
    missing: int = 0
    """Pixels without data."""
    parts: tuple[Part, ...] = ()
    """C of them; empty where no pixel has data."""


class Binning:
    """How values of a type are counted.

    Args:
        dtype: of integers or floats.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.exact = dtype.kind != "f" and dtype.itemsize <= 2
        """Whether a bin is a value."""
        self._lowest = 0 if not self.exact or dtype.kind == "b" else int(np.iinfo(dtype).min)
        self.count = 1 << (min(16, 8 * dtype.itemsize) if self.exact else FLOAT_BITS)

    def bins(self, values: np.ndarray) -> np.ndarray:
        """The bin of each value, int64 (n,)."""
        if self.exact:
            return values.astype(np.int64) - self._lowest
        with np.errstate(over="ignore"):
            bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)
        # Negative numbers count backwards.
        ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
        return (ordered >> (32 - FLOAT_BITS)).astype(np.int64)

    def values(self, bins: np.ndarray) -> np.ndarray:
        """What bins stand for, float64 (n,): their value, or their middle."""
        if self.exact:
            return (bins + self._lowest).astype(np.float64)
        ordered = ((bins << (32 - FLOAT_BITS)) + (1 << (31 - FLOAT_BITS))).astype(np.uint32)
        bits = np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered)
        found = bits.astype(np.uint32).view(np.float32).astype(np.float64)
        found[np.abs(found) < np.finfo(np.float32).tiny] = 0
        return found


class Channel:
    """The values of a channel over all images of a type."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.binning = Binning(dtype)
        self.counts = np.zeros(self.binning.count, np.int64)
        self.least, self.most = math.inf, -math.inf
        self._bits = 0
        self._num = 0
        self._mean = self._squares = 0.0

    def add(self, part: Part) -> None:
        """Take an image's values."""
        self.counts[part.bins] += part.counts
        self.least, self.most = min(self.least, part.least), max(self.most, part.most)
        self._bits |= part.bits
        num = int(part.counts.sum())
        # Chan, Golub and LeVeque's way to put two means and deviations together.
        total, apart = self._num + num, part.mean - self._mean
        self._squares += part.squares + apart * apart * self._num * num / total
        self._mean += apart * num / total
        self._num = total

    @property
    def total(self) -> int:
        """Values."""
        return self._num

    def filled(self) -> tuple[np.ndarray, np.ndarray]:
        """(values, counts) of the bins that have any, values ascending."""
        (bins,) = np.nonzero(self.counts)
        return self.binning.values(bins), self.counts[bins]

    def quantile(self, share: float) -> float:
        """The smallest value that so large a share of the values does not exceed."""
        values, counts = self.filled()
        reached = np.cumsum(counts)
        place = int(np.searchsorted(reached, share * float(reached[-1]) * (1 - 1e-12)))
        return float(min(max(values[min(place, len(values) - 1)], self.least), self.most))

    def moments(self) -> tuple[float, float]:
        """(mean, standard deviation)."""
        if not self.binning.exact:
            return self._mean, math.sqrt(self._squares / self._num)
        values, counts = (part.astype(np.int64).tolist() for part in self.filled())
        num = sum(counts)
        first = sum(value * count for value, count in zip(values, counts, strict=True))
        second = sum(value * value * count for value, count in zip(values, counts, strict=True))
        return first / num, math.sqrt((num * second - first * first) / num**2)

    def levels(self, shift: int = 0) -> int | None:
        """Different values, after a shift to the right; None where they are not counted one by one."""
        if not self.binning.exact:
            return None
        values, _ = self.filled()
        return len(np.unique(values.astype(np.int64) >> shift))

    @property
    def used_bits(self) -> tuple[int, int] | None:
        """Of integers, the lowest bit that any value has and the number of bits from there to the highest."""
        if self.dtype.kind == "f":
            return None
        lowest = max(0, (self._bits & -self._bits).bit_length() - 1)
        return lowest, self._bits.bit_length() - lowest

    @property
    def saturated(self) -> float:
        """Share of the values that are, or are counted with, the largest one."""
        _, counts = self.filled()
        return float(counts[-1] / counts.sum())

    def outside(self, low: float, high: float) -> float:
        """Share of the values below `low` or above `high`."""
        values, counts = self.filled()
        # Of the outermost bins the ends are known.
        values[0], values[-1] = self.least, self.most
        return float(counts[(values < low) | (values > high)].sum() / counts.sum())


@dataclass
class Values:
    """What a sample of a data set holds."""

    pooled: bool = False
    """Whether all channels count as one: images may differ in their number (`data.channel_sampling`)."""
    channels: dict[str, list[Channel]] = field(default_factory=dict)
    """C of them by the type's name, types in the order in which they were met."""
    num_images: Counter[str] = field(default_factory=Counter)
    """Read, by type."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by (width, height)."""
    extensions: Counter[str] = field(default_factory=Counter)
    """Images by the end of their names."""
    num_pixels: int = 0
    num_missing: int = 0
    """Pixels without data."""
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    """Names of the images that cannot be read, by reason."""

    def add(self, image: ImageValues) -> None:
        """Take an image."""
        if image.reason:
            self.unreadable.setdefault(image.reason, []).append(image.name)
            return
        self.num_images[image.dtype] += 1
        self.sizes[image.size] += 1
        file = _PART.sub("", image.name)
        # An item of a stream is named by its shard.
        self.extensions["" if " :: " in file else extension_of(file)] += 1
        self.num_pixels += image.size[0] * image.size[1]
        self.num_missing += image.missing
        channels = self.channels.setdefault(image.dtype, [])
        if image.parts and not channels:
            channels += [Channel(np.dtype(image.dtype)) for _ in image.parts[: 1 if self.pooled else None]]
        for number, part in enumerate(image.parts):
            channels[0 if self.pooled else number].add(part)


def values_of(
    picture: Picture, name: str, nodata: float | None, *, most_pixels: int | None = None
) -> ImageValues:
    """What a raw picture holds, at full resolution.

    Args:
        picture: of `Reading.range` raw.
        name: of the image.
        nodata: the value of pixels without data, beside NaN and what the file says.
        most_pixels: on a side; of a larger picture the middle is read. None reads all of it.

    Raises:
        UnreadableImage: if it cannot be decoded, or has values that no run could use.
    """
    width, height = (min(side, most_pixels or side) for side in picture.size)
    left, above = (picture.size[0] - width) // 2, (picture.size[1] - height) // 2
    parts: list[list[Part]] = []
    missing, dtype = 0, np.dtype(np.uint8)
    rows, top = max(1, STRIP_VALUES // width), 0
    while top < height:
        bottom = min(height, top + rows)
        region = picture.region((left, above + top, left + width, above + bottom), (width, bottom - top))
        gaps = without_data(region.pixels, nodata)
        if region.valid is not None:
            gaps |= ~region.valid
        missing += int(gaps.sum())
        dtype = region.pixels.dtype
        there = region.pixels[~gaps] if gaps.any() else region.pixels.reshape(-1, region.pixels.shape[2])
        parts = parts or [[] for _ in range(there.shape[1])]
        if len(there):
            for channel, found in enumerate(parts):
                found.append(_part(np.ascontiguousarray(there[:, channel])))
        rows, top = max(1, STRIP_VALUES // (width * len(parts))), bottom
    joined = tuple(_joined(found, dtype) for found in parts if found)
    return ImageValues(name, "", picture.size, dtype.name, missing, joined)


def _part(values: np.ndarray) -> Part:
    """Of values (n,), n > 0."""
    dtype, binning = values.dtype, Binning(values.dtype)
    bins = binning.bins(values)
    if len(bins) < binning.count // 8:
        used, counts = np.unique(bins, return_counts=True)
    else:
        counts = np.bincount(bins, minlength=binning.count)
        (used,) = np.nonzero(counts)
        counts = counts[used]
    bits, mean, squares = 0, 0.0, 0.0
    if dtype.kind != "f":
        distinct = (binning.values(used) if binning.exact else values).astype(np.int64)
        bits = int(np.bitwise_or.reduce(np.abs(distinct)))
    if not binning.exact:
        with np.errstate(over="ignore"):
            if not np.isfinite(values.astype(np.float32)).all():
                raise UnreadableImage("it has values that float32 does not reach")
        wide = values.astype(np.float64)
        # numpy adds in pairs, in the same order everywhere; a product of BLAS would not.
        mean = float(np.add.reduce(wide) / len(wide))
        squares = float(np.add.reduce(np.square(wide - mean)))
    least, most = float(values.min()), float(values.max())
    return Part(used.astype(np.uint32), counts.astype(np.uint32), least, most, bits, mean, squares)


def _joined(parts: Sequence[Part], dtype: np.dtype) -> Part:
    """The strips of an image as one."""
    if len(parts) == 1:
        return parts[0]
    channel = Channel(dtype)
    for part in parts:
        channel.add(part)
    (bins,) = np.nonzero(channel.counts)
    return Part(
        bins.astype(np.uint32), channel.counts[bins], channel.least, channel.most,
        channel._bits, channel._mean, channel._squares,
    )  # fmt: skip


def read_values(
    source: ImageSource,
    indices: Sequence[int],
    nodata: float | None,
    *,
    pooled: bool = False,
    num_workers: int = 0,
    stall_seconds: float | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Values:
    """What some images hold; the same for any number of workers.

    Args:
        source: of raw pictures.
        indices: which of its images, in their order.
        nodata: see `values_of`.
        pooled: see `Values`.
        num_workers, stall_seconds: see `etpp_ssl.data.loader.load_batches`.
        advance: told how many images more have been read.
    """
    requests = evaluation_requests(indices, size=(1, 1), batch_size=AT_ONCE)
    # Few images are read before processes have started.
    workers = num_workers if len(requests) > 4 else 0
    found = Values(pooled)
    loader = MonitoredLoader(_ValueReader(source, nodata), requests, workers, 2, False, stall_seconds)
    try:
        for images in loader:
            for image in images:
                found.add(image)
            advance(len(images))
    finally:
        loader.close()
    return found


class _Images(list[ImageValues]):
    """What a worker hands over."""

    def share_memory(self) -> _Images:
        """As it is: arrays of numpy go through the worker's queue."""
        return self


class _ValueReader(Dataset[_Images]):
    """Reads the images of a request."""

    def __init__(self, source: ImageSource, nodata: float | None) -> None:
        self.source = source
        self.nodata = nodata

    def __getitem__(self, request: BatchRequest) -> _Images:
        images, described = _Images(), request.described(self.source.name)
        for index in request.indices:
            name = safe_name(self.source.name, index)
            note_reading(index, name, described)
            try:
                images.append(values_of(self.source.open(index), name, self.nodata))
            except UnreadableImage as error:
                images.append(ImageValues(name, str(error)))
        note(f"\n{described}")
        return images
