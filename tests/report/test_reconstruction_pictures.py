"""What a reconstruction shows: visible patches, predicted ones, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange

from etpp_ssl.config import UserError
from etpp_ssl.data.sources.splits import keyed_indices, open_split
from etpp_ssl.data.views import EvalView
from etpp_ssl.model.patches import gather_patches, patchify
from etpp_ssl.report.panels import (
    BLANK,
    GLYPH_PIXELS,
    ChannelView,
    histogram_panels,
    missing_picture,
    orientation_glyphs,
    target_panels,
)
from etpp_ssl.report.reconstruction import (
    Reconstruction,
    check_bandwidth,
    neighbour_statistics,
    parse_bandwidth,
    place,
    predicted_pixels,
    unnormalise,
)
from etpp_ssl.report.viewer import InputImage, Viewer
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.targets.pixels import PixelsConfig, normalise_patches

VIEW = ChannelView((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PATCH = (4, 3)


def example(channels: int = 3, norm_pix: bool = True, predicted: list[int] | None = None) -> Reconstruction:
    """A 3x4 grid with patches 1 and 6 visible, and a prediction that is the target itself."""
    images = torch.rand(1, channels, 12, 12, generator=torch.Generator().manual_seed(0)) - 0.5
    # From left to right brighter, so that neighbours do not know a patch's brightness.
    images += torch.linspace(-1, 1, 12)
    ids_keep = torch.tensor([[1, 6]])
    ids_removed = torch.tensor([predicted or [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]])
    pixels = gather_patches(patchify(images, PATCH), ids_removed)
    target = normalise_patches(pixels) if norm_pix else pixels
    return Reconstruction(images, PATCH, ids_keep, ids_removed, target.clone(), target, 0.0)


def test_place_puts_patches_where_they_belong_and_nothing_elsewhere() -> None:
    shown = example()
    image = place(shown.pixels_at(shown.ids_keep), shown.ids_keep, shown.grid, PATCH)[0]
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[0:4, 3:6] = inside[4:8, 6:9] = True
    assert torch.equal(image[:, inside], shown.images[0][:, inside])
    assert image[:, ~inside].isnan().all()


def test_visible_and_predicted_patches_make_the_whole_image() -> None:
    shown = example(norm_pix=False)
    assert torch.equal(shown.pasted(shown.target_BMV), shown.images[0])
    assert torch.equal(shown.predicted(shown.target_BMV).isnan(), ~shown.visible().isnan())


def test_patches_that_are_neither_visible_nor_predicted_stay_blank() -> None:
    shown = example(predicted=[0, 11])
    assert shown.pasted(shown.pixels_at(shown.ids_removed)).isnan()[0].sum() == 8 * 12


def test_a_perfect_prediction_is_the_image_with_true_statistics_and_not_without() -> None:
    honest, alone, leaking, leaking_alone = target_panels(PixelsConfig(), example(), VIEW)
    image = VIEW(example().images[0])
    np.testing.assert_allclose(leaking.picture.astype(int), image.astype(int), atol=1)
    assert np.abs(honest.picture.astype(int) - image).max() > 10
    assert [panel.leaks for panel in (honest, alone, leaking, leaking_alone)] == [False, False, True, True]
    assert "visible neighbours" in honest.note
    assert "leaks the answer" in leaking.note
    # Alone, the visible patches are blank.
    assert set(np.unique(alone.picture[0:4, 3:6])) == set(BLANK)


def test_the_honest_picture_knows_nothing_of_the_removed_pixels() -> None:
    shown = example()
    other = shown.images.clone()
    removed = shown.visible()[None].isnan()
    other[removed] = 7 * other[removed] + 3
    changed = replace(shown, images=other)
    before, after = (target_panels(PixelsConfig(), x, VIEW) for x in (shown, changed))
    for place_ in (0, 1):
        np.testing.assert_array_equal(before[place_].picture, after[place_].picture)
    assert not np.array_equal(before[2].picture, after[2].picture)
    statistics = neighbour_statistics(
        shown.pixels_at(shown.ids_keep), shown.ids_keep, shown.ids_removed, shown.grid
    )
    expected = VIEW(shown.pasted(unnormalise(shown.values_BMV, statistics)))
    np.testing.assert_array_equal(before[0].picture, expected)


def test_predicted_pixels_are_what_the_honest_panel_shows_and_none_of_other_targets() -> None:
    combined = pytest.importorskip("etpp_ssl.targets.combined").CombinedConfig()
    shown = example()
    pixels = predicted_pixels(PixelsConfig(), shown)
    assert pixels is not None
    panel = target_panels(PixelsConfig(), shown, VIEW)[0].picture
    np.testing.assert_array_equal(VIEW(shown.pasted(pixels)), panel)
    plain = example(norm_pix=False)
    assert predicted_pixels(PixelsConfig(norm_pix=False), plain) is plain.values_BMV
    wanted = combined.build(patch_size=PATCH, in_chans=3).target(shown.images, shown.ids_removed)
    both = replace(shown, values_BMV=wanted, target_BMV=wanted)
    torch.testing.assert_close(predicted_pixels(combined, both), pixels)
    assert predicted_pixels(SimpleNamespace(name="hog"), shown) is None
    assert predicted_pixels(combined.model_copy(update={"parts": combined.parts[1:]}), replace(
        shown, values_BMV=wanted[:, :, 36:], target_BMV=wanted[:, :, 36:])) is None  # fmt: skip


def test_plain_pixels_have_one_way_of_being_shown() -> None:
    panels = target_panels(PixelsConfig(norm_pix=False), example(norm_pix=False), VIEW)
    assert len(panels) == 2
    assert not any(panel.leaks for panel in panels)
    np.testing.assert_array_equal(panels[0].picture, VIEW(example().images[0]))


def test_a_target_that_cannot_be_drawn_has_a_sentence() -> None:
    unknown = SimpleNamespace(name="colour of the frame")
    assert target_panels(unknown, example(), VIEW) == []
    assert "no way to draw target 'colour of the frame'" in str(missing_picture(unknown))
    assert missing_picture(PixelsConfig()) is None


def test_histograms_are_drawn_cell_by_cell_in_the_removed_patches() -> None:
    # 2 x 3 cells and 9 bins per patch, the values in the order (a, b, k).
    shown = example()
    generator = torch.Generator().manual_seed(1)
    target, values = (torch.rand(1, 10, 54, generator=generator) for _ in range(2))
    shown = replace(shown, values_BMV=values, target_BMV=target)
    panels = histogram_panels(shown, lambda v: rearrange(v, "b m (y x k) -> b m k y x", y=2, x=3))
    assert [panel.title for panel in panels] == ["prediction, orientations", "target, orientations"]
    for panel, numbers in zip(panels, (values, target), strict=True):
        assert panel.magnified
        assert panel.picture.shape == (3 * 2 * GLYPH_PIXELS, 4 * 3 * GLYPH_PIXELS, 3)
        # Patch 7, the fifth predicted one after 0, 2, 3, 4, 5: row 1, column 3 of the grid.
        cell = numbers[0, 5].reshape(2, 3, 9)[1, 2].numpy()[:, None, None]
        expected = np.round(255 * orientation_glyphs(cell, GLYPH_PIXELS))
        top, left = (1 * 2 + 1) * GLYPH_PIXELS, (3 * 3 + 2) * GLYPH_PIXELS
        drawn = panel.picture[top : top + GLYPH_PIXELS, left : left + GLYPH_PIXELS, 0]
        np.testing.assert_array_equal(drawn, expected)
        assert set(np.unique(panel.picture[: 2 * GLYPH_PIXELS, 3 * GLYPH_PIXELS : 6 * GLYPH_PIXELS])) == set(
            BLANK
        )


def test_hog_is_drawn_as_the_features_of_the_image() -> None:
    hog = pytest.importorskip("etpp_ssl.targets.hog")
    shown, target = example(), hog.HogConfig(cell=(2, 3))
    objective = target.build(patch_size=PATCH, in_chans=3)
    wanted = objective.target(shown.images, shown.ids_removed)
    shown = replace(shown, values_BMV=torch.zeros_like(wanted), target_BMV=wanted)
    prediction, drawn = target_panels(target, shown, VIEW)
    features = hog.hog_features(shown.images, (2, 3)).mean(1)[0].numpy()
    expected = np.round(255 * orientation_glyphs(features, GLYPH_PIXELS))
    hidden = shown.visible()[0].isnan().numpy()[::2, ::3].repeat(GLYPH_PIXELS, 0).repeat(GLYPH_PIXELS, 1)
    np.testing.assert_allclose(drawn.picture[hidden][:, 0], expected[hidden], atol=1)
    assert not prediction.picture[hidden].any()


def test_a_combined_target_is_drawn_part_by_part() -> None:
    combined = pytest.importorskip("etpp_ssl.targets.combined")
    target, shown = combined.CombinedConfig(), example()
    objective = target.build(patch_size=PATCH, in_chans=3)
    wanted = objective.target(shown.images, shown.ids_removed)
    panels = target_panels(target, replace(shown, values_BMV=wanted, target_BMV=wanted), VIEW)
    alone = target_panels(target.parts[0], example(), VIEW)
    assert [panel.title for panel in panels[:4]] == [panel.title for panel in alone]
    for panel, other in zip(panels[:4], alone, strict=True):
        np.testing.assert_array_equal(panel.picture, other.picture)
    prediction, truth = panels[4:]
    np.testing.assert_array_equal(prediction.picture, truth.picture)


def test_loss_and_masks_are_those_of_the_reconstruction_probe(trained_run: Callable[[str], Path]) -> None:
    folder = RunFolder(trained_run("normalised"))
    recipe = folder.recipe()
    viewer = Viewer.of_run(folder)
    viewer.load(folder.trained(print))
    source = open_split(recipe.data, "eval", in_chans=3, image_size=recipe.size, seed=recipe.seed)
    view = EvalView(recipe.size, recipe.data.crop_pct)
    losses = [
        viewer.look(InputImage("", index, view(source.open(index), index, recipe.size))).reconstruction.loss
        for index in keyed_indices(len(source), 6, recipe.seed, "heldout")
    ]
    probed = [row["heldout_loss"] for row in folder.metrics() if "heldout_loss" in row]
    assert np.mean(losses) == pytest.approx(probed[-1], rel=1e-5)


@pytest.mark.parametrize(("text", "size"), [("96", (96, 96)), ("96x128", (96, 128)), ("8X4", (8, 4))])
def test_bandwidths_are_read(text: str, size: tuple[int, int]) -> None:
    assert parse_bandwidth(text) == size


@pytest.mark.parametrize("text", ["", "x", "8x", "8x8x8", "-8", "8.0", "big", "²"])
def test_a_bandwidth_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="neither a number of pixels nor HEIGHTxWIDTH"):
        parse_bandwidth(text)


@pytest.mark.parametrize("bandwidth", [(0, 12), (8, 10), (20, 12), (8, 28)])
def test_a_bandwidth_that_does_not_serve_is_refused(bandwidth: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"a multiple of the patch \(4\) up to the image \(16x24\)"):
        check_bandwidth(bandwidth, (16, 24), (4, 4))
    check_bandwidth((8, 12), (16, 24), (4, 4))
