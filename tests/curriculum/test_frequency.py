"""The low-frequency crop against its plain definition by discrete Fourier transforms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fft import fft2, fftshift, ifft2, ifftshift
from torch.overrides import TorchFunctionMode

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.frequency import low_frequency_crop, pixels_with_data

AXES = (-2, -1)
LEADING = [(), (3,), (2, 3), (2, 1, 3)]


def definition(images: Tensor, bandwidth: tuple[int, int]) -> Tensor:
    """EfficientTrain++, section 3, in float64: spectrum, centre crop, back, real part, scale."""
    height, width = images.shape[-2:]
    rows, columns = bandwidth
    spectrum = fftshift(fft2(images.double()), dim=AXES)
    # Zero frequency stands at size // 2 before the crop, and at bandwidth // 2 after it.
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    centre = spectrum[..., top : top + rows, left : left + columns]
    return ifft2(ifftshift(centre, dim=AXES)).real * (rows * columns) / (height * width)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int]]:
    """An image size and a bandwidth, in which an axis is left full now and then."""
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    bandwidth = tuple(draw(st.one_of(st.just(side), st.integers(1, side))) for side in size)
    return size, (bandwidth[0], bandwidth[1])


@given(sizes(), st.sampled_from(LEADING), st.integers(0, 2**31))
@example(((32, 32), (16, 24)), (2, 3), 0)
@example(((31, 24), (16, 24)), (3,), 1)
@example(((24, 31), (9, 16)), (), 2)
@settings(deadline=None, max_examples=80)
def test_equals_the_definition_at_any_size(
    size: tuple[tuple[int, int], tuple[int, int]], leading: tuple[int, ...], seed: int
) -> None:
    (height, width), bandwidth = size
    images = random_images(*leading, height, width, seed=seed)
    expected = definition(images, bandwidth)

    exact = low_frequency_crop(images, bandwidth)
    assert exact.dtype == torch.float64
    assert exact.shape == (*leading, *bandwidth)
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-12)

    single = low_frequency_crop(images.float(), bandwidth)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bandwidth", [96, 160, 192, 98, 154])
def test_equals_the_definition_at_the_published_sizes(bandwidth: int) -> None:
    images = random_images(2, 3, 224, 224)
    expected = definition(images, (bandwidth, bandwidth))
    torch.testing.assert_close(low_frequency_crop(images, bandwidth), expected, rtol=0, atol=1e-12)
    single = low_frequency_crop(images.float(), bandwidth).double()
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-5)


def test_one_number_means_both_axes() -> None:
    images = random_images(2, 11, 14)
    assert torch.equal(low_frequency_crop(images, 6), low_frequency_crop(images, (6, 6)))


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last", "expanded"])
def test_memory_layout_does_not_matter(layout: str) -> None:
    images = {
        "transposed": random_images(2, 3, 12, 18).mT,
        "strided": random_images(2, 3, 36, 24)[..., ::2, ::2],
        "channels_last": random_images(2, 3, 18, 12).contiguous(memory_format=torch.channels_last),
        "expanded": random_images(1, 1, 18, 12).expand(2, 3, -1, -1),
    }[layout]
    assert images.shape == (2, 3, 18, 12)
    assert layout == "expanded" or not images.is_contiguous()
    before = images.clone()
    crop = low_frequency_crop(images, (10, 8))
    torch.testing.assert_close(crop, definition(before, (10, 8)), rtol=0, atol=1e-12)
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_crop(dtype: torch.dtype) -> None:
    images = random_images(2, 3, 32, 27).to(dtype)
    plain = low_frequency_crop(images, (16, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        crop = low_frequency_crop(images, (16, 12))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert crop.dtype == torch.float32
    assert torch.equal(crop, plain)
    torch.testing.assert_close(crop.double(), definition(images, (16, 12)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bandwidth", [(8, 6), (16, 15)])
def test_half_precision_images_come_out_in_float32(dtype: torch.dtype, bandwidth: tuple[int, int]) -> None:
    images = random_images(3, 16, 15).to(dtype)
    crop = low_frequency_crop(images, bandwidth)
    assert crop.dtype == torch.float32
    torch.testing.assert_close(crop.double(), definition(images, bandwidth), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bandwidth", [(1, 1), (2, 2), (7, 10), (12, 15), (6, 17)])
def test_the_mean_is_preserved(bandwidth: tuple[int, int]) -> None:
    images = random_images(2, 3, 13, 17) + 4
    crop = low_frequency_crop(images, bandwidth)
    torch.testing.assert_close(crop.mean(AXES), images.mean(AXES), rtol=0, atol=1e-12)


def test_it_is_linear() -> None:
    a, b = random_images(3, 20, 14, seed=1), random_images(3, 20, 14, seed=2)
    together = low_frequency_crop(2.5 * a - 0.75 * b, (8, 6))
    apart = 2.5 * low_frequency_crop(a, (8, 6)) - 0.75 * low_frequency_crop(b, (8, 6))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def wave(size: tuple[int, int], cycles: tuple[int, int], phase: float) -> Tensor:
    """A plane wave of whole cycles per axis, sampled at `size` points."""
    rows = torch.arange(size[0], dtype=torch.float64)[:, None] / size[0]
    columns = torch.arange(size[1], dtype=torch.float64)[None, :] / size[1]
    return torch.cos(2 * math.pi * (cycles[0] * rows + cycles[1] * columns) + phase)


@pytest.mark.parametrize("cycles", [(0, 0), (1, 0), (0, -2), (3, 1), (-4, 2), (5, -2)])
@pytest.mark.parametrize("bandwidth", [(12, 6), (11, 5), (21, 6)])
def test_a_low_wave_comes_out_as_the_same_wave_on_fewer_points(
    cycles: tuple[int, int], bandwidth: tuple[int, int]
) -> None:
    crop = low_frequency_crop(wave((21, 16), cycles, phase=0.7), bandwidth)
    torch.testing.assert_close(crop, wave(bandwidth, cycles, phase=0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cycles", [(6, 0), (0, 4), (7, 1), (2, 5)])
def test_a_wave_beyond_the_bandwidth_vanishes_without_aliasing(cycles: tuple[int, int]) -> None:
    crop = low_frequency_crop(wave((21, 16), cycles, phase=0.7), (11, 7))
    torch.testing.assert_close(crop, torch.zeros(11, 7, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_bandwidth_returns_the_values_unchanged(dtype: torch.dtype) -> None:
    images = random_images(2, 3, 9, 14).to(dtype)
    assert torch.equal(low_frequency_crop(images, (9, 14)), images)


@pytest.mark.parametrize(
    ("images", "bandwidth", "message"),
    [
        (torch.zeros(3, 9, 7), 8, "bandwidth 8x8 does not fit an image of 9x7"),
        (torch.zeros(3, 9, 7), (10, 7), "bandwidth 10x7 does not fit an image of 9x7"),
        (torch.zeros(3, 9, 7), 0, "bandwidth 0x0 does not fit an image of 9x7"),
        (torch.zeros(3, 9, 7), (4, -1), "bandwidth 4x-1 does not fit"),
        (torch.zeros(3, 9, 7, dtype=torch.uint8), 4, "floating-point images, not torch.uint8"),
    ],
)
def test_a_wrong_argument_gets_a_sentence(images: Tensor, bandwidth: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        low_frequency_crop(images, bandwidth)


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32", "bf16"])
def test_the_product_precision_is_exact_inside_and_restored_after(setting: str) -> None:
    matmul = torch.backends.mkldnn.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has no setting per backend")
    inside: list[str] = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.matmul:
                inside.append(matmul.fp32_precision)
                if args[0].shape[0] == 3:
                    raise RuntimeError("out of memory")
            return func(*args, **(kwargs or {}))

    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        with Watched():
            low_frequency_crop(torch.zeros(8, 9), 4)
        assert matmul.fp32_precision == setting
        with Watched(), pytest.raises(RuntimeError, match="out of memory"):
            low_frequency_crop(torch.zeros(8, 9), 3)
        assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = before
    assert len(inside) > 2
    assert set(inside) == {"ieee"}


@pytest.mark.parametrize("bandwidth", [(4, 2), (3, 4), (6, 4), (4, 5), (6, 5)])
def test_the_gradient_is_that_of_the_linear_map(bandwidth: tuple[int, int]) -> None:
    images = random_images(2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: low_frequency_crop(x, bandwidth), (images,))
    direction = random_images(2, *bandwidth, seed=1)
    (fast,) = torch.autograd.grad((low_frequency_crop(images, bandwidth) * direction).sum(), images)
    (plain,) = torch.autograd.grad((definition(images, bandwidth) * direction).sum(), images)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


def test_a_first_use_in_inference_mode_does_not_spoil_training() -> None:
    # The matrices are cached, and a tensor made in inference mode cannot serve a backward pass.
    images = random_images(38, 34)
    with torch.inference_mode():
        shown = low_frequency_crop(images, (22, 18))
    images.requires_grad_()
    crop = low_frequency_crop(images, (22, 18))
    crop.square().sum().backward()
    assert torch.equal(crop.detach(), shown)
    assert images.grad is not None


@given(sizes(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_a_pixel_counts_where_its_main_lobe_has_data(
    size: tuple[tuple[int, int], tuple[int, int]], seed: int
) -> None:
    (height, width), bandwidth = size
    images = random_images(2, 3, height, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    missing = torch.rand(2, height, width, generator=generator) < 0.02
    images[:, 1][missing] = torch.nan
    expected = torch.ones(2, 1, *bandwidth, dtype=torch.bool)
    for b, n, m in missing.nonzero().tolist():
        for y in range(bandwidth[0]):
            for x in range(bandwidth[1]):
                # Distances from the middle of the lobe, round the image, in pixels of the crop.
                dy, dx = (
                    min((at * to / of - out) % to, (out - at * to / of) % to)
                    for at, out, of, to in ((n, y, height, bandwidth[0]), (m, x, width, bandwidth[1]))
                )
                if dy < 0.9 and dx < 0.9:
                    expected[b, 0, y, x] = False
    found = pixels_with_data(images, bandwidth)
    assert not (found & ~expected).any()
    if bandwidth == (height, width):
        assert torch.equal(found, ~missing[:, None])
    # Beyond the lobe nothing is left out.
    assert found[~missing.flatten(1).any(dim=1)].all()


def test_without_gaps_every_pixel_counts_and_a_gap_reaches_over_the_border() -> None:
    images = torch.zeros(1, 2, 28, 42)
    for bandwidth in [(28, 42), (12, 42), (28, 9), (13, 18), (1, 1)]:
        assert pixels_with_data(images, bandwidth).all()
    images[:, 0, :, 41] = torch.nan
    found = pixels_with_data(images, (28, 18))[0, 0]
    # 42 to 18 pixels: the last column lies 0.43 pixels before the first of the crop and 0.57 after the last.
    assert found.all(dim=0).tolist() == [False, *[True] * 16, False]


@pytest.mark.parametrize("bandwidth", [(24, 40), (33, 96), (64, 51)])
def test_filled_with_the_mean_a_gap_hardly_moves_the_pixels_that_count(bandwidth: tuple[int, int]) -> None:
    image = random_images(1, 64, 96)
    gap = image.clone()
    gap[:, :40, :30] = torch.nan
    counts = pixels_with_data(gap, bandwidth)
    whole = low_frequency_crop(image, bandwidth)
    moved = low_frequency_crop(gap.nan_to_num(0.0), bandwidth) - whole
    # Of noise of deviation 1, in which nothing tells of what is missing.
    error, missed = (moved[at].square().mean().sqrt() for at in (counts, ~counts))
    assert error < 0.07
    assert missed > 8 * error
