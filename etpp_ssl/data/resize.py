"""Resizes a box that may lie between pixels, by torch's kernel where that can, otherwise by Pillow's.

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


def resize(region: Region, size: tuple[int, int], kernel: Kernel) -> Tensor:
    """The part of the picture that a region stands for, at another size.

    Args:
        region: pixels (H, W, C) and the box in them.
        size: (w, h).
        kernel: torch has no `box`, and `lanczos` in its newer versions only.

    Returns:
        uint8 (C, h, w).
    """
    # For more than four channels torch has another kernel, which is wrong at a width of 1 (seen in 2.14).
    few = region.pixels.shape[2] <= 4
    if few and starts_or_ends_on_pixels(region.box) and _torch_has(kernel):
        factors = _factors(region, size)
        if factors is not None:
            return _by_torch(region, size, kernel, factors)
    return _by_pillow(region, size, kernel)


@cache
def _torch_has(kernel: Kernel) -> bool:
    if kernel in ("bicubic", "bilinear"):
        return True
    try:
        interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), size=(2, 2), mode=kernel, antialias=True)
    except (NotImplementedError, ValueError):
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
    planes = [pixels] if pixels.shape[2] == 3 else [pixels[:, :, c] for c in range(pixels.shape[2])]
    resized = [
        np.atleast_3d(np.array(Image.fromarray(plane).resize(size, KERNELS[kernel], box=region.box)))
        for plane in planes
    ]
    return torch.from_numpy(np.concatenate(resized, axis=2)).permute(2, 0, 1)
