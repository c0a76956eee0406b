"""Figures that explain the curriculum: what a crop leaves of an image, and how a run spends its compute.

Sizes on paper are in inches; the fonts are chosen for a page that shows one inch as 100 pixels.

Legend: C channels, H, W image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation
from torch import Tensor

from etpp_ssl.config import UserError, as_pair, show_size
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.cost import area_share
from etpp_ssl.curriculum.frequency import low_frequency_crop

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""The palette of Okabe and Ito, which colour-blind readers can distinguish, on white and on grey."""

INK = "#222222"
FAINT = "#b0b0b0"
FONT_SIZE = 9


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


def stages_figure(
    curricula: Mapping[str, Curriculum],
    learning_rate: Callable[[float], float] | Mapping[str, Callable[[float], float]],
    *,
    figsize: tuple[float, float] = (8.3, 5.2),
    colours: Sequence[str] = (INK, *COLOURS),
    legend: bool = True,
) -> Figure:
    """How runs spend their compute: bandwidth, images seen and learning rate over the share of compute.

    Args:
        curricula: by the name in the legend. The legend also says how many times the images each run
            sees that its compute would buy at full resolution.
        learning_rate: from the share of compute spent, in [0, 1], as an optimizer `Schedule`; one for
            all, as it does not depend on the stages, or one for each name.
        figsize: (width, height) in inches.
        colours: of the curricula, in turn.
        legend: whether the figure names the curricula; without it, the page around has to.

    Returns:
        A figure on white with three axes in this order; bandwidths in pixels (of the shorter side where
        images are not square), images counted with repeats. Bandwidths that coincide are drawn side by
        side.

    Raises:
        UserError: if there are no curricula.
    """
    if not curricula:
        raise UserError("stages_figure needs at least one curriculum")
    figure = Figure(figsize=figsize, facecolor="white", layout="constrained")
    bandwidth_axes, images_axes, rate_axes = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [1.7, 1.3, 1]}
    )
    shares = np.linspace(0, 1, 1001)
    rates = learning_rate if isinstance(learning_rate, Mapping) else {"": learning_rate}
    for index, rate in enumerate(rates.values()):
        colour = colours[index % len(colours)] if rates is learning_rate else INK
        # The first is wider, so that it shows on both sides of one that coincides.
        width = 1.8 if index or len(rates) == 1 else 2.6
        rate_axes.plot(100 * shares, [rate(share) for share in shares.tolist()], color=colour, lw=width)
    for index, (name, curriculum) in enumerate(curricula.items()):
        colour = colours[index % len(colours)]
        label = f"{name} ({images_gained(curriculum):.3g}× the images)"
        # Neighbouring tracks that step up together stay apart if what is drawn higher steps earlier.
        aside = 2.6 * ((len(curricula) - 1) / 2 - index) / 72
        apart = bandwidth_axes.transData + ScaledTranslation(-aside, aside, figure.dpi_scale_trans)
        starts = [100 * stage.progress for stage in curriculum.stages] + [100.0]
        shown = [min(stage.bandwidth) for stage in curriculum.stages]
        bandwidth_axes.step(
            # Moved aside, tracks must still reach both ends of the axis, which cuts what is beyond.
            [-5, *starts[1:-1], 105],
            [*shown, shown[-1]],
            where="post",
            color=colour,
            lw=2,
            label=label,
            transform=apart,
        )
        seen = [stage.first_slot for stage in curriculum.stages] + [curriculum.num_slots]
        images_axes.plot(starts, seen, color=colour, lw=1.8)
        if len(curricula) > 1:
            # Dashes that take turns, above all solid lines: runs that coincide all stay visible.
            turns = (4 * index, (4, 4 * (len(curricula) - 1)))
            images_axes.plot(starts, seen, color=colour, lw=1.8, linestyle=turns, zorder=3)
    _dress_stages(figure, list(curricula.values()))
    if legend:
        figure.legend(
            loc="outside upper center",
            ncols=min(2, len(curricula)),
            fontsize=FONT_SIZE,
            frameon=False,
            labelcolor=INK,
            handlelength=1.8,
        )
    return figure


def _dress_stages(figure: Figure, curricula: list[Curriculum]) -> None:
    bandwidth_axes, images_axes, rate_axes = figure.axes
    shown = sorted({min(stage.bandwidth) for curriculum in curricula for stage in curriculum.stages})
    square = all(curriculum.image_size[0] == curriculum.image_size[1] for curriculum in curricula)
    bandwidth_axes.set_ylabel("bandwidth (px)" if square else "bandwidth of the\nshorter side (px)")
    spread = max(shown[-1] - shown[0], 0.2 * shown[-1], 1)
    bandwidth_axes.set_ylim(shown[0] - 0.15 * spread, shown[-1] + 0.15 * spread)
    if _far_enough(shown, 0.09 * spread):
        bandwidth_axes.set_yticks(shown)
    unit, name = _unit(max(curriculum.num_slots for curriculum in curricula))
    images_axes.set_ylabel(f"images seen\n({name})" if name else "images seen")
    images_axes.set_ylim(bottom=0)
    images_axes.yaxis.set_major_locator(MaxNLocator(4))
    images_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_locator(MaxNLocator(3))
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    rate_axes.set_xlabel("share of the run's compute (%)")
    rate_axes.set_xlim(0, 100)
    changes = {100 * stage.progress for curriculum in curricula for stage in curriculum.stages[1:]}
    for axes in figure.axes:
        dress(axes)
        axes.yaxis.label.set(size=FONT_SIZE, color=INK)
        axes.xaxis.label.set(size=FONT_SIZE, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        for change in changes:
            axes.axvline(change, color=FAINT, lw=0.8, ls=":", zorder=0)
    figure.align_ylabels()


def dress(axes: Axes, font_size: float = FONT_SIZE) -> None:
    """Draw the frame faintly, and the numbers along it in ink."""
    axes.tick_params(labelsize=font_size, color=FAINT, labelcolor=INK)
    axes.spines[:].set_color(FAINT)


def _far_enough(values: list[int], distance: float) -> bool:
    return all(after - before >= distance for before, after in pairwise(values))


def _unit(largest: int) -> tuple[int, str]:
    for unit, name in ((1_000_000, "millions"), (1_000, "thousands")):
        if largest >= 2 * unit:
            return unit, name
    return 1, ""


def images_gained(curriculum: Curriculum) -> float:
    """Images seen over images that the same compute buys at full resolution."""
    full = sum(
        stage.num_steps * stage.batch_size * area_share(stage.bandwidth, curriculum.image_size)
        for stage in curriculum.stages
    )
    return curriculum.num_slots / full


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
