"""Classification: fine-tuning of a pre-trained encoder, or supervised training from scratch.

Fine-tuning is a run with `init` and usually `curriculum: constant`; supervised EfficientTrain++ is one
without `init`, with its curriculum and a RandAugment that grows over compute.

Two things follow the micro-batch, by their nature: which images are mixed (partners are of one micro-batch,
and it has one ratio), and the statistics of batch norms, which each process keeps for itself as torch's DDP
does. So a run with mixup or batch norms is repeated exactly by the same number of processes and the same
`micro_batch_size` only.

Legend: B batch, C channels, h, w pixels at the bandwidth, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etpp_ssl.config import UserError, show_size
from etpp_ssl.curriculum.cost import Cost
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.sources.splits import check_labels, with_classes
from etpp_ssl.data.views import EvalView, Normalise, View
from etpp_ssl.evaluation.classification import ClassifierEvaluation
from etpp_ssl.evaluation.collapse import Pace, Sign, collapse
from etpp_ssl.evaluation.feature_cache import kept_features
from etpp_ssl.evaluation.features import EvaluationLoader, Features
from etpp_ssl.evaluation.linear_cached import LinearCachedConfig, fit_head
from etpp_ssl.model.classifier import Classifier
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.tasks.base import Inputs, Shown, Task, blank_images
from etpp_ssl.weights.loading import load_classifier_init


@dataclass(frozen=True)
class Judge:
    """Compares a classifier with what its run began with; see `etpp_ssl.train.selection.keep_better`."""

    right: Callable[[nn.Module], Tensor]
    """From a model to which images of the holdout it recognises, bool (n,)."""
    began: Callable[[], nn.Module]
    """Makes the model that the run began with, on the run's device."""


class Classification(Task):
    """Predict the class of each image.

    Args:
        recipe: says what images and labels go through.
        model: the classifier.
        device: of the images.
        num_classes: K.
    """

    model: Classifier
    num_classes: int
    judge: Judge | None = None
    """Set by whoever opens a run, where the recipe has `evaluate.keep_better`."""

    def __init__(
        self, recipe: FinetuneRecipe, model: Classifier, device: torch.device, num_classes: int
    ) -> None:
        self.model = model
        self.net = model.net
        self.num_classes = num_classes
        augment = recipe.augment
        self.view: View = augment.build_view(recipe.crop_view(), recipe.data.statistics(recipe.in_chans)[0])
        self.normalise = recipe.normaliser(device)
        self.erase = augment.build_erasing(recipe.seed)
        # A run has them where its loss depends on them; in a plan the loss is the plain one.
        uneven = None if augment.class_counts is None else augment.uneven(augment.class_counts)
        weights_K = adjustment_K = None
        if uneven is not None and augment.class_weights != "none":
            weights_K = uneven.weights_K.float().to(device)
        if uneven is not None and augment.logit_adjustment:
            adjustment_K = (augment.logit_adjustment * uneven.log_prior_K).float().to(device)
        self.mix = augment.build_mixup(num_classes, recipe.seed, weights_K)
        self.adjustment_K = adjustment_K
        self.log_frequencies_K: Tensor | None = None
        self._uneven, self._device = augment.uneven, device
        self.name = recipe.model.name
        self.train = recipe.model.train
        self.image_size = recipe.size
        self.in_chans = recipe.in_chans
        self.kernels = f"attention {recipe.model.attention}"

    def know_counts(self, counts: Sequence[int] | None) -> None:
        """Take the training images of each class, K, so that `losses` tells what they alone give."""
        if counts is not None:
            frequencies_K = self._uneven(counts).frequencies_K
            self.log_frequencies_K = frequencies_K.log().float().to(self._device)

    def inputs(self, batch: Batch, stage: Shown) -> Inputs:
        """`images` as they were mixed, `positions` int64 (B,) and `targets` float (B, K)."""
        images = low_frequency_crop(self.normalise(batch.images), stage.bandwidth)
        images = self.erase(images, batch.sample_ids)
        images, targets = self.mix(images, batch.labels, batch.first_sample_id)
        return {"images": images, "positions": batch.sample_ids, "targets": targets}

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The logits, (B, K)."""
        logits: Tensor = model(inputs["images"], inputs["positions"])
        return logits

    def losses(self, output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """`loss`, the cross-entropy, and `frequency_loss`, that of the best prediction that does not look.

        With `augment.class_weights` the loss of image b is w_y(b) times its cross-entropy, of mixed images a
        sum of two such terms. With `augment.logit_adjustment` tau the probabilities are
        softmax(f_k + tau log pi_k), pi_k the share of class k in the images that are drawn (Menon et al.,
        ICLR 2021, equation 10); evaluation takes f alone.
        """
        targets = inputs["targets"]
        logits = output.float()
        if self.adjustment_K is not None:
            logits = logits + self.adjustment_K.to(logits.device)
        losses = {"loss": soft_target_cross_entropy(logits, targets)}
        if self.log_frequencies_K is not None:
            # Of classes without images and smoothing the logarithm is infinite, and the target 0.
            terms = torch.where(targets > 0, targets * self.log_frequencies_K, 0.0)
            losses["frequency_loss"] = -terms.sum(1).mean()
        return losses

    def target(self, inputs: Inputs) -> Tensor:
        """The probabilities, or with class weights their multiples, (B, K)."""
        return inputs["targets"]

    def blank_inputs(self, stage: Shown) -> Inputs:
        """See `Task.blank_inputs`."""
        return {
            "images": blank_images(self.in_chans, stage.bandwidth),
            "positions": torch.zeros(1, dtype=torch.int64, device="meta"),
            "targets": torch.zeros(1, self.num_classes, device="meta"),
        }

    def load_init(self, init: str, say: Callable[[str], None]) -> str | None:
        """See `etpp_ssl.weights.loading.load_classifier_init`."""
        return load_classifier_init(self.model.net, init, say)

    def fit_head(
        self,
        recipe: FinetuneRecipe,
        accelerator: Accelerator,
        features: Path,
        say: Callable[[str], None],
    ) -> None:
        """Put a linear classifier on the frozen features of the training images in the head's place.

        Its settings are chosen as `probe=linear_cached` chooses them, on the holdout of `data.holdout_share`
        where there is one. Every process must call it.

        Args:
            recipe: of the run.
            accelerator: of the run; the model goes to its device.
            features: folder where features are kept for the next one who asks.
            say: told how good the head is.

        Raises:
            UserError: if the head is not a linear layer, or images or labels do not serve.
        """
        head = self.net.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise UserError(f"model.head is linear, but the head of {self.name} is not a linear layer")
        self.model.to(accelerator.device)
        loader = EvaluationLoader(
            accelerator=accelerator,
            view=EvalView(recipe.size, recipe.data.crop_pct),
            normalise=self.normalise,
            num_workers=recipe.data.num_workers,
            stall_seconds=recipe.data.stall_seconds,
        )

        def features_of(split: str) -> Features:
            source = recipe.open_split(split)
            check_labels(source, self.num_classes)
            found = kept_features(
                features, loader, self.net, source, range(len(source)), pool=None,
                batch_size=recipe.evaluate.batch_size, precision=None, say=say,
            )  # fmt: skip
            if not len(found.labels):
                raise UserError(f"model.head is linear: none of the {len(source)} {split} images can be read")
            return found

        holdout = features_of("holdout") if recipe.data.holdout_share else None
        fitted = fit_head(
            LinearCachedConfig(),
            features_of("train"),
            holdout,
            num_classes=self.num_classes,
            seed=recipe.seed,
        )
        weight, bias = fitted.linear()
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        on = "the holdout" if holdout is None else f"the holdout of {len(holdout.labels):,} images"
        say(
            f"linear head on frozen features: {fitted.holdout_top1:.4g} % on {on} (learning rate "
            f"{fitted.base_lr:g}, weight decay {fitted.weight_decay:g}); training goes on from there"
        )

    def describe(self) -> str:
        """See `Task.describe`."""
        parameters = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        part = f", {trained / 1e6:.3g} M of them trained ({self.train})" if self.train != "all" else ""
        return (
            f"{self.name}, image {show_size(self.image_size)}, {self.in_chans} channels, "
            f"{self.num_classes:,} classes: {parameters / 1e6:.2f} M parameters{part}"
        )

    def plan_rows(self, stage: Shown, cost: Cost) -> dict[str, str]:
        """What papers call FLOPs (multiply-adds of the forward pass), and all operations, of one image."""
        return {
            "GMAC forward": f"{cost.forward_flops / 2e9:.4g}",
            "GFLOP in all": f"{cost.flops / 1e9:.4g}",
        }


def soft_target_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Cross-entropy against probabilities, the mean over the batch, a float32 scalar.

    The log-softmax is taken in float32, also inside autocast.

    Args:
        logits_BK: floating point (B, K), B at least 1.
        targets_BK: probabilities, or multiples of them, floating point (B, K).
    """
    log_probabilities = torch.log_softmax(logits_BK.float(), dim=1)
    return -(targets_BK.float() * log_probabilities).sum(1).mean()


