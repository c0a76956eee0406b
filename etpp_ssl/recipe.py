"""A run as one YAML file: the Configs of all components, composed and validated."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from etpp_ssl import moved
from etpp_ssl.config import Config, UserError, listed, may_change
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.data.augmentation import AugmentConfig
from etpp_ssl.data.training import TrainingImages, balanced
from etpp_ssl.evaluation.attentive import AttentiveConfig
from etpp_ssl.evaluation.classification import EvaluateConfig
from etpp_ssl.evaluation.knn import KnnConfig
from etpp_ssl.evaluation.linear import LinearConfig
from etpp_ssl.evaluation.linear_cached import LinearCachedConfig
from etpp_ssl.evaluation.reconstruction import ReconstructionConfig
from etpp_ssl.evaluation.training import HeadConfig
from etpp_ssl.model.classifier import Classifier, ClassifierConfig
from etpp_ssl.model.encoders import EXPLICIT_NAME, EncoderConfig
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import Masker
from etpp_ssl.optim.optimizers import ClassifierOptimConfig, OptimConfig
from etpp_ssl.recipe_base import Adapt, AnyStream, RunRecipe, task_of
from etpp_ssl.recipe_file import RecipeText
from etpp_ssl.targets.base import Objective
from etpp_ssl.targets.combined import CombinedConfig
from etpp_ssl.targets.hog import HogConfig
from etpp_ssl.targets.pixels import PixelsConfig

MOST_WARMUP = 0.25
"""Share of a run's compute that `optim.warmup_steps` take at most."""

# One line here makes a new target or probe known to recipes.
AnyTarget = (
    PixelsConfig
    | HogConfig
    | CombinedConfig
)  # fmt: skip


class NoProbeConfig(Config):
    """No evaluation during pre-training."""

    name: Literal["none"] = "none"


AnyProbe = (
    NoProbeConfig
    | KnnConfig
    | ReconstructionConfig
    | LinearConfig
    | LinearCachedConfig
    | AttentiveConfig
)  # fmt: skip


class Recipe(RunRecipe):
    """A pre-training run; the defaults are MAE's for ImageNet."""

    task: Literal["pretrain"] = "pretrain"
    """A masked autoencoder is trained."""
    model: ModelConfig = ModelConfig()
    """Encoder, masking and decoder."""
    target: Annotated[AnyTarget, Field(discriminator="name")] = PixelsConfig()
    """What is reconstructed."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    probe: Annotated[AnyProbe, Field(discriminator="name", json_schema_extra={"may_change": True})] = (
        NoProbeConfig()
    )
    """How the encoder is evaluated during the run and at its end."""

    @model_validator(mode="after")
    def _probe_on_all_channels(self) -> Recipe:
        if self.data.channel_sampling is not None and isinstance(self.probe, HeadConfig):
            raise ValueError(
                f"probe.name is {self.probe.name}, whose head is trained on images of in_chans channels, but "
                f"with data.channel_sampling images have any number: use knn, linear_cached or reconstruction"
            )
        return self

    @property
    def patch_size(self) -> tuple[int, int]:
        """(p, q) in pixels."""
        return self.model.resolved_patch(self.size, self.in_chans)

    @property
    def bandwidth_multiple(self) -> tuple[int, int]:
        """Whole patches."""
        return self.patch_size

    def check_curriculum(self, curriculum: Curriculum) -> None:
        """See that every stage has patches to show and to predict, and that compiled blocks are few enough.

        Raises:
            UserError: if not.
        """
        masker = self.build_masker()
        bandwidths = [stage.bandwidth for stage in curriculum.stages]
        stages = list(zip(bandwidths, curriculum.spans, strict=True))
        for bandwidth, span in stages:
            masker.check(bandwidth, span)
        self.model.check_compiled(masker, stages)

    def build_objective(self) -> Objective:
        """The reconstruction target and its loss."""
        return self.target.build(patch_size=self.patch_size, in_chans=self.in_chans)

    def build_masker(self) -> Masker:
        """The masks of the run's samples."""
        return self.model.masker(
            image_size=self.size,
            patch_size=self.patch_size,
            seed=self.seed,
            min_valid=self.data.min_valid,
        )

    def build_model(self) -> MaskedAutoencoder:
        """The model, freshly initialised from torch's global generator."""
        return self.model.build(
            image_size=self.size,
            in_chans=self.in_chans,
            num_values=self.build_objective().num_values,
            seed=self.seed,
        )


