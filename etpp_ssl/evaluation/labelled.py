"""What the probes of extracted features share: their settings, their images, their features."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from etpp_ssl.config import Config, UserError, neutral
from etpp_ssl.data.images import ImageSource
from etpp_ssl.data.splits import check_same_classes, keyed_indices
from etpp_ssl.evaluation.base import ProbeContext
from etpp_ssl.evaluation.features import Features, Pool, Precision, extract_features
from etpp_ssl.evaluation.selection import SelectOn
from etpp_ssl.model.mae import MaskedAutoencoder


class LabelledConfig(Config):
    """A probe on features of the encoder as it stands: unmasked, at full resolution, in eval mode."""

    name: str
    every_steps: int | None = neutral(None, ge=1)
    """Optimizer steps between probes during pre-training; None probes at the end only."""
    pool: Pool | None = None
    """cls token or mean of the patch tokens; None is the encoder's own."""
    num_train: int | None = Field(default=None, ge=1)
    """Keyed draw of training images; None takes all."""
    num_eval: int | None = Field(default=None, ge=1)
    """Keyed draw of evaluation images; None takes all."""
    precision: Precision | None = None
    """Of the encoder's forward pass. None is bf16 in a bf16 run, otherwise fp32; bf16 on a CPU without
    units for it is many times slower than fp32."""
    select_on: SelectOn = "holdout"
    """Images that lists of settings are swept on: `holdout`, the only choice."""
    holdout_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of each class of the training images that is held out to choose among lists of settings."""


@dataclass(frozen=True)
class LabelledImages:
    """Training and evaluation images with labels."""

    train: ImageSource
    evaluation: ImageSource
    num_classes: int

    @classmethod
    def open(cls, context: ProbeContext, probe: str) -> LabelledImages:
        """Open both splits.

        Args:
            context: the run.
            probe: its name, for messages.

        Raises:
            UserError: if there is no evaluation split, there are no labels, or the classes differ.
        """
        train, evaluation = context.open_split("train"), context.open_split("eval")
        if train.classes is None or evaluation.classes is None:
            raise UserError(
                f"probe={probe} needs labels, and the data has none (class sub-folders, or class names in a "
                f"list); probe=reconstruction works without"
            )
        check_same_classes(train.classes, evaluation.classes)
        return cls(train, evaluation, len(train.classes))

    def features(
        self, model: MaskedAutoencoder, config: LabelledConfig, context: ProbeContext, batch_size: int
    ) -> tuple[Features, Features]:
        """Features of the training and of the evaluation images that a probe's settings draw.

        Raises:
            UserError: if none of them can be read.
        """
        found = []
        for part, source, count in (
            ("train", self.train, config.num_train),
            ("eval", self.evaluation, config.num_eval),
        ):
            indices = list(range(len(source)))
            if count is not None and count < len(source):
                # The names of kNN's draws, which was the first probe: the same images for all of them.
                indices = keyed_indices(len(source), count, context.seed, f"knn-{part}")
            features = extract_features(
                model.encoder,
                source,
                indices,
                view=context.view,
                normalise=context.normalise,
                accelerator=context.accelerator,
                pool=config.pool,
                batch_size=batch_size,
                num_workers=context.num_workers,
                stall_seconds=context.stall_seconds,
                precision=config.precision,
            )
            if not len(features.labels):
                raise UserError(f"probe={config.name}: none of the {len(indices)} {part} images can be read")
            found.append(features)
        return found[0], found[1]
