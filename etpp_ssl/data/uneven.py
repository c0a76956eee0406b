"""Uneven classes: shares to draw them by, weights of their losses, and the prior that logits are adjusted by.

Legend: K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Balance = Literal["none", "sqrt", "uniform"]
"""Shares of the classes: as their numbers of images, as the square roots of these, or all the same."""


def class_shares(counts: Sequence[int], balance: Balance) -> list[int]:
    """Whole numbers in proportion to the shares of the classes; 0 for classes without images.

    Square roots are those of Mahajan et al. (ECCV 2018, section 2.2); Kang et al. (ICLR 2020, section 3)
    compare all three as samplers. They are exact to one part in a million here.

    Args:
        counts: images of each class, at least one in all.
        balance: the rule.
    """
    if balance == "none":
        return list(counts)
    if balance == "uniform":
        return [int(count > 0) for count in counts]
    return [math.isqrt(count << 40) for count in counts]


@dataclass(frozen=True)
class UnevenClasses:
    """What a loss makes of the classes' numbers of images."""

    counts: tuple[int, ...]
    """Training images of each class, K; at least one in all."""
    balance: Balance
    """How often images of a class are drawn."""
    class_weights: Balance
    """How often losses should count as if they were drawn; `none` is as they are."""
    smoothing: float
    """Label smoothing."""

    @cached_property
    def drawn_K(self) -> Tensor:
        """Share of each class in the images that are drawn, float64."""
        return _normalised(class_shares(self.counts, self.balance))

    @cached_property
    def weights_K(self) -> Tensor:
        """Weight of each class's losses, float64: the share that is asked for over the one that is drawn.

        So their mean over the images that are drawn is 1. A class without images, which has no loss, has 0.
        """
        if self.class_weights == "none":
            return torch.ones(len(self.counts), dtype=torch.float64)
        asked = _normalised(class_shares(self.counts, self.class_weights))
        return (asked / self.drawn_K).nan_to_num(0.0)

    @cached_property
    def log_prior_K(self) -> Tensor:
        """Logarithm of each class's share in the images that are drawn, float64.

        A class without images counts as one with a single image: smoothed targets are above 0 there, too.
        """
        counts = [max(count, 1) for count in self.counts]
        return _normalised(class_shares(counts, self.balance)).log()

    @cached_property
    def frequencies_K(self) -> Tensor:
        """The prediction that is best without looking, the mean of all targets, float64.

        Mixing does not change that mean, smoothing and weights do.
        """
        even = self.smoothing / len(self.counts)
        return (1 - self.smoothing) * self.drawn_K * self.weights_K + even


def _normalised(shares: Sequence[int]) -> Tensor:
    # Python's quotients of whole numbers are exact to the last bit, whatever their size.
    total = sum(shares)
    return torch.tensor([share / total for share in shares], dtype=torch.float64)
