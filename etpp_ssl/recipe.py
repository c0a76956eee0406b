"""A run as one YAML file: the Configs of all components, composed, validated and saved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from etpp_ssl.config import Config, UserError, as_pair, is_neutral, neutral
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.constant import ConstantConfig
from etpp_ssl.curriculum.efficienttrain import EfficientTrainConfig
from etpp_ssl.data.file_list import FileListConfig
from etpp_ssl.data.folder import FolderConfig
from etpp_ssl.data.shards import ShardsConfig
from etpp_ssl.data.synthetic import SyntheticConfig
from etpp_ssl.data.timm_dataset import TimmConfig
from etpp_ssl.evaluation.attentive import AttentiveConfig
from etpp_ssl.evaluation.knn import KnnConfig
from etpp_ssl.evaluation.linear import LinearConfig
from etpp_ssl.evaluation.reconstruction import ReconstructionConfig
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masker import Masker
from etpp_ssl.objective.base import Objective
from etpp_ssl.objective.combined import CombinedConfig
from etpp_ssl.objective.hog import HogConfig
from etpp_ssl.objective.pixels import PixelsConfig
from etpp_ssl.optim.schedule import OptimConfig
from etpp_ssl.sentences import members_at, name_of, shown, validation_sentence

# One line here makes a new component known to recipes.
AnyData = FolderConfig | FileListConfig | TimmConfig | SyntheticConfig | ShardsConfig
AnyCurriculum = EfficientTrainConfig | ConstantConfig
AnyTarget = PixelsConfig | HogConfig | CombinedConfig


UNDECIDED_EPOCHS = 1000.0
"""Stands in for a budget that is not known yet; long, so that rounding to steps shows in no share."""


class CheckpointConfig(Config):
    """When to write a checkpoint, besides the last step and a signal."""

    every_steps: int | None = neutral(None, ge=1)
    every_minutes: float | None = neutral(15.0, gt=0)
    keep: int = neutral(2, ge=1)
    """Newest checkpoints that stay."""


class TrackerConfig(Config):
    """A tracker of accelerate, beside `metrics.jsonl`."""

    name: Literal[
        "none", "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "trackio"
    ] = "none"
    project: str = "etpp_ssl"


class NoProbeConfig(Config):
    """No evaluation during pre-training."""

    name: Literal["none"] = "none"


AnyProbe = NoProbeConfig | KnnConfig | ReconstructionConfig | LinearConfig | AttentiveConfig


class Recipe(Config):
    """Everything that defines a run; the defaults are MAE's for ImageNet."""

    seed: int = 0
    output: str = neutral(...)
    """The run folder."""
    image_size: int | tuple[int, int] = 224
    """Pixels at full resolution, one number or [height, width]."""
    in_chans: int = Field(default=3, ge=1)
    init: str | None = None
    """Weights to start from: a run folder, an export's folder, or a .pth or safetensors file of MAE's,
    timm's or DeiT's layout; a resumed run reads its own checkpoint instead."""
    deterministic: bool = False
    """Bitwise repeatable on CUDA too, at some cost in speed; the CPU always is."""
    budget_epochs: float | None = Field(default=None, gt=0)
    """Equivalent epochs: the compute of so many epochs at full resolution."""
    budget_hours: float | None = Field(default=None, gt=0)
    """Wall time instead: the run measures its speed and trains as many equivalent epochs as fit. Time
    between a kill and its resume, and steps done again, do not count."""
    baseline_epochs: float | None = neutral(None, gt=0)
    """Constant-resolution epochs that `plan` compares the cost with."""
    batch_size: int = Field(ge=1)
    """Images per optimizer step, over all processes, at full resolution; see `curriculum.large_batch`."""
    micro_batch_size: int | None = neutral(None, ge=1)
    """Images per forward pass and process at most; smaller ones are accumulated to the global batch. In a
    stage with a larger batch, larger in proportion."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    log_every_steps: int = neutral(10, ge=1)
    data: Annotated[AnyData, Field(discriminator="name")]
    curriculum: Annotated[AnyCurriculum, Field(discriminator="name")] = EfficientTrainConfig()
    model: ModelConfig = ModelConfig()
    target: Annotated[AnyTarget, Field(discriminator="name")] = PixelsConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = neutral(CheckpointConfig())
    tracker: TrackerConfig = neutral(TrackerConfig())
    probe: Annotated[AnyProbe, Field(discriminator="name", json_schema_extra={"neutral": True})] = (
        NoProbeConfig()
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        if (self.budget_epochs is None) == (self.budget_hours is None):
            raise ValueError(
                f"budget_epochs is {self.budget_epochs} and budget_hours is {self.budget_hours}: give "
                f"exactly one of them, and null for the other"
            )
        return self

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) at full resolution."""
        return as_pair(self.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(p, q) in pixels."""
        return self.model.resolved_patch(self.size, self.in_chans)

    def build_curriculum(self, num_images: int) -> Curriculum:
        """The run's stages for a data set of `num_images`.

        Under `budget_hours` only the stages are known: their numbers of steps stand for some budget
        until `Curriculum.laid_out` gives them those of the run's plan.
        """
        return self.curriculum.build(
            image_size=self.size,
            multiple=self.patch_size,
            num_images=num_images,
            batch_size=self.batch_size,
            budget_epochs=self.budget_epochs or UNDECIDED_EPOCHS,
        )

    def build_objective(self) -> Objective:
        """The reconstruction target and its loss."""
        return self.target.build(patch_size=self.patch_size, in_chans=self.in_chans)

    def build_masker(self) -> Masker:
        """The masks of the run's samples."""
        return self.model.masker(patch_size=self.patch_size, seed=self.seed)

    def build_model(self) -> MaskedAutoencoder:
        """The model, freshly initialised from torch's global generator."""
        return self.model.build(
            image_size=self.size,
            in_chans=self.in_chans,
            num_values=self.build_objective().num_values,
        )

    def save(self, path: Path) -> None:
        """Write the resolved recipe, every default spelled out, as YAML."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, or a run folder's, and apply `section.key=value` overrides.

    A run folder's recipe gets that folder as its output: it may have been moved.

    Raises:
        UserError: naming the key, its value and what would be valid.
    """
    path = Path(path)
    file = path / "recipe.yaml" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        what = "is a folder without recipe.yaml" if path.is_dir() else "does not exist"
        raise UserError(f"recipe {str(path)!r} {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {error}") from error
    if path.is_dir():
        overrides = [f"output={json.dumps(str(path))}", *overrides]
    return parse_recipe(text, overrides, title=str(file))


def parse_recipe(text: str, overrides: list[str] | tuple[str, ...] = (), title: str = "recipe") -> Recipe:
    """A recipe from YAML text; see `load_recipe`."""
    values = _read_yaml(text, title)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{title} holds no `key: value` lines")
    for override in overrides:
        _apply(values, override)
    try:
        # JSON mode is strict on scalars (no "3" for 3) and takes lists for tuples.
        return Recipe.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UserError(f"{title}: {validation_sentence(error, Recipe)}") from None


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """Keys that differ and change the result of a run, as `section.key` with both values."""
    return _differences(old, new, "")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (plain PyYAML reads `5e-4` as a string), and no aliases.

    A few nested aliases expand to more than any memory holds, and no recipe needs one.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"aliases (*{event.anchor}) are not supported in recipes")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.(?:inf|Inf|INF|nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def _read_yaml(text: str, title: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{title} is no valid YAML: {' '.join(str(error).split())}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value")
    value = _read_yaml(text, f"override {override!r}")
    *sections, leaf = key.split(".")
    if _stands_for_a_name([*sections, leaf], value):
        sections, leaf = [*sections, leaf], "name"
    node = values
    for depth, section in enumerate(sections):
        if section not in node:
            node[section] = _default_section(sections[: depth + 1])
        child = node[section]
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {'.'.join(sections[: depth + 1])} has no keys")
        node = child
    if leaf == "name":
        # Another component takes the section over: keys that mean something else to it, or nothing, go.
        by_name = {name_of(member): member for member in members_at(Recipe, sections)}
        before = node.get("name", _default_section(sections).get("name"))
        old, new = by_name.get(before), by_name.get(value if isinstance(value, str) else None)
        if old is not new and old is not None and new is not None:
            for stale in [key for key in node if not _same_field(old, new, key)]:
                del node[stale]
    node[leaf] = value


def _stands_for_a_name(path: list[str], value: Any) -> bool:
    """Whether `path=value` is short for `path.name=value`: a section of named components, and a word."""
    sections = members_at(Recipe, path)
    if len(path) == 1:
        return bool(sections) and not isinstance(value, dict)
    return isinstance(value, str) and any(name_of(member) is not None for member in sections)


def _default_section(path: list[str]) -> dict[str, Any]:
    """What an override starts from where the recipe leaves a section to its default."""
    sections = members_at(Recipe, path)
    if len(sections) < 2:
        return {}
    fields = [around.model_fields.get(path[-1]) for around in members_at(Recipe, path[:-1])]
    names = [getattr(field.default, "name", None) for field in fields if field is not None]
    return {"name": names[0]} if names[0] is not None else {}


def _same_field(old: type[BaseModel], new: type[BaseModel], key: str) -> bool:
    before, after = old.model_fields.get(key), new.model_fields.get(key)
    if before is None or after is None:
        return False
    return before.annotation == after.annotation and before.default == after.default


def _differences(old: BaseModel, new: BaseModel, prefix: str) -> list[str]:
    if type(old) is not type(new):
        return [f"{prefix}name ({getattr(old, 'name', '?')} -> {getattr(new, 'name', '?')})"]
    found = []
    for field in type(old).model_fields:
        before, after = getattr(old, field), getattr(new, field)
        if is_neutral(type(old), field) or before == after:
            continue
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found += _differences(before, after, f"{prefix}{field}.")
        else:
            found.append(f"{prefix}{field} ({shown(before)} -> {shown(after)})")
    return found