def collapse_of(recipe: FinetuneRecipe, sign: Sign, num_steps: int) -> str:
    """What is said of a run whose classifier has collapsed; see `etpp_ssl.evaluation.collapse`.

    Args:
        recipe: the run's.
        sign: of the collapse.
        num_steps: that it has, or has had.
    """
    optim = recipe.optim
    slow = optim.ema is not None and not optim.ema_warmup and num_steps * (1 - optim.ema) < 1
    peak = optim.learning_rates(recipe.batch_size).peak
    return collapse(sign, Pace(peak, recipe.batch_size, num_steps, optim.warmup_share, slow_average=slow))


def open_evaluation(
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    normalise: Normalise,
    classes: list[str] | None,
    num_classes: int,
) -> ClassifierEvaluation | None:
    """The evaluation of a recipe's classifier, or None where the recipe wants none.

    Args:
        recipe: names split and settings.
        accelerator, normalise: of the run.
        classes: names of the training data's classes, None where it does not tell them.
        num_classes: of the model.

    Raises:
        UserError: if there are no evaluation images, or they have a class that training lacks.
    """
    if recipe.evaluate.split is None:
        return None
    source = recipe.open_split(recipe.evaluate.split)
    if classes is not None:
        source = with_classes(source, classes)
    elif source.classes is not None and len(source.classes) != num_classes:
        raise UserError(
            f"the evaluation images have {len(source.classes)} classes, but model.num_classes is "
            f"{num_classes}, and the training data does not tell their names: give data.classes"
        )
    check_labels(source, num_classes)
    return ClassifierEvaluation(
        source=source,
        view=EvalView(recipe.size, recipe.data.crop_pct),
        normalise=normalise,
        accelerator=accelerator,
        num_workers=recipe.data.num_workers,
        stall_seconds=recipe.data.stall_seconds,
        num_classes=num_classes,
        config=recipe.evaluate,
    )
