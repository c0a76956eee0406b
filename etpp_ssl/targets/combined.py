"""Several targets at once: one prediction for each, and the weighted sum of their losses.

Legend: B batch, M masked patches, V values per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from etpp_ssl.config import Config
from etpp_ssl.targets.base import Objective
from etpp_ssl.targets.hog import HogConfig
from etpp_ssl.targets.pixels import PixelsConfig


class Weighted(Config):
    """What a part of a combined target has beside its own keys."""

    weight: float = Field(default=1.0, gt=0)
    """Factor of its loss in the sum."""
    label: str | None = Field(default=None, pattern=r"^[a-z0-9_]+$")
    """Its loss is logged as `loss_<label>`; None takes the target's own: pixels, norm_pixels or hog."""


class PixelsPart(PixelsConfig, Weighted):
    """Pixels as a part; `norm_pix` as in the target of that name."""

    @property
    def log_name(self) -> str:
        """Key of its loss in the log."""
        return f"loss_{self.label or ('norm_pixels' if self.norm_pix else 'pixels')}"


class HogPart(HogConfig, Weighted):
    """HOG as a part; `cell` and `bins` as in the target of that name."""

    @property
    def log_name(self) -> str:
        """Key of its loss in the log."""
        return f"loss_{self.label or 'hog'}"


AnyPart = Annotated[PixelsPart | HogPart, Field(discriminator="name")]


class CombinedConfig(Config):
    """The weighted sum of several targets' losses, each logged on its own."""

    name: Literal["combined"] = "combined"
    parts: tuple[AnyPart, ...] = Field(default=(PixelsPart(), HogPart()), min_length=1)
    """The targets: keys of `pixels` or `hog` each, with a `weight` and a `label`."""

    @field_validator("parts")
    @classmethod
    def _each_has_a_name_of_its_own(cls, parts: tuple[AnyPart, ...]) -> tuple[AnyPart, ...]:
        names = [part.log_name for part in parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"several parts would be logged as {', '.join(twice)}; give each a label of its own, "
                f"for instance label: {twice[0].removeprefix('loss_')}2"
            )
        return parts

    def build(self, *, patch_size: tuple[int, int], in_chans: int) -> CombinedObjective:
        """The objective for patches of (p, q) pixels and C channels.

        Raises:
            UserError: if a part does not suit the patch.
        """
        return CombinedObjective(
            [
                Part(part.log_name, part.weight, part.build(patch_size=patch_size, in_chans=in_chans))
                for part in self.parts
            ]
        )


@dataclass(frozen=True)
class Part:
    """One target among several."""

    log_name: str
    weight: float
    objective: Objective


class CombinedObjective(Objective):
    """Several objectives, whose values stand one after the other; see `Objective` for the shapes."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.patch_size = parts[0].objective.patch_size
        self.num_values = sum(part.objective.num_values for part in parts)

    def target(self, images: Tensor, ids_removed: Tensor) -> Tensor:
        """The parts' targets in their order, float32 (B, M, V); V is the sum of theirs."""
        return torch.cat([part.objective.target(images, ids_removed) for part in self.parts], dim=-1)

    def target_with_gaps(self, images: Tensor, ids_removed: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Each part's own; see `Objective.target_with_gaps`."""
        own = [part.objective.target_with_gaps(images, ids_removed, valid) for part in self.parts]
        targets, counts = zip(*own, strict=True)
        return torch.cat(targets, dim=-1), torch.cat(counts, dim=-1)

    def losses(
        self, values_BMV: Tensor, ids_removed: Tensor, images: Tensor, valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`loss`, the weighted sum, and each part's own loss without its weight, as `loss_<part>`."""
        shares = values_BMV.split([part.objective.num_values for part in self.parts], dim=-1)
        own = {
            part.log_name: part.objective(values, ids_removed, images, valid)
            for part, values in zip(self.parts, shares, strict=True)
        }
        weighted = [part.weight * own[part.log_name] for part in self.parts]
        return {"loss": torch.stack(weighted).sum(), **own}
