"""Arrays in files: which axis is which, and pictures that read what they are asked for and no more.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np

from etpp_ssl.config import listed
from etpp_ssl.data.formats.base import (
    Channels,
    Decoder,
    Reading,
    Region,
    UnreadableImage,
    check_pixels,
    level_for,
    one_line_reasons,
    whole_pixels,
)
from etpp_ssl.data.formats.pictures import FramedPicture
from etpp_ssl.data.formats.values import channel_numbers, without_data

Scale = tuple[float, float]
"""(slope, intercept): a value is slope times what is stored, and intercept."""

_LETTERS = {
    "y": "h", "lat": "h", "latitude": "h", "height": "h", "h": "h", "row": "h", "rows": "h",
    "x": "w", "lon": "w", "longitude": "w", "width": "w", "w": "w", "column": "w", "columns": "w",
    "c": "c", "channel": "c", "channels": "c", "band": "c", "bands": "c",
    "z": "z", "t": "t", "time": "t",
}  # fmt: skip
"""Of the names that axes have in OME's files and in those of netCDF and xarray."""


def picture_of_array(
    array: Any, reading: Reading, own_axes: str | None = None, **options: Any
) -> StoredArray | FramedPicture:
    """An array as a picture, of several images where `reading.frames` says that its other axes count them.

    Args:
        array, reading, own_axes: see `StoredArray`.
        options: its others.

    Raises:
        UnreadableImage: see `StoredArray`.
    """
    first = StoredArray(array, reading, own_axes, **options)
    number = math.prod(first.extents)
    return first if number == 1 else FramedPicture(first, number, first.frame)


