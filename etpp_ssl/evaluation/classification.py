"""Accuracy, calibration and confusion of a classifier, each image counted once for any number of processes.

Legend: B batch, n images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import Config, UserError, may_change
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import check_label
from etpp_ssl.evaluation.features import EvaluationLoader, evaluating, gather_rows, readable_rows

TOP_K = 5


class EvaluateConfig(Config):
    """When and how a classifier is evaluated: at full resolution, resized and centre-cropped."""

    split: str | None = may_change("eval")
    """`eval`, the data's evaluation images, `holdout`, those of `data.holdout_share`, or `train`; null
    evaluates nothing."""
    every_steps: int | None = may_change(None, ge=1)
    """Optimizer steps between evaluations; None evaluates at the end only. No checkpoint is chosen by the
    result: what is exported is always the last one."""
    repeats: int = may_change(1, ge=1, le=1000)
    """Runs with so many seeds, the recipe's and the following ones, each in a folder `seed-N` of the output,
    with other draws of few labels; mean and spread of their results are printed."""
    keep_better: bool = False
    """After the last step, compare with what the run began with on `data.holdout_share`'s images; where
    training has made it worse by more than noise, that is what is kept, evaluated and exported."""
    batch_size: int = may_change(256, ge=1)
    """Images per forward pass and process."""
    num_bins: int = may_change(15, ge=1)
    """Number of bins of the calibration error."""


@dataclass(frozen=True)
class ClassificationResult:
    """The result of an evaluation."""

    num_images: int
    """n, images evaluated."""
    num_unreadable: int
    """Images left out because they cannot be decoded."""
    loss: float
    """Mean cross-entropy, in nats, without smoothing."""
    top1: float
    """Per cent of the images whose class is the likeliest; of equal logits the lower class counts first."""
    macro_top1: float
    """See `accuracy`."""
    top5: float | None
    """Per cent of the images whose class is among the five likeliest; None for five classes or fewer."""
    recall: tuple[float | None, ...]
    """Per class, per cent of its images that are recognised; None where it has none."""
    calibration_error: float
    """See `calibration_error`."""
    confusion: Tensor
    """int64 (K, K) on the CPU: images by true class (row) and predicted class (column)."""

    def numbers(self) -> dict[str, float | int | None]:
        """All scalars, as in a row of metrics."""
        return {
            "top1": self.top1,
            "macro_top1": self.macro_top1,
            "top5": self.top5,
            "eval_loss": self.loss,
            "calibration_error": self.calibration_error,
            "num_images": self.num_images,
            "num_unreadable": self.num_unreadable,
        }


@dataclass(frozen=True, kw_only=True)
class ClassifierEvaluation(EvaluationLoader):
    """Built once; each run evaluates the model as it stands."""

    source: ImageSource
    num_classes: int
    """K, of the model; the data may have fewer."""
    config: EvaluateConfig

    @torch.inference_mode()
    def run(self, model: nn.Module) -> ClassificationResult:
        """Evaluate in the run's precision; the model's mode is as before afterwards.

        Every process must call it, and gets the whole result.

        Args:
            model: from normalised float32 (B, C, H, W) to logits (B, K).

        Raises:
            UserError: if a label is none of the model's classes, nothing can be read any more, or the
                model's outputs are not finite.
        """
        rows, unreadable = self._rows(model)
        return summary(rows, self.num_classes, self.config.num_bins, unreadable)

    @torch.inference_mode()
    def right(self, model: nn.Module) -> Tensor:
        """Which images a model recognises, bool (n,) on the CPU, in the same order for every model; see
        `run`."""
        rows, _ = self._rows(model)
        return rows[:, 0] == rows[:, 1]

    def _rows(self, model: nn.Module) -> tuple[Tensor, int]:
        """Each image's `image_rows` on the CPU, and how many images cannot be read."""
        rows, unreadable = [torch.empty(0, 5, dtype=torch.float64, device=self.accelerator.device)], 0
        # Accelerate replaces the forward of the instance that it prepared; this is any model's own.
        forward = type(model).forward
        with evaluating(model), self.accelerator.autocast():
            for batch in self.batches(self.source, range(len(self.source)), self.config.batch_size):
                readable = readable_rows(batch)
                unreadable += len(batch.images) - len(readable)
                for row in readable.tolist():
                    label, index = int(batch.labels[row]), batch.request.indices[row]
                    check_label(self.source.name(index), label, self.num_classes)
                if len(readable):
                    logits = forward(model, self.normalise(batch.images[readable]))
                    rows.append(image_rows(logits.float(), batch.labels[readable]))
        gathered = gather_rows(torch.cat(rows), self.accelerator).cpu()
        lost = torch.tensor([unreadable], device=self.accelerator.device)
        return gathered, int(self.accelerator.reduce(lost, reduction="sum"))