class FinetuneRecipe(RunRecipe):
    """A classifier, fine-tuned or trained from scratch; the defaults are MAE's fine-tuning of ViT-B."""

    task: Literal["finetune"]
    """A classifier is trained."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Images per forward pass and process at most; smaller ones are accumulated to the global batch. Here
    it changes the result: images are mixed, and batch norms take their statistics, within one of them."""
    model: ClassifierConfig = ClassifierConfig()
    """The network."""
    augment: AugmentConfig = AugmentConfig()
    """What images and labels go through beside crop and mirror."""
    optim: ClassifierOptimConfig = ClassifierOptimConfig()
    """Optimizer and learning rate."""
    evaluate: EvaluateConfig = may_change(EvaluateConfig())
    """When the validation images are evaluated, and how."""

    @model_validator(mode="after")
    def _all_channels(self) -> FinetuneRecipe:
        if self.data.channel_sampling is not None:
            raise ValueError(
                "data.channel_sampling is for etpp pretrain; a classifier is shown all of its channels"
            )
        return self

    @classmethod
    def with_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Classifiers are trained with smaller crops than masked autoencoders, unless the recipe says so."""
        data = values.get("data")
        if isinstance(data, dict):
            return {**values, "data": {"crop_scale": [0.08, 1.0], **data}}
        return values

    @classmethod
    def adapted(cls, text: RecipeText) -> RecipeText:
        """With the network that `init` needs, and what fine-tunes it well on a small set."""
        return text if text.stored else _for_small_sets(cls._with_network(text), cls)

    @classmethod
    def _with_network(cls, text: RecipeText) -> RecipeText:
        """With the network of the run that `init` names, where its weights would not fit the recipe's own.

        The image size, the channels and their statistics come along, since the weights know no others. A
        network that differs in its patch size alone stays: weights are adapted to that. Overrides stand above
        all; one that names the model leaves everything as it is.
        """
        named = any(override.startswith(("model=", "model.name=")) for override in text.overrides)
        if text.stored or named:
            return text
        values = text.values(cls)
        init = values.get("init")
        file = Path(init).expanduser() / "recipe.yaml" if isinstance(init, str) else Path()
        if not file.is_file():
            return text
        theirs = RecipeText.read(file.parent).values(BaseModel)
        network, own = _network(theirs), _network(values)
        if network is None or own is None:
            return text
        model = values.get("model")
        unnamed = not isinstance(model, dict) or "name" not in model
        if not unnamed and network == {**own, "patch_size": network["patch_size"]}:
            return text
        data = theirs.get("data")
        layer: dict[str, Any] = {key: theirs[key] for key in ("image_size", "in_chans") if key in theirs}
        layer["model"] = network
        if isinstance(data, dict):
            layer["data"] = {key: data.get(key) for key in ("mean", "std")}
        note = (
            f"model, image_size, in_chans, data.mean and data.std are those of init {init}; the recipe has "
            f"{'no network of its own' if unnamed else 'another network'}"
        )
        return replace(text, layers=(*text.layers, layer), notes=(*text.notes, note))

    def for_images(self, num_images: int) -> Self:
        """The recipe with what follows from the number of its training images settled.

        These are `augment.by_size`, and the share of compute that `optim.warmup_steps` are.
        """
        augment, optim, deep = self.augment, self.optim, self.data.range is not None
        if augment.by_size:
            augment = augment.model_copy(update=augment.settings_for(num_images, deep=deep))
        if optim.warmup_steps is not None and self.budget_epochs is not None:
            curriculum = self.build_curriculum(num_images)
            share = curriculum.progress_after(min(optim.warmup_steps, curriculum.num_steps))
            optim = optim.model_copy(update={"warmup_share": min(share, MOST_WARMUP)})
        return self.model_copy(update={"augment": augment, "optim": optim})

    @property
    def notes(self) -> tuple[str, ...]:
        """See `RunRecipe.notes`; a warning where what is frozen has learned nothing."""
        if self.model.train == "all" or self.init is not None:
            return super().notes
        warning = (
            f"warning: model.train is {self.model.train}, and without init the frozen part keeps random "
            f"weights: give init=RUN or init=FILE"
        )
        return (*super().notes, warning)

    def open_training(self) -> TrainingImages:
        """See `RunRecipe.open_training`; classes are drawn as `augment.balance` says."""
        images = balanced(super().open_training(), self.augment.balance)
        if images.classes is not None and len(images.classes) < 2:
            raise UserError(
                f"the training images are all of one class, {listed(images.classes)}: a classifier tells two "
                f"or more apart"
            )
        return images

    def counted(self, images: TrainingImages) -> FinetuneRecipe:
        """See `RunRecipe.counted`: with the images of each class, where the loss depends on them."""
        if images.classes is None:
            # A better reason than the number of classes, which nobody knows then.
            images.check_labels(0)
        augment, num_classes = self.augment, self.num_classes(images.classes)
        if augment.class_weights == "none" and not augment.logit_adjustment:
            return self
        given, found = augment.class_counts, images.class_counts(num_classes, read=True)
        counts = given if found is None else tuple(found)
        if counts is None:
            raise UserError(
                "augment.class_weights and augment.logit_adjustment need the number of images of each class, "
                "which a stream does not tell: give augment.class_counts"
            )
        if given not in (None, counts):
            raise UserError(
                f"augment.class_counts is {list(given or ())}, but the classes have {list(counts)} images: "
                f"use null, which counts them"
            )
        if len(counts) != num_classes or not any(counts):
            raise UserError(
                f"augment.class_counts is {list(counts)}: give the number of images of each of the "
                f"{num_classes} classes"
            )
        return self.model_copy(update={"augment": augment.model_copy(update={"class_counts": counts})})

    @property
    def bandwidth_multiple(self) -> tuple[int, int]:
        """The patches of a ViT, the total stride of other networks."""
        return self.model.multiple(self.size, self.in_chans)

    def check_curriculum(self, curriculum: Curriculum) -> None:
        """See that the model runs at every stage's bandwidth.

        Raises:
            UserError: if it does not.
        """
        self.model.check(
            image_size=self.size,
            in_chans=self.in_chans,
            bandwidths=[stage.bandwidth for stage in curriculum.stages],
        )

    def num_classes(self, classes: list[str] | None) -> int:
        """Classes that the model tells apart: the recipe's own number, or the data's.

        Args:
            classes: the data's, or None where the data is not at hand.

        Raises:
            UserError: if neither says it, or the data has more classes than the recipe.
        """
        asked = self.model.num_classes
        if asked is None and classes is None:
            raise UserError("model.num_classes must be given: the data does not say how many classes it has")
        if asked is not None and classes is not None and len(classes) > asked:
            raise UserError(
                f"model.num_classes is {asked}, but the data has {len(classes)} classes, the last one "
                f"{classes[-1]!r}; give {len(classes)}, or null to take the data's"
            )
        return asked if asked is not None else len(classes or ())

    def build_model(self, num_classes: int) -> Classifier:
        """The model, freshly initialised from torch's global generator."""
        return self.model.build(
            image_size=self.size, in_chans=self.in_chans, num_classes=num_classes, seed=self.seed
        )


