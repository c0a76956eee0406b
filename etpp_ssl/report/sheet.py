"""The sheet of `etpp inspect`: a few images as they are, and how often each channel has which values.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.formats.values import without_data
from etpp_ssl.data.resize import resize
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.statistics import Channel, Values
from etpp_ssl.files import replaced_file
from etpp_ssl.messages import shown_text
from etpp_ssl.report.figures import COLOURS, FAINT, FONT_SIZE, INK, dress
from etpp_ssl.report.panels import as_levels

DPI = 150
COLUMNS, ROWS = 4, 2
"""Of images."""
WIDTH, SIDE, CAPTION, HISTOGRAM = 8.4, 1.95, 0.24, 2.9
"""Inches of the sheet, of an image with its gap, of the line below it and of a histogram with its axes."""
MOST_PIXELS = 280
"""Of an image's longer side on the sheet."""
BINS = 128
STRETCH = (0.01, 0.99)
"""Quantiles of a channel that are black and white."""


def write_sheet(
    file: Path,
    source: ImageSource,
    indices: Sequence[int],
    values: Values,
    bounds: Sequence[tuple[float, float]],
    nodata: float | None,
) -> None:
    """Draw a sheet.

    Args:
        file: the PNG.
        source: raw images.
        indices: those that were read, of which a few are shown.
        values: what they hold.
        bounds: (low, high) of each channel, marked in the histogram; unused for several types.
        nodata: the value of pixels without data.

    Raises:
        UserError: if it cannot be written.
    """
    pictures: list[tuple[str, np.ndarray]] = []
    spread = [*indices[:: max(1, len(indices) // (COLUMNS * ROWS))], *indices]
    for index in dict.fromkeys(spread):
        if len(pictures) == COLUMNS * ROWS:
            break
        try:
            pictures.append((source.name(index), _picture(source, index, values, nodata)))
        except UnreadableImage:
            continue
    rows = math.ceil(len(pictures) / COLUMNS)
    types = [name for name, channels in values.channels.items() if channels]
    height = 0.35 + rows * (SIDE + CAPTION) + HISTOGRAM * len(types)
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    figure.text(0.15 / WIDTH, 1 - 0.2 / height, _heading(values), size=FONT_SIZE, color=INK, va="center")
    for number, (name, picture) in enumerate(pictures):
        row, column = divmod(number, COLUMNS)
        bottom = height - 0.35 - row * (SIDE + CAPTION) - SIDE
        step = (WIDTH - 0.3) / COLUMNS
        axes = figure.add_axes(
            ((0.15 + column * step) / WIDTH, bottom / height, (step - 0.12) / WIDTH, (SIDE - 0.08) / height)
        )
        axes.imshow(picture, interpolation="nearest")
        axes.set(xticks=[], yticks=[], anchor="N")
        axes.spines[:].set_visible(False)
        axes.set_xlabel(shown_text(name, 34), size=FONT_SIZE - 2, color=INK, labelpad=2, parse_math=False)
    for number, name in enumerate(types):
        bottom = HISTOGRAM * (len(types) - 1 - number) + 0.5
        axes = figure.add_axes(
            (0.75 / WIDTH, bottom / height, (WIDTH - 1.0) / WIDTH, (HISTOGRAM - 0.8) / height)
        )
        _histogram(axes, name, values.channels[name], bounds, marked=len(types) == 1)
    with replaced_file(file) as aside:
        figure.savefig(aside, dpi=DPI, format="png")


def _heading(values: Values) -> str:
    count = len(next(channels for channels in values.channels.values() if channels))
    if values.pooled:
        shown = "the first channels of each as red, green, blue"
    elif count == 1:
        shown = "one channel in grey"
    else:
        names = ", ".join(str(min(channel, count - 1)) for channel in range(3))
        shown = f"channels {names} of {count} as red, green, blue"
    low, high = (f"{100 * share:g} %" for share in STRETCH)
    gaps = "; checkered: no data" if values.num_missing else ""
    return f"{shown}, each from its {low} to its {high} quantile over all images that were read{gaps}"


def _picture(source: ImageSource, index: int, values: Values, nodata: float | None) -> np.ndarray:
    """uint8 (H, W, 3) of an image, small; a checkerboard where there is no data."""
    picture = source.open(index)
    region = picture.region((0, 0, *picture.size), picture.size)
    channels = values.channels[region.pixels.dtype.name]
    gaps = without_data(region.pixels, nodata)
    if region.valid is not None:
        gaps |= ~region.valid
    planes = []
    for number in (min(channel, region.pixels.shape[2] - 1) for channel in range(3)):
        known = channels[0 if values.pooled else number] if channels else None
        low, high = (known.quantile(share) for share in STRETCH) if known is not None else (0.0, 1.0)
        plane = region.pixels[:, :, number].astype(np.float32)
        planes.append((plane - np.float32(low)) / np.float32((high - low) or 1.0))
    stretched = np.stack(planes, axis=2)
    stretched[gaps] = 0
    width, height = picture.size
    factor = min(1.0, MOST_PIXELS / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = resize(region._replace(pixels=stretched, valid=~gaps if gaps.any() else None), size, "bilinear")
    return as_levels(small.permute(1, 2, 0).numpy())


def _histogram(
    axes: Axes,
    name: str,
    channels: Sequence[Channel],
    bounds: Sequence[tuple[float, float]],
    *,
    marked: bool,
) -> None:
    """Share of the values in each of `BINS` equal parts of the range, channel by channel.

    Of a range of which the values take less than a quarter, that part is shown.
    """
    common = not marked or len(set(bounds)) == 1
    least = min(channel.quantile(0.001) for channel in channels)
    most = max(channel.quantile(0.999) for channel in channels)
    narrow = common and marked and most - least < (bounds[0][1] - bounds[0][0]) / 4
    for number, channel in enumerate(channels):
        low, high = bounds[number] if marked else (channel.least, channel.most)
        values, counts = channel.filled()
        values = values.clip(channel.least, channel.most)  # The middle of the outermost bins may lie beyond.
        left, right = min(low, channel.quantile(0.001)), max(high, channel.quantile(0.999))
        if narrow:
            left, right = least - 0.1 * (most - least), most + 0.1 * (most - least)
        edges = np.linspace(left, max(right, left + 1e-9), BINS + 1)
        if channel.binning.exact and right - left < 2 * BINS:
            edges = np.arange(math.floor(left) - 0.5, right + 1)
        shares = np.histogram(values, edges, weights=counts)[0] / counts.sum()
        if not common:
            edges = (edges - low) / (high - low)
        colour = COLOURS[number] if len(channels) <= len(COLOURS) else _colour(number, len(channels))
        axes.stairs(shares, edges, color=colour, linewidth=1, label=f"channel {number}")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high / 1000))
    axes.set_xlabel(
        f"{name} value" if common else f"{name} value, as its share of the channel's own range",
        size=FONT_SIZE,
        color=INK,
    )
    axes.set_ylabel("share of the pixels", size=FONT_SIZE, color=INK)
    dress(axes)
    if marked:
        ends = bounds[0] if common else (0.0, 1.0)
        note = "dashed: the range"
        if narrow:
            note = f"the range, {ends[0]:g} to {ends[1]:g}, goes on"
        for end in () if narrow else ends:
            axes.axvline(end, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_title(note, size=FONT_SIZE - 1, color=INK, loc="right", pad=3)
    if len(channels) <= len(COLOURS):
        axes.legend(fontsize=FONT_SIZE - 1, frameon=False, labelcolor=INK)
    else:
        last = len(channels) - 1
        title = f"channels 0 (dark) to {last} (light)"
        axes.set_title(title, size=FONT_SIZE - 1, color=INK, loc="left", pad=3)


def _colour(number: int, count: int) -> tuple[float, ...]:
    return tuple(colormaps["viridis"](0.9 * number / (count - 1)))
