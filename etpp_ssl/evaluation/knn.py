"""k nearest neighbours on frozen features.

The weighted vote of Wu et al. (CVPR 2018), with DINO's defaults: cosine similarity s, each of the k
nearest training images votes for its class with weight exp(s / temperature).

Legend: n training images, m evaluation images, D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.evaluation.base import FeatureConfig, LabelledImages, ProbeContext, split_holdout
from etpp_ssl.evaluation.classification import accuracy
from etpp_ssl.evaluation.features import Features

TEMPERATURE = 0.07
"""DINO's."""
CHUNK_BYTES = 1 << 27
"""Memory for similarities, exceeded only where `CHUNK_IMAGES` need more."""
CHUNK_IMAGES = 128
"""Test images at a time at least; with fewer, memory bandwidth limits the product."""


class KnnConfig(FeatureConfig):
    """kNN probe; of lists for `k` and `temperature`, it takes the pair that is best on the holdout."""

    name: Literal["knn"] = "knn"
    k: int | tuple[int, ...] = 20
    """Neighbours, or a list of numbers to choose from."""
    temperature: float | tuple[float, ...] = TEMPERATURE
    """Of the vote's weights, or a list to choose from."""
    batch_size: int = Field(default=256, ge=1)
    """Images that are loaded together."""

    @field_validator("k", "temperature")
    @classmethod
    def _positive(cls, values: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if not isinstance(values, tuple):
            if values <= 0:
                raise ValueError(f"{values} is not a positive number")
        elif not values or min(values) <= 0:
            raise ValueError(f"{list(values)} is not a list of positive numbers")
        return values

    def build(self, context: ProbeContext) -> KnnProbe:
        """The probe.

        Raises:
            UserError: if there is no evaluation split or there are no labels.
        """
        return KnnProbe(self, context)


class KnnProbe:
    """See `Probe`; yields `knn_top1` and `knn_macro_top1`, in per cent.

    Of a sweep also `knn_k` and `knn_temperature`, which were chosen, and `knn_holdout_top1`, their
    accuracy on the holdout with the rest of the training images as neighbours. The evaluation images
    have all training images as neighbours.
    """

    def __init__(self, config: KnnConfig, context: ProbeContext) -> None:
        self.config = config
        self.context = context
        self.images = LabelledImages.open(context, config.name)
        self.evaluation = self.images.drawn(config, context.seed).evaluation

    @torch.inference_mode()
    def run(self, model: nn.Module) -> dict[str, float]:
        """Accuracy of the vote on the evaluation images."""
        config = self.config
        train, evaluation = self.images.features(model, config, self.context, config.batch_size)
        pairs = list(product(_listed(config.k), _listed(config.temperature)))
        if len(pairs) == 1:
            return self._accuracies(train, evaluation, pairs)[0]
        rest, holdout = split_holdout(train, config.holdout_share, self.context.seed)
        accuracies = self._accuracies(rest, holdout, pairs)
        # Of equals the one that is listed first.
        best = max(range(len(pairs)), key=lambda i: accuracies[i]["knn_top1"])
        k, temperature = pairs[best]
        return {
            **self._accuracies(train, evaluation, [pairs[best]])[0],
            "knn_k": k,
            "knn_temperature": temperature,
            "knn_holdout_top1": accuracies[best]["knn_top1"],
        }

    def _accuracies(
        self, train: Features, test: Features, pairs: list[tuple[int, float]]
    ) -> list[dict[str, float]]:
        return knn_accuracies(train, test, num_classes=self.images.num_classes, pairs=pairs)


def knn_accuracies(
    train: Features, test: Features, *, num_classes: int, pairs: list[tuple[int, float]]
) -> list[dict[str, float]]:
    """`knn_top1` and `knn_macro_top1` of several votes; see `knn_sweep`."""
    predicted = knn_sweep(train.features, train.labels, test.features, num_classes=num_classes, pairs=pairs)
    return [accuracy("knn_", votes == test.labels, test.labels) for votes in predicted]


@torch.inference_mode()
def knn_sweep(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    num_classes: int,
    pairs: list[tuple[int, float]],
    chunk: int | None = None,
) -> Tensor:
    """Predicted classes of several votes, from one pass over the similarities.

    Args:
        train: (n, D).
        train_labels: int64 (n,), in [0, num_classes).
        test: (m, D).
        num_classes: classes to vote for.
        pairs: (k, temperature) of each vote; k is cut to n, the temperature is > 0.
        chunk: test images at a time; bounds memory, has no effect on the result. None takes as many as
            have `CHUNK_BYTES` of similarities.

    Returns:
        int64 (votes, m); a tie goes to the lower class.
    """
    most = max(k for k, _ in pairs)
    predicted = []
    for similarity, nearest in _nearest(train, test, most, chunk):
        labels = train_labels[nearest]
        votes = [_vote(similarity[:, :k], labels[:, :k], t, num_classes) for k, t in pairs]
        predicted.append(torch.stack(votes))
    return torch.cat(predicted, dim=1)


def _nearest(train: Tensor, test: Tensor, k: int, chunk: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarity and number of the k nearest of `train`, nearest first, for `test` in chunks."""
    train, test, k = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1), min(k, len(train))
    chunk = min(chunk or max(CHUNK_IMAGES, CHUNK_BYTES // (4 * len(train))), len(test))
    # One buffer for all chunks: on a CPU a new one of this size costs a page fault per 4 KiB.
    buffer = torch.empty(chunk, len(train), device=train.device)
    for part in test.split(chunk):
        similarity, nearest = torch.mm(part, train.T, out=buffer[: len(part)]).topk(k, dim=1)
        yield similarity, nearest


def _vote(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    # Relative to the nearest one, so that a small temperature cannot overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(weight), num_classes, device=weight.device)
    return votes.scatter_add_(1, labels, weight).argmax(dim=1)


def _listed(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)
