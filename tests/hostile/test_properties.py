"""What holds at any size, patch, ratio and bandwidth, odd and rectangular ones among them.

The crop, the curricula, uniform masks, samplers, budgets in hours and resizes have such tests beside their
own; here is what had fixed examples only.
"""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.efficienttrain import EfficientTrain
from etpp_ssl.data.formats import open_picture
from etpp_ssl.data.formats.base import Reading
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.views import EvalView, covering_size, random_crop_box
from etpp_ssl.model.mask_patterns import (
    AlignedMaskingConfig,
    BlockMaskingConfig,
    GridMaskingConfig,
    UniformMaskingConfig,
)
from etpp_ssl.model.masking import Masker, num_visible
from etpp_ssl.model.patches import gather_patches, patchify, unpatchify
from etpp_ssl.model.pos_embed import resampled_pos_embed, sincos_pos_embed, sincos_table
from etpp_ssl.targets.hog import hog_features

bounded = settings(deadline=None, max_examples=40, derandomize=True)
grids = st.tuples(st.integers(1, 13), st.integers(1, 13))
patches = st.tuples(st.integers(1, 6), st.integers(1, 6))


@pytest.mark.parametrize(
    "pattern",
    [
        UniformMaskingConfig(),
        BlockMaskingConfig(),
        AlignedMaskingConfig(block=3),
        AlignedMaskingConfig(block=2, unit="scene"),
        GridMaskingConfig(),
    ],
)
@given(grids, patches, st.floats(0.02, 0.98), st.floats(0.02, 0.98), st.integers(0, 2**62))
@bounded
def test_every_pattern_splits_any_grid_exactly(
    pattern: object, grid: tuple[int, int], patch: tuple[int, int], ratio: float, predict: float, first: int
) -> None:
    masker = Masker(pattern, ratio, predict, patch, seed=3, base_grid=(8, 12))  # type: ignore[arg-type]
    bandwidth, num_patches = (grid[0] * patch[0], grid[1] * patch[1]), grid[0] * grid[1]
    positions = torch.arange(first, first + 3)
    try:
        counts = masker.counts(bandwidth, 0.5)
        mask = masker(positions, bandwidth, 0.5)
    except UserError:
        # Nothing would be visible, or nothing masked or predicted, or a pattern cannot hold so many.
        return
    assert counts.num_keep == num_visible(num_patches, ratio)
    assert mask.ids_keep.shape == (3, counts.num_keep)
    assert mask.ids_predict.shape == (3, counts.num_predict)
    for keep, removed in zip(mask.ids_keep.tolist(), mask.ids_predict.tolist(), strict=True):
        assert keep == sorted(set(keep))
        assert removed == sorted(set(removed))
        assert not set(keep) & set(removed)
        assert set(keep) | set(removed) <= set(range(num_patches))
    alone = masker(positions[1:2], bandwidth, 0.5)
    assert torch.equal(alone.ids_keep[0], mask.ids_keep[1])
    assert torch.equal(alone.ids_predict[0], mask.ids_predict[1])


@given(grids, patches, st.integers(1, 5), st.integers(1, 3))
@bounded
def test_patches_go_back_to_where_they_were(
    grid: tuple[int, int], patch: tuple[int, int], channels: int, batch: int
) -> None:
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    images = torch.arange(float(batch * channels * height * width)).reshape(batch, channels, height, width)
    cut = patchify(images, patch)
    assert cut.shape == (batch, grid[0] * grid[1], patch[0] * patch[1] * channels)
    assert torch.equal(unpatchify(cut, grid, patch), images)
    # The patch of a row and a column is that part of the picture.
    row, column = grid[0] - 1, grid[1] // 2
    part = images[:, :, row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]]
    one = gather_patches(cut, torch.full((batch, 1), row * grid[1] + column))
    assert torch.equal(unpatchify(one, (1, 1), patch), part)


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.integers(2, 12),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
@bounded
def test_histograms_have_norm_one_whatever_the_cell(
    grid: tuple[int, int], cell: tuple[int, int], bins: int, channels: int, seed: int
) -> None:
    height, width = grid[0] * cell[0], grid[1] * cell[1]
    # Reflected, an axis of two pixels has no gradient.
    assume(min(height, width) > 2)
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))
    found = hog_features(images, cell, bins)
    assert found.shape == (2, channels, bins, *grid)
    assert (found >= 0).all()
    torch.testing.assert_close(found.square().sum(dim=2), torch.ones(2, channels, *grid))
    # Orientations are unsigned, and brightness and contrast drop out.
    torch.testing.assert_close(hog_features(3 - 2 * images, cell, bins), found, rtol=0, atol=2e-3)
    assert torch.equal(hog_features(images[1:, -1:], cell, bins), found[1:, -1:])


