"""Resizes a box that may lie between pixels, by torch's kernel where that can, otherwise by Pillow's.

Values of more than 8 bits are resized in float32, by the same weights, and nothing is rounded or clipped.

torch's uint8 kernels have Pillow's weights. They agree with Pillow's to two levels, mostly to one (more where
an overshoot is clipped between the two passes, which they take in another order), and take a third to a sixth
of the time on a processor with AVX2. They know no box: an axis has to start at the border of a pixel. Where
only its end lies on one, the axis is resized backwards.

Legend: C channels, H, W input and h, w output pixels.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from etpp_ssl.data.formats.base import Interpolation, Region, starts_or_ends_on_pixels

Kernel = Interpolation | Literal["lanczos"]

KERNELS: dict[Kernel, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's."""
MOST_VALID = 0.999
"""Share of a resized pixel that has to come from pixels with data."""


def resize(region: Region, size: tuple[int, int], kernel: Kernel) -> Tensor:
    """The part of the picture that a region stands for, at another size.

    Args:
        region: pixels (H, W, C) and the box in them.
        size: (w, h).
        kernel: torch has no `box`, and `lanczos` in its newer versions only.

    Returns:
        uint8 (C, h, w), or float32 of float32 pixels, NaN where there is no data.
    """
    if region.valid is not None:
        whole = region._replace(valid=None)
        shares = Region(region.valid[:, :, None].astype(np.float32), region.box)
        # A pixel counts if everything that it was made of does, but for the kernel's faint outermost part.
        has_data = resize(shares, size, "bilinear") > MOST_VALID
        return resize(whole, size, kernel).where(has_data, torch.nan)
    # torch 2.14 errs where the width is or becomes 1: of floats, and of more than four channels of 8 bits.
    _, width, channels = region.pixels.shape
    eight_bits = region.pixels.dtype == np.uint8
    right = channels <= 4 if eight_bits else min(width, size[0]) > 1
    if right and starts_or_ends_on_pixels(region.box) and _torch_has(kernel, eight_bits):
        factors = _factors(region, size)
        if factors is not None:
            return _by_torch(region, size, kernel, factors)
    return _by_pillow(region, size, kernel)


@cache
def _torch_has(kernel: Kernel, eight_bits: bool) -> bool:
    if kernel in ("bicubic", "bilinear"):
        return True
    try:
        interpolate(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8 if eight_bits else torch.float32),
            size=(2, 2),
            mode=kernel,
            antialias=True,
        )
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def _factors(region: Region, size: tuple[int, int]) -> tuple[float, float] | None:
    """(vertical, horizontal) output pixels per input pixel, or None where torch would ignore them."""
    left, top, right, bottom = region.box
    height, width = region.pixels.shape[:2]
    factors = []
    for out, part, whole in ((size[1], bottom - top, height), (size[0], right - left, width)):
        factor = out / part
        if math.floor(whole * factor) < out:
            factor = math.nextafter(factor, math.inf)
        # It skips an axis whose size does not change, even if the box is smaller than the pixels.
        if part < whole and math.floor(whole * factor) == whole:
            return None
        factors.append(factor)
    return factors[0], factors[1]


def _by_torch(region: Region, size: tuple[int, int], kernel: Kernel, factors: tuple[float, float]) -> Tensor:
    images = torch.from_numpy(region.pixels).permute(2, 0, 1)[None]
    backwards = [axis for axis, start in ((2, region.box[1]), (3, region.box[0])) if start % 1]
    if backwards:
        images = images.flip(backwards)
    # The output reaches beyond the box where the pixels do.
    found = interpolate(images, scale_factor=factors, mode=kernel, antialias=True)
    found = found[:, :, : size[1], : size[0]]
    return (found.flip(backwards) if backwards else found)[0]


def _by_pillow(region: Region, size: tuple[int, int], kernel: Kernel) -> Tensor:
    pixels = region.pixels
    # Pillow has no mode for several channels of floats.
    planes = (
        [pixels]
        if pixels.shape[2] == 3 and pixels.dtype == np.uint8
        else [pixels[:, :, c] for c in range(pixels.shape[2])]
    )
    resized = [
        np.atleast_3d(np.array(Image.fromarray(plane).resize(size, KERNELS[kernel], box=region.box)))
        for plane in planes
    ]
    return torch.from_numpy(np.concatenate(resized, axis=2)).permute(2, 0, 1)
