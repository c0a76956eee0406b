"""A linear classifier on features that are extracted once, with a sweep over its settings in one pass.

The heads for all learning rates and weight decays are trained together on the training images but for
the holdout, and the one that is best on the holdout is chosen. A head with its settings is then trained
on all training images, as kNN uses them all, and evaluated once. (DINOv2's linear evaluation sweeps in
the same way, but has augmented views, and reports its best head on the images that it was chosen on.)

There are no augmented views, which is what makes it cheap; `probe=linear` is MAE's protocol with them.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from pydantic import Field, field_validator

from etpp_ssl.config import may_change
from etpp_ssl.evaluation.base import ProbeContext
from etpp_ssl.evaluation.features import Features
from etpp_ssl.evaluation.heads import Heads, Standardise, accuracies, train_heads
from etpp_ssl.evaluation.knn import TEMPERATURE, knn_accuracies
from etpp_ssl.evaluation.labelled import LabelledConfig, LabelledImages, split_holdout
from etpp_ssl.model.mae import MaskedAutoencoder


class LinearCachedConfig(LabelledConfig):
    """Linear probe on cached features; SGD with momentum 0.9 and a cosine, see `train_heads`."""

    name: Literal["linear_cached"] = "linear_cached"
    epochs: int = Field(default=50, ge=1)
    """Passes over the features."""
    batch_size: int = Field(default=1024, ge=1)
    """Features per step."""
    base_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    """Learning rates to choose from, per 256 features."""
    weight_decays: tuple[float, ...] = (0.0, 1e-4)
    """Weight decays to choose from."""
    standardise: bool = True
    """Give each feature mean 0 and variance 1 over the images that the heads are trained on."""
    knn_k: int | None = Field(default=None, ge=1)
    """Neighbours of a kNN vote on the same features, beside the heads; see `KnnConfig`. None for no vote."""
    extract_batch_size: int = may_change(256, ge=1)
    """Images that are loaded together."""

    @field_validator("base_lrs")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) <= 0:
            raise ValueError(f"{list(values)} is no list of positive numbers")
        return values

    @field_validator("weight_decays")
    @classmethod
    def _not_negative(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) < 0:
            raise ValueError(f"{list(values)} is no list of numbers of at least 0")
        return values

    def build(self, context: ProbeContext) -> LinearCachedProbe:
        """The probe.

        Raises:
            UserError: if there is no evaluation split or there are no labels.
        """
        return LinearCachedProbe(self, context)


class LinearCachedProbe:
    """See `Probe`; yields `linear_cached_top1` and, of more than five classes, `linear_cached_top5`.

    They are in per cent and come with the settings that were chosen, `linear_cached_base_lr` and
    `linear_cached_weight_decay`, and `linear_cached_holdout_top1`, the accuracy that they were chosen for;
    with `knn_k` also with `knn_top1`, what the kNN probe gives at its default temperature.
    """

    def __init__(self, config: LinearCachedConfig, context: ProbeContext) -> None:
        self.config = config
        self.context = context
        self.images = LabelledImages.open(context, config.name)

    @torch.inference_mode()
    def run(self, model: MaskedAutoencoder) -> dict[str, float]:
        """Train and evaluate; every process does the same on the features of all."""
        config = self.config
        train, evaluation = self.images.features(model, config, self.context, config.extract_batch_size)
        settings = list(product(config.base_lrs, config.weight_decays))
        chosen, numbers = settings[0], {}
        if len(settings) > 1:
            rest, holdout = split_holdout(train, config.holdout_share, self.context.seed)
            top1 = self._trained(rest, holdout, settings, [1])[0]
            # Of equals the one that is listed first.
            best = max(range(len(settings)), key=top1.__getitem__)
            chosen, numbers = settings[best], {"linear_cached_holdout_top1": top1[best]}
        tops = [1, 5] if self.images.num_classes > 5 else [1]
        if config.knn_k is not None:
            numbers["knn_top1"] = knn_accuracies(
                train,
                evaluation,
                num_classes=self.images.num_classes,
                pairs=[(config.knn_k, TEMPERATURE)],
            )[0]
        found = self._trained(train, evaluation, [chosen], tops)
        return {
            **{f"linear_cached_top{top}": values[0] for top, values in zip(tops, found, strict=True)},
            "linear_cached_base_lr": chosen[0],
            "linear_cached_weight_decay": chosen[1],
            **numbers,
        }

    def _trained(
        self, train: Features, test: Features, settings: list[tuple[float, float]], tops: list[int]
    ) -> list[list[float]]:
        """Accuracies on `test` of heads trained on `train`: for each of `tops` those of all settings."""
        config, x, y = self.config, train.features, test.features
        if config.standardise:
            scale = Standardise.of(x)
            x, y = scale(x), scale(y)
        heads: Heads = train_heads(
            x,
            train.labels,
            num_classes=self.images.num_classes,
            settings=settings,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=self.context.seed,
        )
        return [accuracies(heads, y, test.labels, top).tolist() for top in tops]
