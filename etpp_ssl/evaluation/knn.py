"""k nearest neighbours on frozen features.

The weighted vote of Wu et al. (CVPR 2018), with DINO's defaults: cosine similarity s, each of the k
nearest training images votes for its class with weight exp(s / temperature).

Legend: n training images, m evaluation images, D width, k neighbours.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from etpp_ssl.config import Config, UserError, neutral
from etpp_ssl.data.images import ImageSource
from etpp_ssl.data.splits import check_same_classes, keyed_indices
from etpp_ssl.evaluation.base import ProbeContext
from etpp_ssl.evaluation.features import Pool, extract_features
from etpp_ssl.model.mae import MaskedAutoencoder


class KnnConfig(Config):
    """kNN probe of the encoder as it stands: unmasked, at full resolution, in eval mode."""

    name: Literal["knn"] = "knn"
    every_steps: int | None = neutral(None, ge=1)
    """Optimizer steps between probes during pre-training; None probes at the end only."""
    k: int = Field(default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0)
    pool: Pool | None = None
    """cls token or mean of the patch tokens; None is the encoder's own."""
    num_train: int | None = Field(default=None, ge=1)
    """Keyed draw of training images to compare with; None takes all."""
    num_eval: int | None = Field(default=None, ge=1)
    """Keyed draw of evaluation images; None takes all."""
    batch_size: int = Field(default=256, ge=1)

    def build(self, context: ProbeContext) -> KnnProbe:
        """The probe.

        Raises:
            UserError: if there is no evaluation split or there are no labels.
        """
        return KnnProbe(self, context)


class KnnProbe:
    """See `Probe`; yields `knn_top1`, in per cent."""

    def __init__(self, config: KnnConfig, context: ProbeContext) -> None:
        self.config = config
        self.context = context
        self.train = context.open_split("train")
        self.evaluation = context.open_split("eval")
        if self.train.classes is None or self.evaluation.classes is None:
            raise UserError(
                "probe=knn needs labels, and the data has none (class sub-folders, or class names in a "
                "list); probe=reconstruction works without"
            )
        check_same_classes(self.train, self.evaluation)

    def run(self, model: MaskedAutoencoder) -> dict[str, float]:
        """Accuracy of the vote on the evaluation images."""
        config, seed = self.config, self.context.seed
        train, train_labels = self._features(
            model, self.train, _drawn(self.train, config.num_train, seed, "knn-train")
        )
        test, test_labels = self._features(
            model, self.evaluation, _drawn(self.evaluation, config.num_eval, seed, "knn-eval")
        )
        classes = len(self.train.classes or ())
        predicted = knn_vote(
            train,
            train_labels,
            test,
            num_classes=classes,
            k=config.k,
            temperature=config.temperature,
        )
        correct = (predicted == test_labels).sum().item()
        return {"knn_top1": 100.0 * correct / len(test_labels)}

    def _features(
        self, model: MaskedAutoencoder, source: ImageSource, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        context = self.context
        return extract_features(
            model.encoder,
            source,
            indices,
            view=context.view,
            normalise=context.normalise,
            accelerator=context.accelerator,
            pool=self.config.pool,
            batch_size=self.config.batch_size,
            num_workers=context.num_workers,
        )


@torch.inference_mode()
def knn_vote(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = 1024,
) -> Tensor:
    """Predicted classes.

    Args:
        train: (n, D).
        train_labels: int64 (n,), in [0, num_classes).
        test: (m, D).
        num_classes: classes to vote for.
        k: neighbours, cut to n.
        temperature: of the vote's weights, > 0.
        chunk: test images at a time; bounds memory, has no effect on the result.

    Returns:
        int64 (m,); a tie goes to the lower class.
    """
    train, k = F.normalize(train.float(), dim=1), min(k, len(train))
    predicted = []
    for part in F.normalize(test.float(), dim=1).split(chunk):
        similarity, nearest = (part @ train.T).topk(k, dim=1)
        # Relative to the nearest one, so that a small temperature cannot overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), num_classes, device=train.device)
        votes.scatter_add_(1, train_labels[nearest], weight)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def _drawn(source: ImageSource, count: int | None, seed: int, purpose: str) -> list[int]:
    if count is None or count >= len(source):
        return list(range(len(source)))
    return keyed_indices(len(source), count, seed, purpose)
