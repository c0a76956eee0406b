"""A linear classifier on features that are extracted once, with a sweep over its settings in one pass.

The heads for all learning rates and weight decays are trained together on the training images but for
the holdout, and the one that is best on the holdout is chosen. A head with its settings is then trained
on all training images, as kNN uses them all, and evaluated once. (DINOv2's linear evaluation sweeps in
the same way, but has augmented views, and reports its best head on the images that it was chosen on.)

There are no augmented views, which is what makes it cheap; `probe=linear` is MAE's protocol with them.

The heads lie side by side in one matrix, so that all of them take one product with a batch of features,
and one more for all their gradients.

Legend: n images, B batch, D width, S heads, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from etpp_ssl.config import may_change
from etpp_ssl.evaluation.base import FeatureConfig, LabelledImages, ProbeContext, split_holdout
from etpp_ssl.evaluation.classification import accuracy
from etpp_ssl.evaluation.features import Features
from etpp_ssl.evaluation.knn import TEMPERATURE, knn_accuracies
from etpp_ssl.randomness import keyed_torch

CHUNK_VALUES = 1 << 24
"""Logits that are kept at once in evaluation."""


class LinearCachedConfig(FeatureConfig):
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
            raise ValueError(f"{list(values)} is not a list of positive numbers")
        return values

    @field_validator("weight_decays")
    @classmethod
    def _not_negative(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) < 0:
            raise ValueError(f"{list(values)} is not a list of numbers of at least 0")
        return values

    def build(self, context: ProbeContext) -> LinearCachedProbe:
        """The probe.

        Raises:
            UserError: if there is no evaluation split or there are no labels.
        """
        return LinearCachedProbe(self, context)


class LinearCachedProbe:
    """See `Probe`; yields `linear_cached_top1`, `linear_cached_macro_top1` and, of more than five classes,
    `linear_cached_top5`.

    They are in per cent and come with the settings that were chosen, `linear_cached_base_lr` and
    `linear_cached_weight_decay`, and `linear_cached_holdout_top1`, the accuracy that they were chosen for;
    with `knn_k` also with `knn_top1` and `knn_macro_top1`, what the kNN probe gives at its default
    temperature.
    """

    def __init__(self, config: LinearCachedConfig, context: ProbeContext) -> None:
        self.config = config
        self.context = context
        self.images = LabelledImages.open(context, config.name)
        self.evaluation = self.images.drawn(config, context.seed).evaluation

    @torch.inference_mode()
    def run(self, model: nn.Module) -> dict[str, float]:
        """Train and evaluate; every process does the same on the features of all."""
        config = self.config
        train, evaluation = self.images.features(model, config, self.context, config.extract_batch_size)
        fitted = fit_head(config, train, None, num_classes=self.images.num_classes, seed=self.context.seed)
        numbers = {}
        if fitted.holdout_top1 is not None:
            numbers["linear_cached_holdout_top1"] = fitted.holdout_top1
        if config.knn_k is not None:
            numbers |= knn_accuracies(
                train,
                evaluation,
                num_classes=self.images.num_classes,
                pairs=[(config.knn_k, TEMPERATURE)],
            )[0]
        features = fitted.scaled(evaluation.features)
        found = hits(fitted.heads, features, evaluation.labels, 1)[:, 0]
        top5 = {}
        if self.images.num_classes > 5:
            top5 = {"linear_cached_top5": accuracies(fitted.heads, features, evaluation.labels, 5).item()}
        return {
            **accuracy("linear_cached_", found, evaluation.labels),
            **top5,
            "linear_cached_base_lr": fitted.base_lr,
            "linear_cached_weight_decay": fitted.weight_decay,
            **numbers,
        }


@dataclass(frozen=True)
class FittedHead:
    """A linear classifier with the settings that were chosen for it."""

    heads: Heads
    """One of them, for features that `scale`, if there is one, has been applied to."""
    scale: Standardise | None
    base_lr: float
    weight_decay: float
    holdout_top1: float | None
    """Per cent, of the head with these settings that was trained without the holdout; None where there was
    nothing to choose."""

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight (C, D) and bias (C,) of the same classifier for features as they are."""
        weight, bias = self.heads.weight_DSC[:, 0].T, self.heads.bias_SC[0]
        if self.scale is None:
            return weight, bias
        weight = weight * (self.scale.variance + 1e-6).rsqrt()
        return weight, bias - weight @ self.scale.mean

    def scaled(self, features: Tensor) -> Tensor:
        """float32 (n, D) as the head was trained on them."""
        return features if self.scale is None else self.scale(features)


