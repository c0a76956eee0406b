"""Figures of crops and stages, and the tools that draw and time them."""

from __future__ import annotations

import io
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from crop_figure import crop_figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum, StageSpec
from etpp_ssl.curriculum.efficienttrain import Constant, EfficientTrain
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.optim.schedules import Schedule
from etpp_ssl.report.figures import stages_figure

TOOLS = Path(__file__).parents[2] / "tools"
RUN = {"num_images": 5000, "batch_size": 64, "budget_epochs": 10.0}
SCHEDULE = Schedule(peak=1e-3, minimum=0.0, warmup_share=0.1)


pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]


def random_image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def draw(figure: Figure) -> np.ndarray:
    """(height, width, 4), as it would be saved."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def inside_and_apart(figure: Figure) -> None:
    """Every text is wholly on the figure, and no two texts overlap."""
    draw(figure)
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    for axes in figure.axes:
        # Tick labels beyond the ends of an axis exist, but are not drawn.
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                shared = axis is axes.xaxis and not tick.label1.get_visible()
                if shared or not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    texts = [text for text in texts if text is not tick.label1]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert box.y1 <= figure.bbox.height, text
    for index, box in enumerate(boxes):
        for other in range(index):
            assert not box.overlaps(boxes[other]), (texts[index], texts[other])


FIGURES = [
    ((224, 224), [96, 160]),
    ((224, 224), [96, 160, 192]),
    ((224, 160), [(96, 69), (160, 115)]),
    ((160, 224), [(69, 96), (115, 160), (160, 224)]),
    ((33, 47), [1, (2, 5), 33]),
    ((32, 32), []),
    ((1, 1), [1]),
]
"""Sizes of images, and bandwidths."""


@pytest.mark.parametrize(
    ("channels", "size", "bandwidths"),
    [*((3, *figure) for figure in FIGURES), *((n, *FIGURES[i]) for n in (1, 2, 5) for i in (4, 6))],
)
def test_crop_figure_has_one_panel_per_crop_and_one_each_for_image_and_spectrum(
    channels: int, size: tuple[int, int], bandwidths: list[int | tuple[int, int]]
) -> None:
    figure = crop_figure(random_image(channels, *size), bandwidths)
    assert len(figure.axes) == len(bandwidths) + 2
    *panels, spectrum = figure.axes
    assert spectrum.get_xlabel() == "cycles per image width"
    assert spectrum.get_ylabel() == "cycles per image height"
    assert all(len(axes.texts) == 2 for axes in figure.axes)
    pixels = draw(figure)
    # White and opaque to the edges, whatever page it stands on.
    assert (pixels[[0, -1]] == 255).all()
    assert (pixels[:, [0, -1]] == 255).all()
    if channels == 3:
        inside_and_apart(figure)
    bottoms = {round(axes.get_position().y0, 6) for axes in panels}
    assert len(bottoms) == 1


def test_crops_are_shown_at_their_true_relative_size() -> None:
    image = random_image(3, 96, 120)
    figure = crop_figure(image, [(40, 50), 64])
    shapes = [(40, 50), (64, 64), (96, 120)]
    boxes = [axes.get_window_extent() for axes in figure.axes[:3]]
    for (rows, columns), box in zip(shapes, boxes, strict=True):
        assert box.height / boxes[2].height == pytest.approx(rows / 96)
        assert box.width / boxes[2].width == pytest.approx(columns / 120)
        assert box.height / box.width == pytest.approx(rows / columns)
    shown = figure.axes[0].images[0].get_array()
    expected = low_frequency_crop(image, (40, 50)).clamp(0, 1).permute(1, 2, 0)
    np.testing.assert_allclose(shown, expected.numpy())
    assert [axes.texts[0].get_text() for axes in figure.axes[:2]] == ["17 % of pixels", "36 % of pixels"]


@pytest.mark.parametrize("size", [(224, 224), (33, 47), (48, 31)])
@pytest.mark.parametrize("bandwidth", [(8, 8), (9, 12), (31, 31)])
def test_an_outline_encloses_exactly_the_frequencies_that_a_crop_keeps(
    size: tuple[int, int], bandwidth: tuple[int, int]
) -> None:
    spectrum = crop_figure(random_image(1, *size), [bandwidth]).axes[-1]
    (outline,) = [patch for patch in spectrum.patches if isinstance(patch, Rectangle)]
    left, right, bottom, top = spectrum.images[0].get_extent()
    for kept, low, length, full, start, end in (
        (bandwidth[0], outline.get_y(), outline.get_height(), size[0], top, bottom),
        (bandwidth[1], outline.get_x(), outline.get_width(), size[1], left, right),
    ):
        centres = np.fft.fftshift(np.fft.fftfreq(full)) * full
        assert (centres[0] - 0.5, centres[-1] + 0.5) == pytest.approx((start, end))
        enclosed = [k for k in centres.round() if low < k < low + length]
        assert enclosed == list(range(-(kept // 2), -(kept // 2) + kept))


def test_the_spectrum_has_its_peaks_where_the_waves_are() -> None:
    position = torch.arange(64) / 64
    wave = torch.cos(2 * torch.pi * (5 * position[:, None] + 12 * position[None]))
    spectrum = crop_figure(0.5 + 0.3 * wave[None], [32]).axes[-1].images[0].get_array()
    strongest = {tuple(place) for place in np.argwhere(spectrum > np.sort(spectrum.ravel())[-4])}
    assert strongest == {(32, 32), (32 + 5, 32 + 12), (32 - 5, 32 - 12)}


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_flat_image_has_a_figure(value: float) -> None:
    draw(crop_figure(torch.full((3, 20, 30), value), [(7, 8)]))


def test_images_of_half_and_double_precision_are_taken() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        draw(crop_figure(random_image(3, 32, 32).to(dtype), [16]))


def test_crop_figure_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"\(C, H, W\), not torch\.float32 \(2, 3, 8, 8\)"):
        crop_figure(random_image(2, 3, 8, 8), [4])
    with pytest.raises(UserError, match=r"torch\.uint8"):
        crop_figure(torch.zeros(3, 8, 8, dtype=torch.uint8), [4])
    with pytest.raises(UserError, match="bandwidth 9x9 does not fit"):
        crop_figure(random_image(3, 8, 8), [9])


def published() -> dict[str, Curriculum]:
    return {
        "constant": Constant(image_size=(224, 224), **RUN),
        "general": EfficientTrain("general", **RUN),
        "deit": EfficientTrain("deit", **RUN),
        "convnext": EfficientTrain("convnext", **RUN),
    }


def free_form() -> dict[str, Curriculum]:
    stages = [
        StageSpec(bandwidth=(16, 48), share=0.05),
        StageSpec(bandwidth=(32, 48), share=0.05),
        StageSpec(bandwidth=(32, 56), share=0.3),
        StageSpec(bandwidth=(48, 64), share=0.35),
        StageSpec(bandwidth=(64, 96), share=0.25),
    ]
    return {"five stages": EfficientTrain(stages=stages, image_size=(64, 96), multiple=8, **RUN)}


def single() -> dict[str, Curriculum]:
    return {"constant": Constant(image_size=(32, 32), num_images=10, batch_size=4, budget_epochs=1.0)}


@pytest.mark.parametrize("curricula", [published(), free_form(), single(), {**published(), **free_form()}])
def test_stages_figure_has_three_labelled_panels_over_one_axis(curricula: dict[str, Curriculum]) -> None:
    figure = stages_figure(curricula, SCHEDULE)
    assert len(figure.axes) == 3
    bandwidth, images, rate = figure.axes
    assert "(px)" in bandwidth.get_ylabel()
    assert "images seen" in images.get_ylabel()
    assert rate.get_ylabel() == "learning rate"
    assert rate.get_xlabel() == "share of the run's compute (%)"
    assert {axes.get_xlim() for axes in figure.axes} == {(0.0, 100.0)}
    (legend,) = figure.legends
    entries = [text.get_text() for text in legend.get_texts()]
    assert [entry.rpartition(" (")[0] for entry in entries] == list(curricula)
    inside_and_apart(figure)


def test_stages_figure_shows_the_curricula_as_they_are() -> None:
    curricula = published()
    figure = stages_figure(curricula, SCHEDULE)
    steps, images, rate = figure.axes
    tracks = dict(zip(curricula, steps.lines, strict=False))
    assert tracks["deit"].get_ydata().tolist() == [96, 160, 192, 224, 224]
    assert tracks["deit"].get_drawstyle() == "steps-post"
    assert tracks["deit"].get_xdata()[1:-1] == pytest.approx([20, 60, 80], abs=1)
    totals = {line.get_ydata()[-1] for line in images.lines if line.get_xdata()[-1] == 100}
    assert totals == {curriculum.num_samples for curriculum in curricula.values()}
    share, height = rate.lines[0].get_data()
    assert height[np.searchsorted(share, 10)] == pytest.approx(1e-3, rel=1e-3)
    assert height[-1] == pytest.approx(0, abs=1e-9)
    # METHOD: 2.27, 2.35 and 1.58 times the images of full resolution.
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    gained = [float(re.search(r"\(([\d.]+)×", entry)[1]) for entry in entries]
    assert gained == pytest.approx([1, 2.27, 2.35, 1.58], abs=0.02)


def test_tracks_that_coincide_are_drawn_apart() -> None:
    curricula = {"one": EfficientTrain(**RUN), "other": EfficientTrain(**RUN)}
    steps = stages_figure(curricula, SCHEDULE).axes[0]
    one, other = (line.get_transform().transform((50, 160)) for line in steps.lines[:2])
    assert one[1] - other[1] >= steps.lines[0].get_linewidth()


def test_stages_figure_can_have_a_rate_and_a_colour_for_each_run_and_no_legend() -> None:
    curricula = {"one": EfficientTrain(**RUN), "other": Constant(image_size=(224, 224), **RUN)}
    rates = {"one": SCHEDULE, "other": Schedule(peak=3e-3, minimum=0.0, warmup_share=0.1)}
    figure = stages_figure(curricula, rates, colours=("#112233", "#445566"), legend=False)
    assert figure.legends == []
    steps, _, rate = figure.axes
    assert [line.get_color() for line in rate.lines[:2]] == ["#112233", "#445566"]
    assert [line.get_color() for line in steps.lines[:2]] == ["#112233", "#445566"]
    assert [max(line.get_ydata()) for line in rate.lines[:2]] == pytest.approx([1e-3, 3e-3])


def test_stages_figure_needs_a_curriculum() -> None:
    with pytest.raises(UserError, match="at least one curriculum"):
        stages_figure({}, SCHEDULE)


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script of tools/ with arguments, in this process, and returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_path(str(TOOLS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_bench_crop_prints_ratios_and_agreement(run_tool: Callable[..., str]) -> None:
    printed = run_tool("bench_crop.py", "--batch", "2", "--repeats", "2")
    for bandwidth in (96, 160, 192):
        assert f"224 -> {bandwidth}\n" in printed
    ratios = re.findall(r"ratio, pairwise +([\d.]+) \(([\d.]+) to ([\d.]+)\)", printed)
    assert len(ratios) == 3
    assert all(0 < float(low) <= float(middle) <= float(high) for middle, low, high in ratios)
    differences = re.findall(r"max abs difference +(\S+),", printed)
    assert len(differences) == 3
    assert all(float(difference) < 1e-5 for difference in differences)
    assert torch.__version__ in printed
    assert "threads" in printed
    assert re.findall(r"goal ([\d.]+)", printed) == ["4", "3.5"]


def test_make_figures_writes_two_small_pictures(tmp_path: Path, run_tool: Callable[..., str]) -> None:
    run_tool("make_figures.py", "--out", str(tmp_path / "new" / "folder"))
    for name in ("crop.png", "stages.png"):
        data = (tmp_path / "new" / "folder" / name).read_bytes()
        assert len(data) < 150_000
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        # Fine enough for a page that is 830 pixels wide.
        assert 1600 <= picture.width <= 1720
        assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_make_figures_takes_a_picture_of_ones_own(tmp_path: Path, run_tool: Callable[..., str]) -> None:
    Image.new("L", (300, 140), 90).save(tmp_path / "own.png")
    printed = run_tool(
        "make_figures.py", "--image", str(tmp_path / "own.png"), "--out", str(tmp_path / "out")
    )
    assert "crop.png" in printed
    assert (tmp_path / "out" / "crop.png").is_file()
