"""From samples to their masks: pattern, ratio over compute, and the subset that is predicted.

Legend: B batch, N patches, K kept (visible) patches, M predicted patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pydantic import Field
from torch import Tensor

from etpp_ssl.config import Config
from etpp_ssl.model.masking import num_predicted, num_visible, predicted_ids, removed_ids
from etpp_ssl.model.patches import grid_of


class MaskRatioRamp(Config):
    """A mask ratio that changes linearly over the run's compute."""

    start: float = Field(gt=0, lt=1)
    end: float = Field(gt=0, lt=1)


class Pattern(Protocol):
    """How visible patches lie; a Config of masking is one."""

    def visible_ids(self, positions_B: Tensor, grid: tuple[int, int], num_keep: int, seed: int) -> Tensor:
        """Ids of the visible patches of a grid of (h, w), int64 (B, K), ascending in each row."""


class Mask(NamedTuple):
    """The two sets of patches of a batch, each ascending in a row."""

    ids_keep: Tensor
    """int64 (B, K), visible to the encoder."""
    ids_predict: Tensor
    """int64 (B, M), masked and predicted."""


class MaskCounts(NamedTuple):
    """Patches of one image."""

    num_patches: int
    num_keep: int
    num_predict: int

    @property
    def everything(self) -> MaskCounts:
        """With every masked patch predicted."""
        return self._replace(num_predict=self.num_patches - self.num_keep)


@dataclass(frozen=True)
class Masker:
    """The masks of a run: a pure function of the samples' numbers, the bandwidth and the progress."""

    pattern: Pattern
    ratio: float | MaskRatioRamp
    predict_ratio: float | None
    """Share of all patches that is predicted; None predicts every masked one."""
    patch_size: tuple[int, int]
    seed: int

    def mask_ratio(self, progress: float) -> float:
        """The share that is removed once a share `progress`, in [0, 1], of the compute is spent."""
        if isinstance(self.ratio, MaskRatioRamp):
            return self.ratio.start * (1 - progress) + self.ratio.end * progress
        return self.ratio

    def counts(self, bandwidth: tuple[int, int], progress: float) -> MaskCounts:
        """Exact numbers of patches of every image at a bandwidth.

        Raises:
            UserError: if nothing would be visible, masked or predicted.
        """
        grid = grid_of(bandwidth, self.patch_size)
        num_patches, ratio = grid[0] * grid[1], self.mask_ratio(progress)
        return MaskCounts(
            num_patches,
            num_visible(num_patches, ratio),
            num_predicted(num_patches, ratio, self.predict_ratio),
        )

    def check(self, bandwidth: tuple[int, int], span: tuple[float, float]) -> None:
        """Raise a UserError if the counts at a bandwidth are impossible anywhere in a span of progress."""
        for progress in span:
            self.counts(bandwidth, progress)

    def __call__(self, positions_B: Tensor, bandwidth: tuple[int, int], progress: float) -> Mask:
        """The masks of a step.

        Args:
            positions_B: int64 (B,), the samples' numbers in the run; the masks are on their device.
            bandwidth: (height, width) of the low-frequency crop in pixels.
            progress: share of the run's compute that is spent, in [0, 1].
        """
        return self._draw(positions_B, bandwidth, self.counts(bandwidth, progress))

    def everything(self, positions_B: Tensor, bandwidth: tuple[int, int]) -> Mask:
        """The masks at the end of the run, with every masked patch to predict: for evaluation."""
        return self._draw(positions_B, bandwidth, self.counts(bandwidth, 1.0).everything)

    def _draw(self, positions_B: Tensor, bandwidth: tuple[int, int], counts: MaskCounts) -> Mask:
        num_patches, num_keep, num_predict = counts
        grid = grid_of(bandwidth, self.patch_size)
        ids_keep = self.pattern.visible_ids(positions_B, grid, num_keep, self.seed)
        ids_removed = removed_ids(ids_keep, num_patches)
        return Mask(ids_keep, predicted_ids(positions_B, ids_removed, num_predict, num_patches, self.seed))
