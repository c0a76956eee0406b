"""The learning rate as a pure function of the compute spent: warm-up, then one of three shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

ScheduleName = Literal["cosine", "wsd", "linear"]
CooldownShape = Literal["sqrt", "linear"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then `shape`, unbroken across stages of one batch size.

    - `cosine`: one half-cosine to the minimum. The reference re-bases its cosine at every stage change, where
      its learning rate jumps up; ours is continuous, on purpose.
    - `linear`: a straight line to the minimum.
    - `wsd`, warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak until the last share `cooldown` of
      compute, then down to the minimum by 1 - sqrt(x) or by 1 - x, where x is the share of the cooldown that
      is done (Hägele et al., arXiv 2405.18392, who find the former better). What comes before the cooldown
      does not depend on the length of the run, so runs of several lengths can share it.

    Where the global batch changes with the stage, the peak changes with it (linear scaling), and the learning
    rate jumps by the same factor.
    """

    peak: float
    minimum: float
    warmup_share: float
    shape: ScheduleName = "cosine"
    cooldown: float = 0.0
    """Share of compute, in [0, 1), of `wsd` only."""
    cooldown_shape: CooldownShape = "sqrt"

    def __call__(self, progress: float) -> float:
        """The learning rate once a share `progress`, in [0, 1], of the compute is spent."""
        if progress < self.warmup_share:
            return self.peak * progress / self.warmup_share
        return self.minimum + (self.peak - self.minimum) * self._height(progress)

    def _height(self, progress: float) -> float:
        """Between 1 at the peak and 0 at the minimum, after the warm-up."""
        if self.shape == "wsd":
            # A cooldown of 0 leaves the peak to the very end.
            done = 1 - (1 - progress) / self.cooldown if self.cooldown else 0.0
            return 1 - (math.sqrt(max(0.0, done)) if self.cooldown_shape == "sqrt" else max(0.0, done))
        rest = (progress - self.warmup_share) / (1 - self.warmup_share)
        return 1 - rest if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * rest))

    def describe(self) -> str:
        """What comes after the warm-up, in words."""
        end = f"to {self.minimum:.3g}"
        if self.shape == "cosine":
            return f"one half-cosine {end}"
        if self.shape == "linear":
            return f"a straight line {end}"
        if not self.cooldown:
            return "constant"
        how = "1 - sqrt" if self.cooldown_shape == "sqrt" else "a straight line"
        return f"constant until the last {self.cooldown:.3g}, which cools down {end} ({how})"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group of `etpp_ssl.optim.groups` the rate `lr`, times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
