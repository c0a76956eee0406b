"""Hyper-parameters are chosen on a held-out part of the training images, never on evaluation images.

Legend: n images.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.evaluation.features import Features
from etpp_ssl.randomness import keyed_words


def _holdout_only(select_on: str) -> str:
    if select_on != "holdout":
        raise ValueError(
            f"settings are not chosen on {select_on!r}, as a result says nothing on the images that its own "
            f"settings were chosen on; use holdout, a keyed part of the training images"
        )
    return select_on


SelectOn = Annotated[str, AfterValidator(_holdout_only)]
"""The images that settings are chosen on: "holdout", and nothing else, so that a recipe states it."""


def split_holdout(training: Features, share: float, seed: int) -> tuple[Features, Features]:
    """The part of the training images to learn from, and the part to choose settings on.

    Args:
        training: all training images.
        share: of each class to hold out, in (0, 1); at least one image, at most all but one. A class of
            one image keeps it.
        seed: of the draw, which looks at an image's number only: one image more or less in the data moves
            at most one image of its class.

    Returns:
        (rest, holdout), each in the order of `training`.

    Raises:
        UserError: if no class has two images.
    """
    held_out = stratified_holdout(training.labels, training.indices, share, seed)
    if not held_out.any():
        raise UserError(
            f"probe.holdout_share {share:g} of the {len(held_out)} training images holds out none, as no "
            f"class has two; give single values instead of lists"
        )
    return training.take(~held_out), training.take(held_out)


def stratified_holdout(labels: Tensor, indices: Tensor, share: float, seed: int) -> Tensor:
    """A keyed draw of a share of each class; see `split_holdout`.

    Args:
        labels: int64 (n,), >= 0.
        indices: int64 (n,), the images' numbers.
        share: in (0, 1).
        seed: any integer.

    Returns:
        bool (n,), True = held out.
    """
    word = keyed_words(seed, "probe-holdout", indices, 1)[:, 0]
    by_word = word.argsort(stable=True)
    order = by_word[labels[by_word].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=1)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[labels[order]]
    quota = torch.minimum((share * counts).round().clamp(min=1).long(), (counts - 1).clamp(min=0))
    return rank < quota[labels]
