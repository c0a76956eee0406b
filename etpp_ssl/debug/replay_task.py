"""What the two loops compute of a micro-batch, in parts that can be looked at one by one.

Legend: B batch, C channels, H, W pixels, K kept patches, M predicted patches, V values per patch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.views import Normalise
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.tasks.classify import soft_target_cross_entropy
from etpp_ssl.train.classifier_run import new_classifier

Inputs = dict[str, Tensor]
"""What model and loss are given: `images`, float32 (B, C, H, W) at the bandwidth, and other tensors with one
row per sample."""


class Task(Protocol):
    """A loop's step; `losses(forward(model, inputs(batch)), inputs(batch))` is what the loop computes."""

    model: nn.Module
    """The bare model."""

    def inputs(self, batch: Batch) -> Inputs:
        """Of a micro-batch on the device."""

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The output, (B, ...), of the bare model or of what wraps it."""

    def target(self, inputs: Inputs) -> Tensor:
        """What the output is compared with, (B, ...)."""

    def losses(self, output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """`loss`, and its parts where it has some, float32 scalars."""


class PretrainingTask:
    """A step of `etpp_ssl.train.pretrain`; see `Task`.

    Args:
        recipe: the run.
        device: where to compute.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.model: nn.Module = recipe.build_model()
        self.normalise = Normalise(*recipe.data.statistics(recipe.in_chans), device)
        self.masker = recipe.build_masker()
        self.objective = recipe.build_objective()

    def inputs(self, batch: Batch) -> Inputs:
        """`images`, `ids_keep` (B, K) and `ids_predict` (B, M)."""
        request = batch.request
        images = low_frequency_crop(self.normalise(batch.images), request.bandwidth)
        mask = self.masker(batch.positions, request.bandwidth, request.progress)
        return {"images": images, "ids_keep": mask.ids_keep, "ids_predict": mask.ids_predict}

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """(B, M, V)."""
        values: Tensor = model(inputs["images"], inputs["ids_keep"], inputs["ids_predict"]).values_BMV
        return values

    def target(self, inputs: Inputs) -> Tensor:
        """(B, M, V)."""
        return self.objective.target(inputs["images"], inputs["ids_predict"])

    def losses(self, output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """See `Objective.losses`."""
        return self.objective.losses(output, inputs["ids_predict"], inputs["images"])


class ClassifierTask:
    """A step of `etpp_ssl.train.finetune`; see `Task`.

    Args:
        recipe: the run.
        num_classes: of the model.
        device: where to compute.
    """

    def __init__(self, recipe: FinetuneRecipe, num_classes: int, device: torch.device) -> None:
        self.model: nn.Module = new_classifier(recipe, num_classes)
        self.normalise = Normalise(*recipe.data.statistics(recipe.in_chans), device)
        self.erase = recipe.augment.build_erasing(recipe.seed)
        self.mix = recipe.augment.build_mixup(num_classes, recipe.seed)

    def inputs(self, batch: Batch) -> Inputs:
        """`images` as they were mixed, `positions` (B,) and `targets` (B, num_classes)."""
        images = low_frequency_crop(self.normalise(batch.images), batch.request.bandwidth)
        images = self.erase(images, batch.positions)
        images, targets = self.mix(images, batch.labels, batch.first_position)
        return {"images": images, "positions": batch.positions, "targets": targets}

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """(B, num_classes)."""
        logits: Tensor = model(inputs["images"], inputs["positions"])
        return logits

    def target(self, inputs: Inputs) -> Tensor:
        """(B, num_classes)."""
        return inputs["targets"]

    def losses(self, output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """`loss`."""
        return {"loss": soft_target_cross_entropy(output, inputs["targets"])}
