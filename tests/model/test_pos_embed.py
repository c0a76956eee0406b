"""Positions: MAE's table at the base grid, the same scene at every other grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional

from etpp_ssl.config import UserError
from etpp_ssl.model.pos_embed import (
    patch_centres,
    resampled_by_products,
    resampled_pos_embed,
    sincos_pos_embed,
)


def sincos_by_meshgrid(rows: np.ndarray, columns: np.ndarray, dim: int) -> Tensor:
    """MAE's table at given coordinates: column half before row half, [sin | cos] in each."""
    grid_w, grid_h = np.meshgrid(columns, rows)
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    quarters = []
    for coordinate in (grid_w, grid_h):
        angle = np.outer(coordinate.ravel(), omega)
        quarters += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(quarters, axis=1))


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (16, 9), (1, 7)])
@pytest.mark.parametrize("dim", [4, 64, 100])
def test_at_the_base_grid_it_is_maes_own_table(grid: tuple[int, int], dim: int) -> None:
    table = sincos_pos_embed(grid, grid, dim)
    assert table.dtype == torch.float32
    assert table.shape == (grid[0] * grid[1], dim)
    expected = sincos_by_meshgrid(np.arange(grid[0]), np.arange(grid[1]), dim)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-6)


def test_the_first_numbers_of_the_table_by_hand() -> None:
    # Row 1, column 2 of a 2 x 3 grid at width 8: frequencies 1 and 1/100.
    expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
    expected += [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    torch.testing.assert_close(
        sincos_pos_embed((2, 3), (2, 3), 8)[5].double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_patch_centres_are_where_interpolation_reads(num_patches: int, base: int) -> None:
    ramp = torch.arange(base, dtype=torch.float64)[None, None]
    read = functional.interpolate(ramp, size=num_patches, mode="linear", align_corners=False)[0, 0]
    centres = patch_centres(num_patches, base)
    # Outside the outermost base patches, interpolation repeats the border; positions go on.
    torch.testing.assert_close(centres.clamp(0, base - 1), read, rtol=0, atol=1e-12)
    assert centres.mean() == pytest.approx((base - 1) / 2)
    assert torch.equal(patch_centres(base, base), torch.arange(base, dtype=torch.float64))


@pytest.mark.parametrize(
    ("grid", "base"), [((6, 6), (14, 14)), ((3, 7), (5, 9)), ((8, 4), (4, 7)), ((7, 11), (16, 16))]
)
def test_on_another_grid_it_is_the_table_at_the_patch_centres(
    grid: tuple[int, int], base: tuple[int, int]
) -> None:
    coordinates = [(np.arange(now) + 0.5) * full / now - 0.5 for now, full in zip(grid, base, strict=True)]
    expected = sincos_by_meshgrid(coordinates[0], coordinates[1], 24)
    table = sincos_pos_embed(grid, base, 24)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [6, 10, 15])
def test_a_width_that_four_does_not_divide_gets_a_sentence(dim: int) -> None:
    with pytest.raises(UserError, match=f"multiple of 4, not {dim}"):
        sincos_pos_embed((2, 3), (2, 3), dim)


def learned(base: tuple[int, int], num_prefix: int, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, num_prefix + base[0] * base[1], dim, generator=generator)


RESAMPLINGS = [((14, 14), (6, 6)), ((5, 9), (3, 7)), ((4, 7), (8, 4)), ((4, 9), (6, 6))]


@pytest.mark.parametrize(("base", "grid"), RESAMPLINGS)
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_a_learned_embedding_is_resampled_bicubically_as_timm_does(
    base: tuple[int, int], grid: tuple[int, int], num_prefix: int
) -> None:
    parameter = learned(base, num_prefix)
    resampled = resampled_pos_embed(parameter, grid, base, num_prefix)
    assert resampled.shape == (1, num_prefix + grid[0] * grid[1], 5)

    timms = resample_abs_pos_embed(
        parameter, new_size=list(grid), old_size=list(base), num_prefix_tokens=num_prefix
    )
    assert torch.equal(resampled, timms)

    image = parameter[:, num_prefix:].transpose(1, 2).unflatten(2, base)
    smooth = functional.interpolate(image, size=grid, mode="bicubic", antialias=True)
    torch.testing.assert_close(resampled[:, num_prefix:], smooth.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("base", "grid"), [*RESAMPLINGS, ((6, 1), (3, 1)), ((14, 14), (1, 6))])
@pytest.mark.parametrize("num_prefix", [0, 5])
def test_products_are_torchs_resampling_forward_and_backward(
    base: tuple[int, int], grid: tuple[int, int], num_prefix: int
) -> None:
    results = []
    for resample in (resampled_pos_embed, resampled_by_products):
        parameter = torch.nn.Parameter(learned(base, num_prefix))
        with torch.autocast("cpu", torch.bfloat16):
            resampled = resample(parameter, grid, base, num_prefix)
        weights = torch.arange(resampled.numel()).sin().view(resampled.shape)
        (resampled * weights).sum().backward()
        results.append((resampled, parameter.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("base", "grid"), RESAMPLINGS)
@pytest.mark.parametrize("num_prefix", [1, 5])
def test_prefix_rows_are_never_resampled(
    base: tuple[int, int], grid: tuple[int, int], num_prefix: int
) -> None:
    parameter = learned(base, num_prefix)
    resampled = resampled_pos_embed(parameter, grid, base, num_prefix)
    assert torch.equal(resampled[:, :num_prefix], parameter[:, :num_prefix])


@pytest.mark.parametrize(("base", "grid"), [((4, 9), (6, 6)), ((4, 9), (9, 4)), ((6, 6), (4, 9))])
def test_another_grid_of_the_same_number_of_tokens_is_resampled_too(
    base: tuple[int, int], grid: tuple[int, int]
) -> None:
    columns = torch.arange(base[1], dtype=torch.float32).expand(base).reshape(1, -1, 1)
    resampled = resampled_pos_embed(columns, grid, base, 0).reshape(grid)
    assert not torch.equal(resampled.flatten(), columns.flatten())
    # What depends on the column alone still does, and still grows with it.
    torch.testing.assert_close(resampled, resampled[:1].expand_as(resampled), rtol=0, atol=1e-5)
    assert (resampled.diff(dim=1) > 0).all()


def test_the_base_grid_returns_the_parameter_itself() -> None:
    parameter = learned((4, 9), 1)
    assert resampled_pos_embed(parameter, (4, 9), (4, 9), 1) is parameter


@pytest.mark.parametrize(("base", "grid"), RESAMPLINGS)
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_the_gradient_reaches_every_row_of_the_base_parameter(
    base: tuple[int, int], grid: tuple[int, int], num_prefix: int
) -> None:
    parameter = torch.nn.Parameter(learned(base, num_prefix))
    resampled_pos_embed(parameter, grid, base, num_prefix).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.shape == parameter.shape
    assert (parameter.grad.abs().sum(dim=-1) > 0).all()
    # Weights of a resampling add up to one, so the patches share the gradient of all outputs.
    total = parameter.grad[:, num_prefix:].sum(dim=(0, 1))
    torch.testing.assert_close(total, torch.full((5,), float(grid[0] * grid[1])))
    assert torch.equal(parameter.grad[:, :num_prefix], torch.ones(1, num_prefix, 5))