SMALL_SETS: dict[str, Any] = {
    "data": {"holdout_share": 0.1, "crop_scale": [0.35, 1.0]},
    "model": {"head": "linear"},
    "augment": {"by_size": True},
    "optim": {"base_lr": "auto", "warmup_steps": 50, "ema": 0.9998, "ema_warmup": True},
    "evaluate": {"keep_better": True},
}
"""Defaults of fine-tuning where a recipe names `init` and no learning rate: the protocol for small sets."""
STREAMS = [get_args(config.model_fields["name"].annotation)[0] for config in get_args(AnyStream)]
OWN_PROTOCOL = ("base_lr", "name")
"""Keys of `optim` with which a recipe says how it fine-tunes."""
LAYER_DECAY = 0.75
"""Of Vision Transformers in that protocol."""


def _for_small_sets(text: RecipeText, kind: type[BaseModel]) -> RecipeText:
    """The text above the defaults for small sets, unless it has its own protocol, or a stream's images."""
    from etpp_ssl.model.timm_net import is_vit

    values = text.values(kind)
    data, model, optim = (values.get(key) for key in ("data", "model", "optim"))
    if values.get("init") is None or not isinstance(data, dict):
        return text
    if isinstance(optim, dict) and any(key in optim for key in OWN_PROTOCOL):
        return text
    if data.get("name") in STREAMS:
        return text
    defaults = copy.deepcopy(SMALL_SETS)
    if isinstance(model, dict):
        if model.get("head_init_std") is not None:
            del defaults["model"]
        name = str(model.get("name"))
        # A name that timm does not know is refused later, with its key.
        with suppress(UserError):
            if name == EXPLICIT_NAME or is_vit(name):
                defaults["optim"]["layer_decay"] = LAYER_DECAY
    given = values.get("augment")
    if isinstance(given, dict) and given:
        del defaults["augment"]
    note = (
        "init is given and optim.base_lr is not: the defaults are those for small sets (a linear head first, "
        "the learning rate chosen on a tenth of the training images); optim.base_lr=NUMBER keeps the others"
    )
    return replace(text, layers=(defaults, *text.layers), notes=(*text.notes, note))


