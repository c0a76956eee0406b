"""The low-frequency crop: what EfficientTrain++ shows of an image at a given bandwidth.

Definition (EfficientTrain++, TPAMI 2024, section 3; `LeapLabTHU/EfficientTrain`): take the
two-dimensional DFT with the zero frequency in the centre, keep the centre of Bh x Bw frequencies
{-floor(B/2), ..., ceil(B/2)-1}, transform back at that size, take the real part and multiply by
(Bh Bw) / (H W), which preserves the mean.

This is linear and separable into complex matrices A, so y = Re(A_h) x Re(A_w)^T - Im(A_h) x Im(A_w)^T.
Im(A) is zero for odd B and has rank one for even B (the unpaired Nyquist frequency): there
Im(A)[m, n] = (-1)^m sin(pi B n / H) / H. The second product is then one scalar per channel times a
checkerboard, and the crop costs two plain matrix products on any device, with no FFT. The test keeps
the definition beside it.

Legend: C channels, H, W image size; Bh, Bw bandwidth; m, n output and input positions on one axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from etpp_ssl.config import UserError, as_pair

MOST_MISSING = 0.001
"""Share of a crop's pixel that may come from pixels without data, for it to count."""


def low_frequency_crop(images: Tensor, bandwidth: int | tuple[int, int]) -> Tensor:
    """Keep the lowest `bandwidth` frequencies of each axis, as an image of that size.

    Args:
        images: floating point (..., H, W), any units; linear in the values, mean preserved.
        bandwidth: B or (Bh, Bw) in pixels (that is, in frequencies per axis), 1 <= B <= size.

    Returns:
        (..., Bh, Bw), float32 (float64 if `images` are): half precision is computed and returned in
        float32, also inside autocast. At full bandwidth the images are returned as they are.

    Raises:
        UserError: if the bandwidth exceeds the image or is below 1, or the images are integers.
    """
    if not images.is_floating_point():
        raise UserError(f"low_frequency_crop needs floating-point images, not {images.dtype}")
    height, width = images.shape[-2:]
    out_height, out_width = as_pair(bandwidth)
    if not (1 <= out_height <= height and 1 <= out_width <= width):
        raise UserError(
            f"bandwidth {out_height}x{out_width} does not fit an image of {height}x{width}: "
            f"each axis takes 1 to its own size"
        )
    images = images if images.dtype == torch.float64 else images.float()
    if (out_height, out_width) == (height, width):
        return images
    # Reduced-precision products (autocast, TF32) would cost the crop its exactness.
    with torch.autocast(device_type=images.device.type, enabled=False), _exact_products(images.device):
        return _crop(images, out_height, out_width)


def pixels_with_data(images: Tensor, bandwidth: int | tuple[int, int]) -> Tensor:
    """Which pixels of a low-frequency crop count, of images in which NaN stands for missing data.

    On each axis a pixel of the crop is a sum over the whole image, with weights that have one main lobe: it
    lies around n = m H / B and is 2 H / B wide. A pixel counts if everything under its lobe has data. The
    lobe is taken as a triangle, at whose faint ends data may be missing (`MOST_MISSING`). The crop is
    periodic, and so is the lobe: at a border it reaches over to the other side. At full bandwidth it is the
    pixel itself. Outside of the lobe the weights are small and of both signs, and missing pixels, filled
    with the channel's mean before the crop, add nothing to its difference from that mean.

    Args:
        images: floating point (..., C, H, W); a pixel that is NaN in any channel has no data.
        bandwidth: as for `low_frequency_crop`.

    Returns:
        bool (..., 1, Bh, Bw).
    """
    missing = images.isnan().any(dim=-3, keepdim=True)
    (height, width), (out_height, out_width) = images.shape[-2:], as_pair(bandwidth)
    if (out_height, out_width) == (height, width):
        return ~missing
    share = missing.float()
    with torch.autocast(device_type=images.device.type, enabled=False), _exact_products(images.device):
        if out_height < height:
            share = _main_lobe(height, out_height, images.device) @ share
        if out_width < width:
            share = share @ _main_lobe(width, out_width, images.device).mT
    return share < MOST_MISSING


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Plain float32 matrix products inside, whatever TF32 or bf16 setting holds outside."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
    else:  # torch before 2.9 knows one setting for all backends
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _crop(images: Tensor, out_height: int, out_width: int) -> Tensor:
    height, width = images.shape[-2:]
    like = (images.dtype, images.device)
    cropped = images
    if out_height < height:
        cropped = _real_part(height, out_height, *like) @ cropped
    if out_width < width:
        cropped = cropped @ _real_part(width, out_width, *like).mT
    if _has_nyquist(height, out_height) and _has_nyquist(width, out_width):
        sine_h = _nyquist_sine(height, out_height, *like)
        sine_w = _nyquist_sine(width, out_width, *like)
        crossing = (images @ sine_w) @ sine_h
        cropped.addcmul_(crossing[..., None, None], _checkerboard(out_height, out_width, *like), value=-1)
    return cropped


def _has_nyquist(size: int, bandwidth: int) -> bool:
    return bandwidth % 2 == 0 and bandwidth < size


# Made outside inference mode even if the caller is in it: cached tensors must serve training too.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _real_part(size: int, bandwidth: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Re(A), (bandwidth, size)."""
    out = torch.arange(bandwidth, dtype=torch.float64)[:, None, None] / bandwidth
    position = torch.arange(size, dtype=torch.float64)[None, :, None] / size
    frequency = torch.arange(-(bandwidth // 2), math.ceil(bandwidth / 2), dtype=torch.float64)
    matrix = torch.cos(2 * math.pi * frequency * (out - position)).sum(-1) / size
    return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _nyquist_sine(size: int, bandwidth: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """sin(pi B n / size) / size, (size,): a row of Im(A) without its alternating sign."""
    position = torch.arange(size, dtype=torch.float64)
    sine = torch.sin(math.pi * bandwidth * position / size) / size
    return sine.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _checkerboard(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = torch.arange(height)[:, None]
    columns = torch.arange(width)[None, :]
    return (1 - 2 * ((rows + columns) % 2)).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _main_lobe(size: int, bandwidth: int, device: torch.device) -> Tensor:
    """Shares of the input pixels in an output pixel, float32 (bandwidth, size), rows that add up to 1."""
    out = torch.arange(bandwidth, dtype=torch.float64)[:, None] / bandwidth * size
    distance = (torch.arange(size, dtype=torch.float64) - out).abs()
    triangle = (1 - torch.minimum(distance, size - distance) * bandwidth / size).clamp(min=0)
    return (triangle / triangle.sum(dim=1, keepdim=True)).to(device=device, dtype=torch.float32)
