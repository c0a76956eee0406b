"""A resize out of a box: torch's kernel against Pillow's, for any size, box and channel count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from etpp_ssl.data.formats.base import Region
from etpp_ssl.data.resize import KERNELS, Kernel, resize, starts_or_ends_on_pixels


def noise(height: int, width: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    # Overshoots must not reach 0 or 255: they are clipped between the passes, whose order differs.
    return rng.integers(100, 156, (height, width, channels), dtype=np.uint8)


def by_pillow(region: Region, size: tuple[int, int], interpolation: Kernel) -> Tensor:
    """Plane by plane, with Pillow's own box."""
    planes = [
        Image.fromarray(region.pixels[:, :, c]).resize(size, KERNELS[interpolation], box=region.box)
        for c in range(region.pixels.shape[2])
    ]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))


def gap(left: Tensor, right: Tensor) -> Tensor:
    return (left.int() - right.int()).abs()


sides = st.integers(2, 60)
fractions = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 0.875])


@given(
    shape=st.tuples(sides, sides, st.sampled_from([1, 3, 5])),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    edges=st.tuples(fractions, fractions),
    at_the_start=st.tuples(st.booleans(), st.booleans()),
    interpolation=st.sampled_from(["bicubic", "bilinear", "lanczos"]),
)
@settings(max_examples=150, deadline=None)
def test_torch_agrees_with_pillow_to_two_levels(
    shape: tuple[int, int, int],
    size: tuple[int, int],
    edges: tuple[float, float],
    at_the_start: tuple[bool, bool],
    interpolation: Kernel,
) -> None:
    height, width, _ = shape
    x, y = edges
    left, right = (x, width) if at_the_start[0] else (0, width - x)
    top, bottom = (y, height) if at_the_start[1] else (0, height - y)
    region = Region(noise(*shape), (left, top, right, bottom))
    assert starts_or_ends_on_pixels(region.box)
    found = resize(region, size, interpolation)
    assert found.dtype == torch.uint8
    assert found.shape == (shape[2], size[1], size[0])
    # Two passes, each rounded, in another order than Pillow's.
    assert gap(found, by_pillow(region, size, interpolation)).max() <= 2


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("box", [(0.5, 0, 19.5, 31), (0, 0.25, 20, 30.5), (0.5, 0.5, 19.5, 30.5)])
def test_a_box_between_pixels_is_pillows_to_the_bit(
    box: tuple[float, float, float, float], channels: int
) -> None:
    region = Region(noise(31, 20, channels), box)
    assert not starts_or_ends_on_pixels(box)
    for interpolation in ("bicubic", "bilinear", "lanczos"):
        assert torch.equal(resize(region, (9, 14), interpolation), by_pillow(region, (9, 14), interpolation))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_box_kernel_is_pillows_to_the_bit(channels: int) -> None:
    region = Region(noise(31, 20, channels), (0, 0, 20, 31))
    assert torch.equal(resize(region, (9, 14), "box"), by_pillow(region, (9, 14), "box"))


def test_what_is_not_contiguous_or_has_the_size_already_is_no_exception() -> None:
    pixels = noise(31, 40, 3)[2:, 3:23]
    region = Region(pixels, (0, 0, 20, 29))
    assert not pixels.flags.c_contiguous
    assert torch.equal(resize(region, (20, 29), "bicubic"), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert gap(resize(region, (9, 14), "bicubic"), by_pillow(region, (9, 14), "bicubic")).max() <= 1


def test_many_factors_give_the_size_asked_for() -> None:
    # floor(n * (out / part)) loses a row to rounding for some of these.
    for height in range(2, 60):
        region = Region(noise(height, 9, 3), (0.5, 0, 9, height))
        for out in (49, 31, 60):
            assert resize(region, (5, out), "bilinear").shape == (3, out, 5)