def image_rows(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Per image, the numbers that `summary` needs.

    Args:
        logits_BK: float32.
        labels_B: int64, in [0, K).

    Returns:
        float64 (B, 5): label, predicted class, classes that come before the label (0 where it is
        predicted), probability of the predicted class, cross-entropy.
    """
    logits = logits_BK.double()
    true = logits.gather(1, labels_B[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > true) | ((logits == true) & (classes < labels_B[:, None]))
    confidence = logits.softmax(dim=1).amax(dim=1)
    # Of equal logits argmax may take any, of equal ones here it takes the first.
    predicted = (logits == logits.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    loss = F.cross_entropy(logits, labels_B, reduction="none")
    return torch.stack([labels_B.double(), predicted.double(), before.sum(1).double(), confidence, loss], 1)


def summary(rows: Tensor, num_classes: int, num_bins: int, num_unreadable: int) -> ClassificationResult:
    """The result from all images' `image_rows`, float64 (n, 5) with n > 0.

    Raises:
        UserError: if outputs of the model are not finite: of them nothing can be counted.
    """
    lost = int((~rows.isfinite().all(dim=1)).sum())
    if lost:
        raise UserError(f"the model's outputs are not finite for {lost} of {len(rows)} evaluation images")
    labels, predicted, rank = rows[:, 0].long(), rows[:, 1].long(), rows[:, 2]
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes)
    right, members = confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()
    correct = predicted == labels
    found = accuracy("", correct, labels)
    return ClassificationResult(
        num_images=len(rows),
        num_unreadable=num_unreadable,
        loss=rows[:, 4].mean().item(),
        top1=found["top1"],
        macro_top1=found["macro_top1"],
        top5=_per_cent(int((rank < TOP_K).sum()), len(rows)) if num_classes > TOP_K else None,
        recall=tuple(_per_cent(r, n) if n else None for r, n in zip(right, members, strict=True)),
        calibration_error=calibration_error(rows[:, 3], correct, num_bins),
        confusion=confusion,
    )


def accuracy(prefix: str, correct: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and macro top-1 of any classifier, in per cent.

    Top-1 is the share of the images that are recognised. Macro top-1 is the mean of the classes' own shares
    (their recall), in which a rare class counts as much as a frequent one; classes without images count
    in neither.

    Args:
        prefix: of the names, such as `knn_`.
        correct: bool (n,), n at least 1.
        labels: int64 (n,), at least 0.

    Returns:
        `<prefix>top1` and `<prefix>macro_top1`.
    """
    members = torch.bincount(labels)
    right = torch.bincount(labels[correct], minlength=len(members))[members > 0]
    recall = right.double() / members[members > 0]
    return {
        f"{prefix}top1": _per_cent(int(correct.sum()), len(labels)),
        f"{prefix}macro_top1": 100.0 * recall.mean().item(),
    }


def calibration_error(confidence: Tensor, correct: Tensor, num_bins: int) -> float:
    """Expected calibration error of the predicted class (Guo et al., ICML 2017, equation 3).

    Confidences fall into bins of equal width, (i/M, (i+1)/M]; each adds the distance between its share of
    correct predictions and its mean confidence, weighted by its share of the images.

    Args:
        confidence: float64 (n,), probability of the predicted class, in (0, 1].
        correct: bool (n,).
        num_bins: M.

    Returns:
        In [0, 1].
    """
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    gap = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence)
    return (gap.abs().sum() / len(confidence)).item()


def _per_cent(part: int, whole: int) -> float:
    return 100.0 * part / whole
