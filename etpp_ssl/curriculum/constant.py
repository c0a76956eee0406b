"""The plain run: full resolution at every step."""

from __future__ import annotations

from typing import Literal

from etpp_ssl.config import Config, as_pair
from etpp_ssl.curriculum.base import Curriculum, Portion, ReplaySpec


class ConstantConfig(Config):
    """Train at full resolution throughout, as MAE does."""

    name: Literal["constant"] = "constant"
    crop: Literal["fourier", "lanczos"] = "fourier"
    """As in `efficienttrain`; at full resolution both show the whole image."""
    replay: ReplaySpec | None = None
    """Repeat loaded images; None loads every image anew."""

    def build(
        self,
        *,
        image_size: tuple[int, int],
        multiple: tuple[int, int],
        num_images: int,
        batch_size: int,
        budget_epochs: float,
    ) -> Constant:
        """The run's curriculum; see `Constant` for the arguments. `multiple` has no effect here."""
        return Constant(
            image_size=image_size,
            num_images=num_images,
            batch_size=batch_size,
            budget_epochs=budget_epochs,
            replay=self.replay,
        )

    def roundings(self, image_size: tuple[int, int], multiple: tuple[int, int]) -> list[str]:
        """Nothing is rounded at full resolution."""
        return []


class Constant(Curriculum):
    """One stage at full resolution; the arguments are those of `EfficientTrain`."""

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        num_images: int,
        batch_size: int,
        budget_epochs: float,
        replay: ReplaySpec | None = None,
    ) -> None:
        size = as_pair(image_size)
        super().__init__(
            [Portion(size, 1.0, batch_size, replay)],
            image_size=size,
            num_images=num_images,
            budget_epochs=budget_epochs,
        )
