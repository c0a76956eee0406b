"""HOG beside scikit-image's, which differs in four ways that are undone here.

1. Gradient: central differences there, Sobel here. On a smooth image they agree up to a factor.
2. Border: zero gradient there, reflection here. Only cells inside are compared.
3. Angle: atan2(gy, gx) there, atan2(gx, gy) here: one is 90 degrees minus the other, so bins run
   backwards. With 9 bins of 20 degrees the two sets of borders lie half a bin apart; with 18 of 10 degrees
   they coincide, and each bin of ours holds two of those.
4. Normalisation: mean over the cell and eps 1e-5 there. A histogram's scale is divided out here.
Neither interpolates between bins or cells.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.targets.hog import hog_features

feature = pytest.importorskip("skimage.feature", reason="scikit-image is not installed")

CELL = (8, 6)


def smooth_images(num: int = 3) -> Tensor:
    """Noise without its higher frequencies, (num, 1, 64, 72)."""
    small = torch.randn(num, 1, 10, 12, generator=torch.Generator().manual_seed(0))
    return F.interpolate(low_frequency_crop(small, (6, 7)), (64, 72), mode="bicubic")


def scikit_image_hog(images: Tensor, orientations: int) -> Tensor:
    """(B, h, w, orientations), not normalised over more than a cell."""
    histograms = [
        feature.hog(
            image[0].numpy(),
            orientations=orientations,
            pixels_per_cell=CELL,
            cells_per_block=(1, 1),
            block_norm="L2",
            feature_vector=False,
        )[:, :, 0, 0]
        for image in images.double()
    ]
    return torch.stack([torch.from_numpy(histogram) for histogram in histograms])


def backwards(histograms: Tensor) -> Tensor:
    """Bins of atan2(gy, gx) as bins of atan2(gx, gy); their number must be even."""
    return histograms.flip(-1).roll(histograms.shape[-1] // 2, -1)


@pytest.mark.parametrize("bins", [9, 18])
def test_the_histograms_agree_inside_a_smooth_image(bins: int) -> None:
    images = smooth_images()
    ours = hog_features(images, CELL, bins)[:, 0].permute(0, 2, 3, 1)[:, 1:-1, 1:-1].double()
    theirs = backwards(scikit_image_hog(images, 18)).unflatten(-1, (bins, 18 // bins)).sum(-1)
    theirs = F.normalize(theirs, dim=-1)[:, 1:-1, 1:-1]
    similarity = (ours * theirs).sum(-1)
    # Pixels near the border of two bins may fall on either side.
    assert similarity.mean() > 0.99
    assert similarity.min() > 0.9
    # A shift by one bin, the likeliest mistake, would not pass.
    assert (ours * theirs.roll(1, -1)).sum(-1).mean() < 0.8
