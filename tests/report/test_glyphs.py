"""Histograms of oriented gradients as strokes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from etpp_ssl.report.panels import orientation_glyphs


def lit_angle(picture: np.ndarray) -> float:
    """Direction, modulo pi, of what is lit: radians from the x axis towards y, downwards."""
    rows, columns = np.indices(picture.shape) + 0.5 - np.array(picture.shape)[:, None, None] / 2
    xx, yy, xy = (float((picture * part).sum()) for part in (columns**2, rows**2, rows * columns))
    return 0.5 * math.atan2(2 * xy, xx - yy) % math.pi


@pytest.mark.parametrize("index", range(9))
def test_a_stroke_runs_across_the_gradients_of_its_bin(index: int) -> None:
    histograms = np.zeros((9, 1, 1))
    histograms[index] = 1
    picture = orientation_glyphs(histograms, cell_pixels=33)
    assert picture.max() == pytest.approx(1)
    # A gradient (gx, gy) in the middle of the bin: atan2(gx, gy) is its angle.
    angle = (index + 0.5) * math.pi / 9
    gradient = np.array([math.sin(angle), math.cos(angle)])
    stroke = lit_angle(picture)
    assert gradient @ [math.cos(stroke), math.sin(stroke)] == pytest.approx(0, abs=0.03)


def test_the_edge_of_an_image_is_drawn_along_the_edge() -> None:
    # A bright right half: gx > 0 and gy = 0, the angle is pi / 2, in bin 4 of 9; the edge is upright.
    assert math.floor(math.atan2(1.0, 0.0) / math.pi * 9) == 4
    histograms = np.zeros((9, 1, 1))
    histograms[4] = 1
    assert lit_angle(orientation_glyphs(histograms, 17)) == pytest.approx(math.pi / 2, abs=0.03)


def test_every_cell_has_its_own_square_and_heavier_bins_are_brighter() -> None:
    histograms = np.zeros((4, 2, 3))
    histograms[1, 0, 2], histograms[2, 1, 0], histograms[3, 1, 0] = 1.0, 0.5, -2.0
    picture = orientation_glyphs(histograms, cell_pixels=8)
    assert picture.shape == (16, 24)
    cells = picture.reshape(2, 8, 3, 8).transpose(0, 2, 1, 3).reshape(2, 3, 64).max(-1)
    np.testing.assert_allclose(cells, [[0, 0, 1], [0.5, 0, 0]], atol=0.1)
    assert cells[1, 0] < cells[0, 2]


def test_values_beyond_the_full_one_are_as_bright_and_missing_cells_stay_missing() -> None:
    histograms = np.full((9, 1, 2), 3.0)
    histograms[:, 0, 1] = np.nan
    picture = orientation_glyphs(histograms, cell_pixels=6)
    assert np.nanmax(picture) <= 1
    assert np.isnan(picture[:, 6:]).all()
    assert not np.isnan(picture[:, :6]).any()
