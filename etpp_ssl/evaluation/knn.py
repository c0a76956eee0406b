"""k nearest neighbours on frozen features.

The weighted vote of Wu et al. (CVPR 2018), with DINO's defaults: cosine similarity s, each of the k
nearest training images votes for its class with weight exp(s / temperature).

Legend: n training images, m evaluation images, D width, k neighbours.
"""

from __future__ import annotations

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
BLOCK_IMAGES = 1 << 16
"""Training images at a time, of which there is a copy in float32."""
VOTERS = 1 << 12
"""Test images whose votes are counted together."""
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
    similarity, nearest = _nearest(train, test, most, chunk)
    votes = []
    for k, temperature in pairs:
        # A few test images at a time, as each has a number for every class.
        parts = zip(similarity[:, :k].split(VOTERS), nearest[:, :k].split(VOTERS), strict=True)
        votes.append(torch.cat([_vote(s, train_labels[n], temperature, num_classes) for s, n in parts]))
    return torch.stack(votes)


def _nearest(train: Tensor, test: Tensor, k: int, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Cosine similarity and number of the k nearest of `train`, (m, k) each, nearest first.

    A block of `train` is normalised, meets all of `test`, and is forgotten.
    """
    test, k, block = F.normalize(test.float(), dim=1), min(k, len(train)), min(BLOCK_IMAGES, len(train))
    chunk = min(chunk or max(CHUNK_IMAGES, CHUNK_BYTES // (4 * block)), len(test))
    # One buffer for all chunks: on a CPU a new one of this size costs a page fault per 4 KiB.
    buffer = torch.empty(chunk * block, device=train.device)
    best: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(train), block):
        images = F.normalize(train[first : first + block].float(), dim=1)
        for number, part in enumerate(test.split(chunk)):
            out = buffer[: len(part) * len(images)].view(len(part), len(images))
            similarity, nearest = torch.mm(part, images.T, out=out).topk(min(k, len(images)), dim=1)
            nearest += first
            if first == 0:
                best.append((similarity, nearest))
                continue
            both = torch.cat([best[number][0], similarity], 1), torch.cat([best[number][1], nearest], 1)
            similarity, place = both[0].topk(min(k, both[0].shape[1]), dim=1)
            best[number] = similarity, both[1].gather(1, place)
    return torch.cat([s for s, _ in best]), torch.cat([n for _, n in best])


def _vote(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    # Relative to the nearest one, so that a small temperature cannot overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(weight), num_classes, device=weight.device)
    return votes.scatter_add_(1, labels, weight).argmax(dim=1)


def _listed(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)
