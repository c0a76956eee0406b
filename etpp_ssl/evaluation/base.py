"""What probes share: what they are built from, their settings, labelled images and the holdout.

Settings are chosen on a held-out part of the training images, never on evaluation images.

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, cast

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from etpp_ssl import moved
from etpp_ssl.config import Config, UserError, may_change
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import Subset, keyed_indices, with_classes
from etpp_ssl.evaluation.feature_cache import kept_features
from etpp_ssl.evaluation.features import EvaluationLoader, Features, Pool, Precision
from etpp_ssl.model.masking import Masker
from etpp_ssl.randomness import keyed_words
from etpp_ssl.targets.base import Objective


def _never() -> AbstractContextManager[Callable[[], int]]:
    return nullcontext(lambda: 0)


def _silent(text: str) -> None:
    """Drop a message."""


@dataclass(frozen=True, kw_only=True)
class ProbeContext(EvaluationLoader):
    """A run, as a probe sees it."""

    open_split: Callable[[str], ImageSource]
    """From "train" or "eval" to its images."""
    objective: Objective | None
    """What a masked autoencoder predicts; None of a classifier."""
    masker: Masker | None
    seed: int
    folder: Path | None = None
    """Where a long probe keeps its state, so that an interrupted one can be resumed, and others keep features
    for the next probe; None keeps none."""
    stop_signal: Callable[[], AbstractContextManager[Callable[[], int]]] = _never
    """Entered by a long probe that has a `folder`. Inside, signals are recorded instead of acted on, and the
    function that it yields returns the one that any process received, or 0. That is a collective, which
    every process must call at the same steps."""
    say: Callable[[str], None] = _silent
    """Told about evaluation images that lack a class, and about the progress of a long probe."""


class Probe(Protocol):
    """Built once; each run yields named numbers about the model as it stands."""

    @property
    def evaluation(self) -> ImageSource:
        """The images that the numbers are of."""

    def run(self, model: nn.Module) -> dict[str, float]:
        """Evaluate; the model's mode and weights are as before afterwards.

        Args:
            model: a masked autoencoder or a classifier; its `encoder` is a timm network.

        Raises:
            Interrupted: by a long probe, if `ProbeContext.stop_signal` gave a signal.
        """


class ProbeConfig(Config):
    """Settings of any probe; its `build(context)` makes the probe."""

    name: str
    every_steps: int | None = may_change(None, ge=1)
    """Optimizer steps between probes during pre-training; None probes at the end only."""


class LabelledConfig(ProbeConfig):
    """Settings of a probe on labelled images: on the encoder as it stands, unmasked, at full resolution."""

    num_train: int | None = Field(default=None, ge=1)
    """Keyed draw of training images; None takes all."""
    num_eval: int | None = Field(default=None, ge=1)
    """Keyed draw of evaluation images; None takes all."""


def _holdout_only(select_on: str) -> str:
    if select_on != "holdout":
        raise ValueError(
            f"settings are not chosen on {select_on!r}, as a result says nothing on the images that its own "
            f"settings were chosen on; use holdout, a keyed part of the training images"
        )
    return select_on


SelectOn = Annotated[str, AfterValidator(_holdout_only)]
"""The images that settings are chosen on: "holdout", and nothing else, so that a recipe states it."""


class FeatureConfig(LabelledConfig):
    """Settings of a probe on features that are extracted once."""

    pool: Pool | None = None
    """cls token or mean of the patch tokens; None is the encoder's own."""
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
            UserError: if there is no evaluation split, there are no labels, or training lacks a class of the
                evaluation images.
        """
        train, evaluation = context.open_split("train"), context.open_split("eval")
        if train.classes is None or evaluation.classes is None:
            raise UserError(
                f"probe={probe} needs labels, and the data has none (class sub-folders, or class names in a "
                f"list); probe=reconstruction works without"
            )
        known = with_classes(evaluation, train.classes)
        if len(evaluation.classes) < len(train.classes):
            context.say(f"probe={probe}: {known.describe()}")
        return cls(train, known, len(train.classes))

    def drawn(self, config: LabelledConfig, seed: int) -> LabelledImages:
        """The images that a probe's settings draw, under new numbers."""
        train = drawn_indices(self.train, "train", config.num_train, seed)
        evaluation = drawn_indices(self.evaluation, "eval", config.num_eval, seed)
        return LabelledImages(
            self.train if len(train) == len(self.train) else Subset(self.train, train),
            self.evaluation
            if len(evaluation) == len(self.evaluation)
            else Subset(self.evaluation, evaluation),
            self.num_classes,
        )

    def features(
        self, model: nn.Module, config: FeatureConfig, context: ProbeContext, batch_size: int
    ) -> tuple[Features, Features]:
        """Features of the training and of the evaluation images that a probe's settings draw.

        Raises:
            UserError: if none of them can be read.
        """
        found = []
        for split, source, count in (
            ("train", self.train, config.num_train),
            ("eval", self.evaluation, config.num_eval),
        ):
            indices = drawn_indices(source, split, count, context.seed)
            features = kept_features(
                None if context.folder is None else context.folder / "features",
                context,
                cast("nn.Module", model.encoder),
                source,
                indices,
                pool=config.pool,
                batch_size=batch_size,
                precision=config.precision,
                say=context.say,
            )
            if not len(features.labels):
                raise UserError(f"probe={config.name}: none of the {len(indices)} {split} images can be read")
            found.append(features)
        return found[0], found[1]


def drawn_indices(source: ImageSource, split: str, count: int | None, seed: int) -> list[int]:
    """Numbers of a keyed draw of `count` images of "train" or "eval"; all in order for None, or for fewer."""
    if count is None or count >= len(source):
        return list(range(len(source)))
    # The purpose is named after kNN, the first probe: all probes draw the same images.
    return keyed_indices(len(source), count, seed, f"knn-{split}")


def split_holdout(training: Features, share: float, seed: int) -> tuple[Features, Features]:
    """The part of the training images to learn from, and the part to choose settings on.

    Args:
        training: all training images.
        share: of each class to hold out, in (0, 1); at least one image, at most all but one. A class of
            one image keeps it.
        seed: of the draw, which looks at an image's number only: one image more or less in the data moves
            at most one image of its class.

    Returns:
        (rest, holdout), each in the order of `training`.

    Raises:
        UserError: if no class has two images.
    """
    held_out = stratified_holdout(training.labels, training.indices, share, seed)
    if not held_out.any():
        raise UserError(
            f"probe.holdout_share {share:g} of the {len(held_out)} training images holds out none, as no "
            f"class has two; give single values instead of lists"
        )
    return training.take(~held_out), training.take(held_out)


def stratified_holdout(labels: Tensor, indices: Tensor, share: float, seed: int) -> Tensor:
    """A keyed draw of a share of each class; see `split_holdout`.

    Args:
        labels: int64 (n,), >= 0.
        indices: int64 (n,), the images' numbers.
        share: in (0, 1).
        seed: any integer.

    Returns:
        bool (n,), True = held out.
    """
    word = keyed_words(seed, "probe-holdout", indices, 1)[:, 0]
    by_word = word.argsort(stable=True)
    order = by_word[labels[by_word].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=1)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[labels[order]]
    quota = torch.minimum((share * counts).round().clamp(min=1).long(), (counts - 1).clamp(min=0))
    return rank < quota[labels]


if not TYPE_CHECKING:
    __getattr__ = moved.names_of("evaluation.base")
