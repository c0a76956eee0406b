"""Reconstruction loss on images that training never sees.

The images, their masks and the resolution are fixed, and every masked patch is predicted whatever subset
training predicts, so the number is comparable across the stages of a curriculum and of a mask-ratio
schedule (its last ratio is taken), where the training loss is not. Images with too few patches that have
data (`Masker.enough`) are left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.frequency import pixels_with_data
from etpp_ssl.data.sources.splits import Subset, keyed_indices
from etpp_ssl.evaluation.base import ProbeConfig, ProbeContext
from etpp_ssl.evaluation.features import evaluating, readable_rows
from etpp_ssl.model.mae import MaskedAutoencoder


class ReconstructionConfig(ProbeConfig):
    """Held-out reconstruction loss; needs no labels."""

    name: Literal["reconstruction"] = "reconstruction"
    num_eval: int | None = Field(default=1024, ge=1)
    """Keyed draw of evaluation images; None takes all."""
    batch_size: int = Field(default=64, ge=1)
    """Images per forward pass and process."""

    def build(self, context: ProbeContext) -> ReconstructionProbe:
        """The probe.

        Raises:
            UserError: if there are no evaluation images.
        """
        return ReconstructionProbe(self, context)


class ReconstructionProbe:
    """See `Probe`; yields `heldout_loss`, and `heldout_loss_<part>` for each part of a combined target.

    All are in the units of the training losses.
    """

    def __init__(self, config: ReconstructionConfig, context: ProbeContext) -> None:
        self.config = config
        self.context = context
        if context.objective is None or context.masker is None:
            raise UserError("probe=reconstruction needs a decoder, which a classifier has not; use probe=knn")
        self.objective, self.masker = context.objective, context.masker
        self.source = context.open_split("eval")
        count = config.num_eval or len(self.source)
        self.indices = keyed_indices(len(self.source), count, context.seed, "heldout")
        self.evaluation = Subset(self.source, self.indices)

    @torch.no_grad()
    def run(self, model: nn.Module) -> dict[str, float]:
        """Mean losses over the evaluation images, in float32."""
        from accelerate.utils import gather_object

        assert isinstance(model, MaskedAutoencoder)
        context = self.context
        sums: dict[str, float] = {}
        count = 0
        with evaluating(model):
            for batch in context.batches(self.source, self.indices, self.config.batch_size):
                rows = readable_rows(batch)
                if not len(rows):
                    continue
                valid = None
                if batch.has_gaps:
                    has_data = pixels_with_data(batch.images[rows], context.view.image_size)
                    valid = self.masker.counted(has_data)
                    enough = self.masker.enough(valid, 1.0)
                    rows, valid = rows[enough], valid[enough]
                    if not len(rows):
                        continue
                images = context.normalise(batch.images[rows])
                mask = self.masker.everything(batch.sample_ids[rows], context.view.image_size, valid)
                # The class's own forward: accelerate wraps the instance's in autocast.
                values, ids_predicted = MaskedAutoencoder.forward(model, images, *mask)
                for name, loss in self.objective.losses(values, ids_predicted, images, valid).items():
                    sums[name] = sums.get(name, 0.0) + loss.item() * len(rows)
                count += len(rows)
        shares = gather_object([(sums, count)])
        num_images = max(1, sum(images_here for _, images_here in shares))
        # A process without a readable image knows no names.
        names = dict.fromkeys(["loss", *(name for sums_here, _ in shares for name in sums_here)])
        return {
            f"heldout_{name}": sum(sums_here.get(name, 0.0) for sums_here, _ in shares) / num_images
            for name in names
        }
