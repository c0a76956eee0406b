"""The figure of the low-frequency crop: what crops leave of an image, and where they lie in its spectrum.

Sizes on paper are in inches; the fonts are chosen for a page that shows one inch as 100 pixels.

Legend: C channels, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from etpp_ssl.config import UserError, as_pair, show_size
from etpp_ssl.curriculum.cost import area_share
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.report.figures import COLOURS, FONT_SIZE, INK, dress


def crop_figure(
    image: Tensor, bandwidths: Sequence[int | tuple[int, int]], *, inches: float = 2.24
) -> Figure:
    """The low-frequency crops of an image, the image, and its spectrum with the kept squares outlined.

    Crops and image stand on one line and at one scale, so their sizes are those that the network gets.

    Args:
        image: floating point (C, H, W) in [0, 1]. Three channels are shown as colours; of any other
            number the mean over channels is shown in grey. What a crop overshoots [0, 1] is clipped.
        bandwidths: B or (Bh, Bw) in pixels, one per crop, shown in this order.
        inches: height or width of the image on paper, whichever is larger; at 2.24 an image of 224
            pixels saved at 200 dpi has exactly 2x2 dots per pixel.

    Returns:
        A figure on white whose width follows from the panels; axes are the crops in order, the image,
        the spectrum.

    Raises:
        UserError: for an image that is not (C, H, W) floating point, or a bandwidth that does not fit.
    """
    if image.ndim != 3 or not image.is_floating_point():
        raise UserError(
            f"crop_figure needs one floating-point image (C, H, W), not {image.dtype} {tuple(image.shape)}"
        )
    image = image.detach().float().cpu()
    sizes = [as_pair(bandwidth) for bandwidth in bandwidths]
    crops = [low_frequency_crop(image, size) for size in sizes]
    height, width = image.shape[-2:]
    per_pixel = inches / max(height, width)

    edge, gap, caption = 0.11, 0.22, 0.52
    axis_left, axis_below, letter = 0.54, 0.46, 0.085
    paper_height = axis_below + per_pixel * height + caption
    titles = [f"bandwidth {show_size(size)}" for size in sizes] + [f"image, {show_size((height, width))}"]
    # Narrow panels leave room for their captions.
    slots = [
        max(per_pixel * shown.shape[-1], letter * len(title))
        for shown, title in zip((*crops, image), titles, strict=True)
    ]
    spectrum_slot = max(per_pixel * width, 2.0)
    paper_width = edge + sum(slots) + gap * len(crops) + axis_left + spectrum_slot + edge

    figure = Figure(figsize=(paper_width, paper_height), facecolor="white")

    def panel(left: float, size: tuple[int, int]) -> Axes:
        wide, high = per_pixel * size[1], per_pixel * size[0]
        return figure.add_axes(
            (left / paper_width, axis_below / paper_height, wide / paper_width, high / paper_height)
        )

    left = edge
    for index, (crop, size) in enumerate(zip(crops, sizes, strict=True)):
        axes, colour = panel(left, size), COLOURS[index % len(COLOURS)]
        _show_image(axes, crop, colour)
        percent = 100 * area_share(size, (height, width))
        share = f"{percent:.0f}" if percent >= 1 else f"{percent:.1g}"
        _caption(axes, titles[index], f"{share} % of pixels", colour)
        left += slots[index] + gap
    axes = panel(left, (height, width))
    _show_image(axes, image, INK)
    _caption(axes, titles[-1], "all frequencies", INK)
    axes = panel(left + slots[-1] + axis_left, (height, width))
    _show_spectrum(axes, image, sizes)
    _caption(axes, "spectrum of the image", "outlined: what each crop keeps", INK)
    return figure


def _show_image(axes: Axes, image: Tensor, colour: str) -> None:
    """Pixels as they are, one square each; (C, h, w)."""
    shown = image.permute(1, 2, 0) if image.shape[0] == 3 else image.mean(0)
    axes.imshow(
        shown.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
    )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=colour, linewidth=1.5)


def _show_spectrum(axes: Axes, image: Tensor, sizes: list[tuple[int, int]]) -> None:
    """Log magnitude (root mean square over channels), zero frequency in the centre."""
    height, width = image.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(image.double().numpy()), axes=(-2, -1))
    magnitude = np.sqrt((np.abs(spectrum) ** 2).mean(0))
    # A floor for images without some frequencies, whose logarithm would be infinite.
    shown = np.log10(np.maximum(magnitude, max(magnitude.max(), 1e-12) * 1e-7))
    low, high = np.quantile(shown, [0.01, 0.9997])
    # Row 0 is the frequency -(height // 2), and each frequency is one unit wide.
    top, left = -(height // 2) - 0.5, -(width // 2) - 0.5
    axes.imshow(
        shown,
        cmap="gray",
        vmin=low,
        vmax=high,
        extent=(left, left + width, top + height, top),
        interpolation="nearest",
        aspect="auto",
    )
    for index, (rows, columns) in enumerate(sizes):
        corner = (-(columns // 2) - 0.5, -(rows // 2) - 0.5)
        colour = COLOURS[index % len(COLOURS)]
        axes.add_patch(Rectangle(corner, columns, rows, fill=False, edgecolor=colour, linewidth=2))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    dress(axes, FONT_SIZE - 1)
    axes.tick_params(pad=2)
    axes.set_xlabel("cycles per image width", size=FONT_SIZE - 1, color=INK, labelpad=2)
    axes.set_ylabel("cycles per image height", size=FONT_SIZE - 1, color=INK, labelpad=1)


def _caption(axes: Axes, title: str, note: str, colour: str) -> None:
    """Two lines above a panel, flush left."""
    for text, points, weight, ink in ((note, 4, "normal", INK), (title, 17, "bold", colour)):
        axes.annotate(
            text,
            xy=(0, 1),
            xycoords="axes fraction",
            xytext=(0, points),
            textcoords="offset points",
            va="bottom",
            size=FONT_SIZE,
            weight=weight,
            color=ink,
        )
