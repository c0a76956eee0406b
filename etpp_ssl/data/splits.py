"""The training and the evaluation part of a data set, and a keyed draw between them where it has none."""

from __future__ import annotations

import torch

from etpp_ssl.config import UserError
from etpp_ssl.data.images import Bands, DataConfig, ImageSource, Picture
from etpp_ssl.randomness import keyed_torch


class Subset:
    """Some images of a source, under new numbers.

    Args:
        source: where they come from.
        indices: their numbers there.
    """

    def __init__(self, source: ImageSource, indices: list[int]) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Bands:
        """See `ImageSource.load`."""
        return self.source.load(self.indices[index])

    def open(self, index: int) -> Picture:
        """See `ImageSource.open`."""
        return self.source.open(self.indices[index])

    def label(self, index: int) -> int:
        """See `ImageSource.label`."""
        return self.source.label(self.indices[index])

    def name(self, index: int) -> str:
        """See `ImageSource.name`."""
        return self.source.name(self.indices[index])

    def fingerprint(self) -> str:
        """That of the whole source, with the number of images taken."""
        return f"{self.source.fingerprint()}/{len(self)}"


def open_split(
    config: DataConfig, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int
) -> ImageSource:
    """Open the "train" or the "eval" part of a recipe's data.

    With `data.holdout`, a keyed draw of that many training images is the evaluation part, and
    training never sees them.

    Raises:
        UserError: if the data is not there, or the holdout leaves nothing to train on.
    """
    if not config.holdout:
        return config.open(split, in_chans=in_chans, image_size=image_size, seed=seed)
    source = config.open("train", in_chans=in_chans, image_size=image_size, seed=seed)
    if config.holdout >= len(source):
        raise UserError(
            f"data.holdout {config.holdout} leaves nothing to train on: there are {len(source)} images"
        )
    held_out = keyed_indices(len(source), config.holdout, seed, "holdout")
    if split == "eval":
        return Subset(source, held_out)
    taken = set(held_out)
    return Subset(source, [i for i in range(len(source)) if i not in taken])


def keyed_indices(num_images: int, count: int, seed: int, purpose: str) -> list[int]:
    """A keyed uniform draw of `count` out of `num_images` numbers without repeats, ascending."""
    order = torch.randperm(num_images, generator=keyed_torch(seed, purpose))
    return sorted(order[:count].tolist())
