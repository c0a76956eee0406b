"""Curves over steps, compute and time, and how they get into a page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.report.figures import (
    INK,
    MOST_POINTS,
    PALETTE,
    QUANTITIES,
    XAxis,
    curve_figure,
    line_of,
    plain,
    points,
    probe_figures,
    quantities,
    x_axes,
)
from etpp_ssl.report.history import read_histories
from etpp_ssl.report.markup import inline_svg
from etpp_ssl.train.launch import finetune

BY_KEY = {quantity.key: quantity for quantity in QUANTITIES}
STEPS = XAxis("step", "steps", "optimizer steps")


def rows(count: int, stages: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": i + 1, "stage": i * stages // count, "loss": float(i % 7), "lr": i / count,
         "bandwidth": [8 * (1 + i * stages // count), 64], "seconds": 2.0 * i, "data_wait_share": 0.5}
        for i in range(count)
    ]  # fmt: skip


def test_a_short_log_is_drawn_point_by_point() -> None:
    x, y = points(rows(9), BY_KEY["loss"], STEPS)
    assert x.tolist() == list(range(1, 10))
    assert y.tolist() == [float(i % 7) for i in range(9)]


@pytest.mark.parametrize("count", [1, 2, MOST_POINTS, MOST_POINTS + 1, 12_345])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_long_log_is_thinned_and_keeps_its_mean(count: int, stages: int) -> None:
    log = rows(count, stages)
    x, y = points(log, BY_KEY["loss"], STEPS)
    kept = np.isfinite(y)
    assert kept.sum() <= MOST_POINTS + stages
    assert np.all(np.diff(x) >= 0)
    assert np.mean(y[kept]) == pytest.approx(np.mean([row["loss"] for row in log]), abs=0.1)
    # A gap for each change of stage: losses of two stages do not compare.
    assert (~kept).sum() == len({row["stage"] for row in log}) - 1


def test_a_bandwidth_is_that_of_the_shorter_side_and_never_between_two_stages() -> None:
    _, y = points(rows(5000, 3), BY_KEY["bandwidth"], STEPS)
    assert set(y) == {8, 16, 24}


def test_rows_without_a_number_are_left_out_and_units_are_applied() -> None:
    log = [*rows(3), {"step": 9}, {"step": 10, "data_wait_share": float("nan")}, {"data_wait_share": 1.0}]
    x, y = points(log, BY_KEY["data_wait_share"], XAxis("seconds", "time", "minutes", 60))
    assert y.tolist() == [50, 50, 50]
    assert x.tolist() == [0, 2 / 60, 4 / 60]
    assert [part.size for part in points([], BY_KEY["loss"], STEPS)] == [0, 0]


def test_runs_have_colours_of_their_own_and_then_dashes() -> None:
    assert len(set(PALETTE)) == len(PALETTE)
    looks = {line_of(index) for index in range(2 * len(PALETTE))}
    assert len(looks) == 2 * len(PALETTE)


@pytest.mark.parametrize("key", ["loss", "bandwidth"])
def test_curves_that_coincide_are_all_seen(key: str, run: Path, tmp_path: Path) -> None:
    for name in ("second", "third"):
        shutil.copytree(run, tmp_path / name)
    histories = read_histories([run, tmp_path / "second", tmp_path / "third"], print)
    figure = curve_figure(histories, BY_KEY[key], STEPS)
    assert figure is not None
    figure.set_dpi(300)
    figure.axes[0].set_axis_off()
    figure.canvas = FigureCanvasAgg(figure)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    for index in range(3):
        colour = np.round(255 * np.array(to_rgb(line_of(index)[0])))
        # A line of its own covers more than a thousand pixels.
        assert (np.abs(pixels - colour).max(axis=1) < 8).sum() > 100, index


def test_losses_of_classifiers_and_of_masked_autoencoders_have_a_figure_each(
    run: Path, tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    classifier = finetune(tiny_classifier(f"output={tmp_path / 'classifier'}", "budget_epochs=0.5"))
    alone = read_histories([run], print)
    both = read_histories([run, classifier.folder.path], print)
    assert [quantity.label for quantity in quantities(alone)][:2] == ["training loss", "learning rate"]
    losses = [quantity for quantity in quantities(both) if quantity.key == "loss"]
    assert [quantity.label for quantity in losses] == ["training loss (pretrain)", "training loss (finetune)"]
    for index, quantity in enumerate(losses):
        figure = curve_figure(both, quantity, STEPS)
        assert figure is not None
        assert {line.get_color() for line in figure.axes[0].lines} == {line_of(index)[0]}


def test_numbers_along_an_axis_are_written_alike() -> None:
    assert [plain(value) for value in (0.0, 0.00008, 0.00016, 0.3, 12.0, 1_200_000.0)] == [
        "0", "0.00008", "0.00016", "0.3", "12", "1,200,000",
    ]  # fmt: skip


def test_figures_overlay_all_runs_on_each_axis(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    histories = read_histories([run, tmp_path / "other"], print)
    axes = x_axes(histories)
    assert [axis.key for axis in axes] == ["step", "equivalent_epochs", "seconds"]
    for axis in axes:
        for quantity in QUANTITIES:
            figure = curve_figure(histories, quantity, axis)
            assert figure is not None
            whole = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
            assert [line.get_color() for line in whole] == [line_of(0)[0], line_of(1)[0]]
        (figure,) = probe_figures(histories, axis).values()
        x = figure.axes[0].lines[0].get_xdata()
        rows_at = {row["step"]: row[axis.key] for row in histories[0].rows}
        expected = [rows_at[row["step"]] / axis.divisor for row in histories[0].probes]
        assert list(x) == pytest.approx(expected)
    histories[0].rows.clear()
    histories[1].rows.clear()
    assert curve_figure(histories, QUANTITIES[0], axes[0]) is None


def test_parts_of_a_loss_have_curves_of_their_own(run: Path) -> None:
    (history,) = read_histories([run], print)
    assert quantities([history]) == list(QUANTITIES)
    history.rows[1]["loss_hog"] = 0.25
    extra = quantities([history])[1]
    assert (extra.key, extra.broken) == ("loss_hog", True)
    assert points(history.rows, extra, STEPS)[1].tolist() == [0.25]


@pytest.mark.parametrize(("seconds", "unit"), [(10, "seconds"), (130, "minutes"), (8000, "hours")])
def test_time_has_the_unit_of_the_longest_run(run: Path, seconds: float, unit: str) -> None:
    (history,) = read_histories([run], print)
    history.rows[-1]["seconds"] = seconds
    assert unit in x_axes([history])[-1].label


def test_an_inline_svg_brings_no_address_no_foreign_id_and_the_pages_ink() -> None:
    texts = []
    for key in ("one", "two"):
        figure = Figure(figsize=(3, 2))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, marker="o")
        axes.set_xlabel('share <of> "it"')
        texts.append(inline_svg(figure, key, 'a "curve" & more'))
        assert "http" not in texts[-1]
        assert "currentColor" in texts[-1]
        assert INK not in texts[-1]
        assert "DejaVu" not in texts[-1]
        assert 'aria-label="a &quot;curve&quot; &amp; more"' in texts[-1]
        assert 'share &lt;of&gt; "it"' in texts[-1]
        ids = re.findall(r'\sid="([^"]*)"', texts[-1])
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', texts[-1])
        assert set(used) == set(ids)
        assert all(name.startswith(f"{key}-") for name in ids)
        assert len(ids) == len(set(ids))