def fit_head(
    config: LinearCachedConfig,
    train: Features,
    holdout: Features | None,
    *,
    num_classes: int,
    seed: int,
) -> FittedHead:
    """Choose among a config's settings on the holdout, and train a head with the best ones.

    Of settings with equal accuracy the one with the lower cross-entropy is taken.

    Args:
        config: the settings.
        train: what the head is trained on.
        holdout: images beside `train`; None holds out `config.holdout_share` of `train` while choosing.
        num_classes: C.
        seed: of the orders, and of the draw of the holdout.

    Raises:
        UserError: if a holdout is needed and no class has two images.
    """
    settings = list(product(config.base_lrs, config.weight_decays))
    chosen, top1, beside = settings[0], None, holdout is not None
    if len(settings) > 1:
        rest = train
        if holdout is None:
            rest, holdout = split_holdout(train, config.holdout_share, seed)
        heads, scale = _trained(config, rest, settings, num_classes, seed)
        features = holdout.features if scale is None else scale(holdout.features)
        found = accuracies(heads, features, holdout.labels, 1).tolist()
        losses = cross_entropies(heads, features, holdout.labels).tolist()
        best = min(range(len(settings)), key=lambda number: (-found[number], losses[number]))
        chosen, top1 = settings[best], found[best]
        if beside:
            return FittedHead(heads.one(best), scale, *chosen, top1)
    heads, scale = _trained(config, train, [chosen], num_classes, seed)
    return FittedHead(heads, scale, *chosen, top1)


def _trained(
    config: LinearCachedConfig,
    train: Features,
    settings: list[tuple[float, float]],
    num_classes: int,
    seed: int,
) -> tuple[Heads, Standardise | None]:
    scale = Standardise.of(train.features) if config.standardise else None
    heads = train_heads(
        train.features if scale is None else scale(train.features),
        train.labels,
        num_classes=num_classes,
        settings=settings,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
    )
    return heads, scale


