"""Many linear classifiers on the same features, trained at once.

The heads lie side by side in one matrix, so that all of them take one product with a batch of features,
and one more for all their gradients.

Legend: n images, B batch, D width, S heads, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from etpp_ssl.randomness import keyed_torch

CHUNK_VALUES = 1 << 24
"""Logits that are kept at once in evaluation."""


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
    """Share of the images whose label is among each head's `top` largest logits.

    A head that diverged to values that are not finite has none right.

    Args:
        heads: S of them.
        features: float32 (n, D), n at least 1.
        labels: int64 (n,).
        top: at most C.

    Returns:
        float64 (S,), in per cent.
    """
    correct = torch.zeros(len(heads.bias_SC), dtype=torch.int64, device=features.device)
    chunk = max(1, CHUNK_VALUES // heads.bias_SC.numel())
    for part, wanted in zip(features.split(chunk), labels.split(chunk), strict=True):
        logits = heads.logits(part)
        hit = (logits.topk(top, dim=2).indices == wanted.view(-1, 1, 1)).any(dim=2)
        correct += (hit & logits.isfinite().all(dim=2)).sum(dim=0)
    return 100.0 * correct.double() / len(labels)