class StoredArray:
    """A picture of an array of which only the regions that are asked for are read.

    Args:
        array: with a shape, a dtype and numpy's slices: mapped from a file, or of h5py or Zarr.
        reading: says which channels, and how many.
        own_axes: a letter an axis as the file names them, see `axes_of`.
        names: of the channels, where the file names them.
        nodata: what the file stores where there is no data.
        scale: of the values.
        on_disk: whether it is read when a region is asked for, and not in memory.
        copies: smaller copies of the whole array, with the same axes, which may serve regions that need few
            pixels; others than those are passed over.

    Raises:
        UnreadableImage: for an array of other axes, of other channels, too large, or not of numbers.
    """

    deep = True

    def __init__(
        self,
        array: Any,
        reading: Reading,
        own_axes: str | None = None,
        *,
        names: Sequence[str] = (),
        nodata: float | None = None,
        scale: Scale = (1.0, 0.0),
        on_disk: bool = False,
        copies: Sequence[Any] = (),
    ) -> None:
        self.reads_parts = on_disk
        self._axes = axes_of(array.shape, reading, own_axes)
        self._nodata = nodata
        self._scale = scale
        lengths = dict(zip(self._axes, array.shape, strict=True))
        self.extents = [
            length for axis, length in zip(self._axes, array.shape, strict=True) if axis not in "hwc"
        ]
        """Lengths of the axes that count images, the last of which counts fastest."""
        self._place = [0] * len(self.extents)
        self.size = (lengths["w"], lengths["h"])
        self._levels = [array, *(other for other in copies if self._is_copy(other, array))]
        self._sizes = [
            (level.shape[self._axes.index("w")], level.shape[self._axes.index("h")]) for level in self._levels
        ]
        check_pixels(self.size, reading.max_pixels)
        check_numbers(array.dtype)
        num_channels = lengths.get("c", 1)
        self._numbers = channel_numbers(num_channels, reading, names) or list(range(num_channels))

    def frame(self, number: int) -> StoredArray:
        """One of the images, the same in all else."""
        other = copy(self)
        other._place = [int(place) for place in np.unravel_index(number, self.extents)]
        return other

    def channels(self) -> Channels:
        """Not of 8 bits."""
        raise TypeError("a deep picture has regions only")

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """At the lowest resolution that serves, of those that the file has; see `Picture.region`."""
        level, wanted = level_for(self._sizes, box, at_least)
        (left, top, right, bottom), part = whole_pixels(wanted)
        first, last = min(self._numbers), max(self._numbers) + 1
        parts = {"h": slice(top, bottom), "w": slice(left, right), "c": slice(first, last)}
        others = iter(self._place)
        where = tuple(parts[axis] if axis in parts else next(others) for axis in self._axes)
        with one_line_reasons("a part of it is damaged"):
            values = np.asarray(self._levels[level][where])
        axes = "".join(axis for axis in self._axes if axis in parts)
        if "c" not in axes:
            values, axes = values[..., None], f"{axes}c"
        values = values.transpose([axes.index(axis) for axis in "hwc"])
        if self._numbers != list(range(first, last)):
            values = values[:, :, [number - first for number in self._numbers]]
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        valid = None if self._nodata is None else ~without_data(values, self._nodata)
        return Region(scaled(values, self._scale), part, valid)

    def _is_copy(self, other: Any, array: Any) -> bool:
        """Whether it is the array, with height and width divided by one number, rounded either way."""
        if other.dtype != array.dtype or len(other.shape) != len(array.shape):
            return False
        factor = round(self.size[0] / max(1, other.shape[self._axes.index("w")]))
        return factor > 1 and all(
            length in ((whole // factor, -(-whole // factor)) if axis in "hw" else (whole,))
            for axis, length, whole in zip(self._axes, other.shape, array.shape, strict=True)
        )


def check_numbers(dtype: np.dtype) -> None:
    """Check that values are of a type that is read.

    Raises:
        UnreadableImage: if they are not.
    """
    without_data(np.empty((0, 0, 0), dtype), None)


def check_claim(shape: tuple[int, ...], reading: Reading) -> None:
    """Check how many values an array claims that is read whole, whatever part of it is wanted.

    Raises:
        UnreadableImage: if it is more than an image of `reading` has, or of four channels.
    """
    most = reading.max_pixels * max(4, reading.in_chans)
    if math.prod(shape) > most:
        raise UnreadableImage(
            f"it claims {math.prod(shape):,} values, more than data.max_pixels {reading.max_pixels:,} allows"
        )


def scaled(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Stored values as those that are meant: float32, rounded once; unchanged for the scale (1, 0)."""
    slope, intercept = scale
    if (slope, intercept) == (1, 0):
        return values
    return (values * np.float64(slope) + np.float64(intercept)).astype(np.float32)


def axes_of(shape: tuple[int, ...], reading: Reading, own_axes: str | None = None) -> str:
    """One letter an axis: `h`, `w`, and `c` where there is one. Others count images, or have the length 1.

    `data.axes` counts first, for all axes or for those longer than 1, then what the file says itself. An
    array without names has the axes (height, width) or (height, width, channels).

    Args:
        shape: of the array.
        reading: may say the axes, and how many channels are wanted.
        own_axes: a letter an axis, as the file names them. `data.axes=pages` makes the only other one that
            is longer than 1 the channels.

    Raises:
        UnreadableImage: for axes that this does not settle, or an array without pixels.
    """
    if own_axes is None and reading.axes is None:
        return _of_numpy(shape, reading)
    if 0 in shape:
        raise UnreadableImage(f"its shape is {shape}: it has no pixels")
    if reading.axes not in (None, "pages"):
        axes = _spread(shape, reading.axes)
        if axes is None:
            named = f", which the file names {own_axes}" if own_axes else ""
            raise UnreadableImage(
                f"its shape is {shape}{named}, but data.axes is {reading.axes}: give a letter an axis"
            )
        _require_no_others(shape, axes, reading)
        return axes
    if own_axes is None:
        raise UnreadableImage(f"its shape is {shape}, and it has no pages: give data.axes such as chw")
    long = [axis for axis, length in zip(own_axes, shape, strict=True) if axis not in "hw" and length > 1]
    if "c" not in long and len(long) == 1 and not reading.frames:
        (stack,) = long
        as_channels = own_axes.replace("c", "-").replace(stack, "c")
        if reading.axes != "pages":
            length = shape[own_axes.index(stack)]
            raise UnreadableImage(
                f"it is a stack, of shape {shape} with axes {own_axes}: data.frames=all makes each of the "
                f"{length} entries of {stack} an image, data.axes=pages makes them channels, of which "
                f"data.channels chooses"
            )
        return as_channels
    _require_no_others(shape, own_axes, reading)
    return own_axes


def _spread(shape: tuple[int, ...], axes: str) -> str | None:
    """`axes` with a dash for each axis of length 1 that it leaves out; None for another number of axes."""
    if len(axes) == len(shape):
        return axes
    long = [length > 1 for length in shape]
    if sum(long) != len(axes):
        return None
    letters = iter(axes)
    return "".join(next(letters) if is_long else "-" for is_long in long)


def _require_no_others(shape: tuple[int, ...], axes: str, reading: Reading) -> None:
    for axis, length in zip(axes, shape, strict=True):
        if axis not in "hwc" and length > 1 and not reading.frames:
            raise UnreadableImage(
                f"its shape is {shape} with axes {axes}: an image has h, w and c, and {axis} has {length} "
                f"entries, each of which data.frames=all makes an image"
            )


def _of_numpy(shape: tuple[int, ...], reading: Reading) -> str:
    fits = len(shape) in (2, 3) and 0 not in shape
    if not fits or (reading.channels is None and reading.in_chans not in ((*shape, 1)[2], 0)):
        remedy = (
            ": data.axes says which axis is which, such as chw, data.channels chooses among channels"
            if fits
            else ": data.frames=all with data.axes such as nhwc makes images of a further axis"
            if len(shape) > 3
            else ""
        )
        raise UnreadableImage(f"its shape is {shape}, not (height, width, {reading.in_chans}){remedy}")
    return "hwc"[: len(shape)]


def letters_of(names: Sequence[Any]) -> str | None:
    """One letter an axis from the names that a file gives; None where they do not tell height and width.

    Args:
        names: such as `("t", "c", "z", "y", "x")` or `("band", "lat", "lon")`.
    """
    others = iter("abdefgijklmnopqrsu")
    letters = "".join(_LETTERS.get(str(name).lower()) or next(others) for name in names[:12])
    return letters if (letters.count("h"), letters.count("w")) == (1, 1) and letters.count("c") < 2 else None


def named_array(names: Sequence[str], wanted: str | None, what: str) -> str:
    """The array that `data.array` names, or the only one.

    Args:
        names: of the file's arrays of two or more axes.
        wanted: `data.array`.
        what: the file is, in the message.

    Raises:
        UnreadableImage: if there is none, or more than one and no name.
    """
    there = (
        f"it has {listed([repr(name) for name in sorted(names)])}"
        if names
        else "it has no array of two or more axes"
    )
    if wanted is not None:
        if wanted.strip("/") not in names:
            raise UnreadableImage(f"it has no array {wanted!r} of data.array; {there}")
        return wanted.strip("/")
    if len(names) == 1:
        return names[0]
    remedy = ": data.array says which is the image" if names else ""
    raise UnreadableImage(f"it is {what}; {there}{remedy}")


def conventions(attributes: Mapping[str, Any]) -> tuple[float | None, Scale]:
    """(no-data value, scale) that an array's attributes state by the CF conventions: netCDF's and xarray's.

    Raises:
        UnreadableImage: where one is no number.
    """
    fill = attributes.get("_FillValue")
    return None if fill is None else _number("_FillValue", fill), (
        _number("scale_factor", attributes.get("scale_factor", 1)),
        _number("add_offset", attributes.get("add_offset", 0)),
    )


def _number(name: str, value: Any) -> float:
    try:
        return float(np.asarray(value).item())
    except (ValueError, TypeError):
        try:
            # As xarray writes floats into Zarr 3.
            return float(struct.unpack("<d", base64.b64decode(value, validate=True))[0])
        except (TypeError, ValueError, binascii.Error, struct.error):
            raise UnreadableImage(f"its attribute {name} is {value!r}, not a number") from None
