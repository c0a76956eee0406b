"""Images that differ in channels, and an encoder of few: a keyed draw in training, a mean in evaluation.

IC-ViT (arXiv 2503.09826) pre-trains on single channels of microscopes and satellites: what an encoder learns
of one serves all. `data.channel_sampling` says how many it takes at once.

Legend: B batch, C channels of an image, K those that the encoder takes, G groups of K, H, W pixels, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from etpp_ssl.data.formats.base import Channels, Decoder, Picture, Region
from etpp_ssl.randomness import keyed_random


class SomeChannels:
    """A deep picture of which K channels are shown, in their order: a function of (seed, sample).

    Args:
        picture: of K channels or more.
        num_channels: K.
        seed: the run's seed.
        sample_id: the sample's number in the run.
    """

    deep = True

    def __init__(self, picture: Picture, num_channels: int, seed: int, sample_id: int) -> None:
        self._picture = picture
        self._num_channels = num_channels
        self._draw = (seed, sample_id)
        self.size = picture.size

    def channels(self) -> Channels:
        """Not of 8 bits."""
        raise TypeError("a deep picture has regions only")

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """The channels that are shown; see `Picture.region`."""
        region, (seed, sample_id) = self._picture.region(box, at_least, decoder), self._draw
        there = range(region.pixels.shape[2])
        chosen = sorted(keyed_random(seed, "channels", sample_id).sample(there, self._num_channels))
        return region._replace(pixels=np.ascontiguousarray(region.pixels[:, :, chosen]))


def stacked(views: list[Tensor]) -> Tensor:
    """One batch (B, C, H, W) of views (C, H, W); those of fewer channels than others end in NaN."""
    most = max(len(view) for view in views)
    return torch.stack(
        [
            view if len(view) == most else pad(view, (0, 0, 0, 0, 0, most - len(view)), value=torch.nan)
            for view in views
        ]
    )


def mean_over_channels(images: Tensor, num_channels: int, features: Callable[[Tensor], Tensor]) -> Tensor:
    """Features of images of any channels: the mean over groups of K that follow each other.

    Where K does not divide C, the last group is that of the last K channels. Images of K channels are their
    own group.

    Args:
        images: (B, C, H, W) as `stacked` gives them.
        num_channels: K, at most C.
        features: from images (n, K, H, W) to (n, D).

    Returns:
        (B, D).
    """
    if images.shape[1] == num_channels:
        return features(images)
    counts_B = (~images.isnan().flatten(2).all(dim=2)).sum(dim=1)
    found, rows = [], []
    for count in counts_B.unique().tolist():
        rows.append((counts_B == count).nonzero().flatten())
        starts = [min(start, count - num_channels) for start in range(0, count, num_channels)]
        groups = torch.stack([images[rows[-1], start : start + num_channels] for start in starts], dim=1)
        # No more at once than where each image is one group.
        parts = [features(part) for part in groups.flatten(0, 1).split(len(images))]
        found.append(torch.cat(parts).unflatten(0, groups.shape[:2]).mean(dim=1))
    return torch.cat(found)[torch.cat(rows).argsort()]