@dataclass(frozen=True)
class Standardise:
    """(x - mean) / sqrt(variance + 1e-6) with the statistics of training features, each (D,).

    What the BatchNorm without affine of MAE's linear probe does, with fixed statistics instead of the
    batch's and of running averages.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardise:
        """Statistics of float32 (n, D)."""
        variance, mean = torch.var_mean(features, dim=0, correction=0)
        return cls(mean, variance)

    def __call__(self, features: Tensor) -> Tensor:
        """float32 (n, D) to the same."""
        return (features - self.mean) * (self.variance + 1e-6).rsqrt()


@dataclass(frozen=True)
class Heads:
    """S linear classifiers."""

    weight_DSC: Tensor
    bias_SC: Tensor

    def one(self, number: int) -> Heads:
        """A single one of them."""
        return Heads(self.weight_DSC[:, number : number + 1], self.bias_SC[number : number + 1])

    def logits(self, features: Tensor) -> Tensor:
        """float32 (B, D) to (B, S, C)."""
        logits: Tensor = (features @ self.weight_DSC.flatten(1)).unflatten(1, self.bias_SC.shape)
        return logits.add_(self.bias_SC)


def train_heads(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    settings: list[tuple[float, float]],
    epochs: int,
    batch_size: int,
    seed: int,
) -> Heads:
    """Minimise each head's mean cross-entropy by SGD with momentum 0.9.

    All heads start at zero and see the same batches. The learning rate follows a cosine from
    base_lr * batch_size / 256 to 0 over all steps, without warm-up; the weight decay is added to the
    weights' gradient, as in torch.optim.SGD, and leaves the biases alone.

    Args:
        features: float32 (n, D).
        labels: int64 (n,), in [0, num_classes).
        num_classes: C.
        settings: (base_lr per 256 images, weight decay) of each head.
        epochs: passes over the features, each in an order that is keyed by its number.
        batch_size: images per step; the last step of an epoch takes what is left.
        seed: of the orders.

    Returns:
        The heads after the last step, in the order of `settings`.
    """
    device, shape = features.device, (features.shape[1], len(settings), num_classes)
    weight = torch.zeros(shape, device=device)
    bias = torch.zeros(shape[1:], device=device)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    lr_S1 = torch.tensor([[lr * batch_size / 256] for lr, _ in settings], device=device)
    decay_S1 = torch.tensor([[decay] for _, decay in settings], device=device)
    heads = Heads(weight, bias)
    steps_per_epoch = math.ceil(len(features) / batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=keyed_torch(seed, "linear-cached", epoch))
        for number, rows in enumerate(order.to(device).split(batch_size)):
            share = (epoch * steps_per_epoch + number) / (epochs * steps_per_epoch)
            rate = lr_S1 * (0.5 * (1 + math.cos(math.pi * share)))
            batch = features[rows]
            error_BSC = cross_entropy_gradient(heads.logits(batch), labels[rows])
            gradient = (batch.T @ error_BSC.flatten(1)).view(shape)
            weight_velocity.mul_(0.9).add_(gradient.addcmul_(weight, decay_S1))
            bias_velocity.mul_(0.9).add_(error_BSC.sum(dim=0))
            weight.addcmul_(weight_velocity, -rate)
            bias.addcmul_(bias_velocity, -rate)
    return heads


def cross_entropy_gradient(logits_BSC: Tensor, labels_B: Tensor) -> Tensor:
    """Gradient of each head's mean cross-entropy over the batch by its logits, (B, S, C)."""
    gradient = logits_BSC.softmax(dim=2)
    at_label = labels_B.view(-1, 1, 1).expand(-1, logits_BSC.shape[1], 1)
    gradient.scatter_add_(2, at_label, gradient.new_full((), -1.0).expand(at_label.shape))
    return gradient.div_(len(labels_B))


def accuracies(heads: Heads, features: Tensor, labels: Tensor, top: int) -> Tensor:
    """Share of the images whose label is among each head's `top` largest logits, float64 (S,), in per cent.

    See `hits`.
    """
    return 100.0 * hits(heads, features, labels, top).sum(dim=0).double() / len(labels)


def hits(heads: Heads, features: Tensor, labels: Tensor, top: int) -> Tensor:
    """Which images have their label among each head's `top` largest logits.

    A head that diverged to values that are not finite has none right.

    Args:
        heads: S of them.
        features: float32 (n, D), n at least 1.
        labels: int64 (n,).
        top: at most C.

    Returns:
        bool (n, S).
    """
    found = []
    for logits, wanted in _logits(heads, features, labels):
        hit = (logits.topk(top, dim=2).indices == wanted.view(-1, 1, 1)).any(dim=2)
        found.append(hit & logits.isfinite().all(dim=2))
    return torch.cat(found)


def cross_entropies(heads: Heads, features: Tensor, labels: Tensor) -> Tensor:
    """Each head's mean cross-entropy, float64 (S,); infinite where it diverged.

    Args:
        heads: S of them.
        features: float32 (n, D), n at least 1.
        labels: int64 (n,).
    """
    total = torch.zeros(len(heads.bias_SC), dtype=torch.float64, device=features.device)
    for logits, wanted in _logits(heads, features, labels):
        at_label = wanted.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
        total -= logits.double().log_softmax(dim=2).gather(2, at_label).sum(dim=(0, 2))
    return torch.where(total.isfinite(), total / len(labels), torch.inf)


def _logits(heads: Heads, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, S, C) and labels (B,) of so many images at a time as memory allows."""
    chunk = max(1, CHUNK_VALUES // heads.bias_SC.numel())
    for part, wanted in zip(features.split(chunk), labels.split(chunk), strict=True):
        yield heads.logits(part), wanted