@given(grids, grids, st.integers(0, 3), st.integers(1, 6), st.integers(0, 2**31))
@bounded
def test_learned_positions_keep_prefixes_constants_and_mirror_images(
    base: tuple[int, int], grid: tuple[int, int], prefix: int, width: int, seed: int
) -> None:
    table = torch.randn(1, prefix + base[0] * base[1], width, generator=torch.Generator().manual_seed(seed))
    found = resampled_pos_embed(table, grid, base, prefix)
    assert found.shape == (1, prefix + grid[0] * grid[1], width)
    assert torch.equal(found[:, :prefix], table[:, :prefix])
    flat = resampled_pos_embed(torch.full_like(table, 0.7), grid, base, prefix)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.7))

    def mirrored(rows: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        places = rows[:, prefix:].reshape(1, *size, width).flip(2).reshape(1, -1, width)
        return torch.cat([rows[:, :prefix], places], dim=1)

    other = resampled_pos_embed(mirrored(table, base), grid, base, prefix)
    torch.testing.assert_close(other, mirrored(found, grid), rtol=1e-4, atol=1e-5)


@given(
    st.tuples(st.integers(2, 9), st.integers(2, 9)),
    st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 2),
    st.sampled_from([8, 12, 24, 768]),
    st.sampled_from([torch.float32, torch.float16]),
)
@bounded
def test_a_table_tells_its_grid_and_its_units(
    grid: tuple[int, int],
    other: tuple[int, int] | None,
    prefix: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    units = other or grid
    table = torch.cat([torch.zeros(prefix, width), sincos_pos_embed(grid, units, width)])[None].to(dtype)
    assert sincos_table(table, prefix) == (grid, units)
    table[0, -1, 0] += 0.5
    assert sincos_table(table, prefix) is None


@given(
    st.tuples(st.integers(2, 20), st.integers(2, 20)),
    patches,
    st.sampled_from(["general", "deit", "convnext"]),
    st.integers(1, 10**6),
    st.integers(1, 5000),
    st.floats(1e-6, 1e6),
)
@bounded
def test_a_published_table_fits_any_image_or_says_why_not(
    grid: tuple[int, int], patch: tuple[int, int], table: str, num_images: int, batch_size: int, budget: float
) -> None:
    size = grid[0] * patch[0], grid[1] * patch[1]
    try:
        curriculum = EfficientTrain(
            table,  # type: ignore[arg-type]
            image_size=size,
            multiple=patch,
            num_images=num_images,
            batch_size=batch_size,
            budget_epochs=budget,
        )
    except UserError as error:
        assert "fewer than two patches" in str(error)  # noqa: PT017
        return
    assert curriculum.stage_at(0).progress == 0
    last = curriculum.stage_at(curriculum.num_steps - 1)
    assert last.bandwidth == size
    assert last.slots.stop == curriculum.num_slots
    for stage in curriculum.stages:
        assert stage.bandwidth[0] % patch[0] == stage.bandwidth[1] % patch[1] == 0
    step_cost = max(curriculum.step_costs) / num_images
    assert abs(curriculum.equivalent_epochs - budget) <= step_cost * len(curriculum.stages) + 1e-9 * budget


sides = st.integers(1, 3000)


@given(st.tuples(sides, sides), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.integers(0, 2**31))
@bounded
def test_a_crop_lies_inside_and_a_covering_size_covers(
    size: tuple[int, int], low: float, more: float, seed: int
) -> None:
    left, top, right, bottom = random_crop_box(size, (low, low + (1 - low) * more), random.Random(seed))
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    target = 1 + seed % 97, 1 + seed % 89
    width, height = covering_size(size, target)
    assert width >= target[0] - 1
    assert height >= target[1] - 1


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.sampled_from(["PNG", "JPEG"]))
@bounded
def test_an_evaluation_view_has_its_size_for_any_picture(size: tuple[int, int], form: str) -> None:
    file = io.BytesIO()
    picture = Image.fromarray(np.full((size[1], size[0], 3), 77, np.uint8))
    picture.save(file, form, quality=95)
    for opened in (open_picture(file.getvalue(), Reading(3)), DecodedPicture((picture,))):
        shown = EvalView((19, 33), 0.9)(opened, 0, (19, 33))
        assert shown.shape == (3, 19, 33)
        assert (shown.int() - 77).abs().max() <= 3