def _network(values: dict[str, Any]) -> dict[str, Any] | None:
    """What a recipe's `model` says of the encoder, with defaults; None where it is not valid."""
    model = values.get("model", {})
    keys = (*EncoderConfig.model_fields, "args")
    given = {key: model[key] for key in keys if key in model} if isinstance(model, dict) else {"name": None}
    try:
        config = ClassifierConfig.model_validate_json(json.dumps(given))
    except ValidationError:
        return None
    return config.model_dump(mode="json", include=set(keys))


class ProbedClassifier(FinetuneRecipe):
    """A classifier's run as `etpp probe` takes it, with a probe."""

    probe: Annotated[AnyProbe, Field(discriminator="name")] = NoProbeConfig()
    """How the network in front of its head is evaluated."""

    @classmethod
    def adapted(cls, text: RecipeText) -> RecipeText:
        """With the network that `init` needs; nothing is fine-tuned."""
        return cls._with_network(text)


def load_probed(
    source: str | Path, overrides: Sequence[str] = (), adapt: Adapt | None = None
) -> Recipe | ProbedClassifier:
    """Read a recipe of whatever task whose overrides may name a probe; see `RunRecipe.load`."""
    text = RecipeText.read(source, overrides)
    kind: type[Recipe] | type[ProbedClassifier] = ProbedClassifier if task_of(text) == "finetune" else Recipe
    return kind.of_text(text if adapt is None else adapt(text, kind))


def load_any(
    source: str | Path, overrides: Sequence[str] = (), adapt: Adapt | None = None
) -> Recipe | FinetuneRecipe:
    """Read a recipe of whatever task; see `RunRecipe.load`."""
    return any_of(RecipeText.read(source, overrides), adapt)


def parse_any(text: str, overrides: Sequence[str] = (), title: str = "recipe") -> Recipe | FinetuneRecipe:
    """A recipe of whatever task from YAML text; see `RunRecipe.load`."""
    return any_of(RecipeText.of(text, overrides, title))


def any_of(text: RecipeText, adapt: Adapt | None = None) -> Recipe | FinetuneRecipe:
    """The recipe that a text of whatever task states."""
    kind: type[Recipe] | type[FinetuneRecipe] = FinetuneRecipe if task_of(text) == "finetune" else Recipe
    return kind.of_text(text if adapt is None else adapt(text, kind))


if not TYPE_CHECKING:
    __getattr__ = moved.names_of("recipe")
