"""What a classifier says of each image, and the images that it is most sure about.

Legend: n images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.evaluation.features import EvaluationLoader, evaluating, readable_rows


class Predictions(NamedTuple):
    """Of n images, on the CPU; the process's own part of them."""

    labels: Tensor
    """int64 (n,)."""
    predicted: Tensor
    """int64 (n,), of equal probabilities the lower class."""
    confidence: Tensor
    """float32 (n,), probability of the predicted class."""
    indices: Tensor
    """int64 (n,), the images' numbers in their source."""


class Example(NamedTuple):
    """An image that a classifier is sure about."""

    name: str
    label: int
    predicted: int
    confidence: float
    """Probability of the predicted class."""
    image: Tensor
    """As the network gets it: normalised float32 (C, H, W), on the CPU."""


@torch.inference_mode()
def predict(loader: EvaluationLoader, model: nn.Module, source: ImageSource, batch_size: int) -> Predictions:
    """Show a classifier each image once, in the evaluation view; unreadable ones are left out.

    Args:
        loader: of the run.
        model: from normalised float32 (B, C, H, W) to logits (B, K); its mode is as before afterwards.
        source: labelled images.
        batch_size: images per forward pass.

    Raises:
        UserError: if no image can be read.
    """
    found: list[Predictions] = []
    # Accelerate replaces the forward of the instance that it prepared; this is any model's own.
    forward = type(model).forward
    with evaluating(model), loader.accelerator.autocast():
        for batch in loader.batches(source, range(len(source)), batch_size):
            rows = readable_rows(batch)
            if not len(rows):
                continue
            logits = forward(model, loader.normalise(batch.images[rows])).float()
            confidence, predicted = logits.softmax(dim=1).max(dim=1)
            numbers = torch.tensor(batch.request.indices)[rows.cpu()]
            found.append(Predictions(batch.labels[rows].cpu(), predicted.cpu(), confidence.cpu(), numbers))
    if not found:
        raise UserError(f"none of the {len(source):,} images can be read: {source.describe()}")
    return Predictions(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def most_sure(
    loader: EvaluationLoader, source: ImageSource, predictions: Predictions, count: int, *, right: bool
) -> list[Example]:
    """The images that are recognised (`right`), or mistaken, with the highest confidence; highest first.

    Args:
        loader: of the run.
        source: that the predictions are of.
        predictions: see `predict`.
        count: at most so many.
        right: which of the two.
    """
    labels, predicted, confidence, numbers = predictions
    asked = (labels == predicted) == right
    order = confidence.masked_fill(~asked, -1.0).argsort(descending=True, stable=True)
    chosen = order[: min(count, int(asked.sum()))].tolist()
    if not chosen:
        return []
    indices = [int(numbers[row]) for row in chosen]
    (batch,) = loader.batches(source, indices, len(indices))
    images = loader.normalise(batch.images).cpu()
    return [
        Example(
            source.name(index), int(labels[row]), int(predicted[row]), float(confidence[row]), images[place]
        )
        for place, (index, row) in enumerate(zip(indices, chosen, strict=True))
    ]


def confusion_of(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """int64 (K, K), images by true class (row) and predicted class (column); of int64 (n,) each."""
    counts = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)
