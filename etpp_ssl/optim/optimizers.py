"""Optimizer and learning rate of both tasks, as recipes say them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from etpp_ssl.config import Config, UserError
from etpp_ssl.messages import shown
from etpp_ssl.optim.groups import hidden_matrices, parameter_groups
from etpp_ssl.optim.registry import (
    MUON,
    OWN,
    OptimizerCost,
    cost_of_step,
    create,
    keys_of,
    num_betas,
    refusal,
)
from etpp_ssl.optim.schedules import CooldownShape, Schedule, ScheduleName

COOLDOWN = 0.2
"""Of `wsd` where a recipe gives none; Hägele et al. (arXiv 2405.18392) take 0.1 to 0.2."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """What the optimizers of all tasks have in common."""

    name: str = "adamw"
    """timm's name of the optimizer: `adamw`, `muon`, `adamuon`, `lion`, `lamb`, `sgd` and others (`python -c
    "import timm.optim; print(timm.optim.list_optimizers())"`). With `muon`, `adamuon` and, with Nesterov
    momentum, `nmuon` and `nadamuon`, weight matrices of the blocks are orthogonalised; embeddings, positions,
    tokens, norms, biases, patch projection and heads go to AdamW. `base_lr` is AdamW's there, too; `lion`
    wants about a tenth."""
    base_lr: float = Field(default=1.5e-4, gt=0, le=1e4)
    """Peak learning rate per 256 images of the global batch, that of the stage where stages differ."""
    min_lr: float = Field(default=0.0, ge=0, le=1e4)
    """Final learning rate, as it is (not scaled by the batch)."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run's compute over which the learning rate rises linearly from 0: a step has the rate at
    its beginning, the first one that of its middle."""
    schedule: ScheduleName = "cosine"
    """What follows the warm-up: one half-cosine, a straight line (`linear`), or `wsd`: the peak, and a
    cooldown at the end (arXiv 2404.06395), so that `--fork` branches runs of several budgets off one."""
    cooldown: float | None = Field(default=None, ge=0, lt=1)
    """Share of the run's compute that `wsd` cools down for, 0.2 unless given; 0 stays at the peak."""
    cooldown_shape: CooldownShape = "sqrt"
    """From the peak to `min_lr` by 1 - sqrt(x), better in arXiv 2405.18392, or by 1 - x (`linear`)."""
    weight_decay: float = Field(default=0.05, ge=0, le=1e4)
    """Weight decay; see `name` for whether it is decoupled from the gradient: in `adamw`, `lion` and `muon`
    it is, in `sgd` and `lamb` it is not."""
    betas: tuple[Beta, ...] = (0.9, 0.95)
    """Decay rates of an optimizer's moments. Without it, optimizers other than `adamw` and `lamb` have timm's
    own; the same holds for `eps` and `momentum`."""
    eps: float = Field(default=1e-8, gt=0)
    """Addend in the denominator, of optimizers that divide by a moment."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """Of `sgd`, and of `muon` (0.95 there unless given)."""
    fallback_lr_scale: float = Field(default=1.0, gt=0, le=1e4)
    """Factor on the learning rate of what `muon` leaves to AdamW."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest gradient norm; None does not clip, as MAE, and `lamb` does not either (timm's clips at 1)."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        reason = refusal(name)
        if reason is not None:
            raise ValueError(f"{shown(name)} {reason}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, values: Any) -> Any:
        """Spells out the defaults that depend on another key, so that a run's recipe holds them."""
        if not isinstance(values, dict):
            return values
        filled: dict[str, Any] = {}
        if values.get("schedule") == "wsd":
            filled["cooldown"] = COOLDOWN
        name = values.get("name", "adamw")
        if isinstance(name, str) and name not in OWN and refusal(name) is None:
            filled |= {key: default for key, default in keys_of(name).items() if default is not None}
        # What a validator has seen is Python's for pydantic: it no longer takes JSON's lists for tuples.
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        if given.get("cooldown") is None:
            given.pop("cooldown", None)
        return {**filled, **given}

    @model_validator(mode="after")
    def _all_keys_are_read(self) -> OptimizerConfig:
        # Compared with the default, because a run's resolved recipe holds every key.
        fields = type(self).model_fields
        for key in ("betas", "eps", "momentum", "fallback_lr_scale"):
            value = getattr(self, key)
            if key not in keys_of(self.name) and value != fields[key].default:
                reads = " and ".join(keys_of(self.name)) or "none of these keys"
                raise ValueError(f"{key} is {value}, but {self.name} has none; it reads {reads}")
        if "betas" in keys_of(self.name) and len(self.betas) != num_betas(self.name):
            raise ValueError(f"betas is {self.betas}, but {self.name} has {num_betas(self.name)} of them")
        if self.schedule != "wsd":
            for key in ("cooldown", "cooldown_shape"):
                value = getattr(self, key)
                if value != fields[key].default:
                    raise ValueError(
                        f"{key} is {value}, but the schedule {self.schedule} has none: set schedule=wsd"
                    )
        elif self.warmup_share + (self.cooldown or 0.0) > 1:
            raise ValueError(
                f"warmup_share {self.warmup_share:g} and cooldown {self.cooldown:g} are more than the whole "
                f"run"
            )
        return self

    @property
    def first_base_lr(self) -> float:
        """`base_lr` as a number."""
        return self.base_lr

    def learning_rates(self, batch_size: int) -> Schedule:
        """The learning-rate function of steps with a global batch of `batch_size` images."""
        return Schedule(
            peak=self.first_base_lr * batch_size / 256,
            minimum=self.min_lr,
            warmup_share=self.warmup_share,
            shape=self.schedule,
            cooldown=self.cooldown or 0.0,
            cooldown_shape=self.cooldown_shape,
        )

    def groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """The parameter groups of `etpp_ssl.optim.groups`, by this recipe's rules.

        Raises:
            UserError: if Muon finds no matrix, or the model's layers are needed and not known.
        """
        rules: dict[str, Any] = {}
        if self.name in MUON:
            rules = {"matrices": hidden_matrices(net), "fallback_lr_scale": self.fallback_lr_scale}
            if not rules["matrices"]:
                raise UserError(
                    f"optim.name is {self.name}, which is for weight matrices, but no trained parameter of "
                    f"the model's blocks is one: use adamw"
                )
        return parameter_groups(net, weight_decay=self.weight_decay, **self._grouping, **rules)

    @property
    def _grouping(self) -> dict[str, Any]:
        """What a task asks of the groups."""
        return {}

    def _settings(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("betas", "eps", "momentum")}

    def build(self, net: nn.Module, device: torch.device) -> torch.optim.Optimizer:
        """The optimizer over a network's trainable parameters, its learning rate still 0.

        Give its groups their rate with `set_learning_rate`.

        Args:
            net: a masked autoencoder, or a timm model.
            device: where it will be trained.

        Raises:
            UserError: if `layer_decay` or Muon does not know the model's layers, Muon finds no matrix, or the
                optimizer's package is not installed.
        """
        return create(self.name, self.groups(net), self._settings(), device)

    def cost(self, net: nn.Module) -> OptimizerCost:
        """Memory and operations of the optimizer over a network's trainable parameters."""
        return cost_of_step(self.name, self.groups(net), self._settings())


class OptimConfig(OptimizerConfig):
    """Optimizer and schedule of pre-training; the defaults are MAE's (Table 8)."""

    decay_tokens: bool = True
    """Apply weight decay to the cls, register and mask tokens, as the original does (mmpretrain and
    timm exempt them). One-dimensional parameters and position embeddings are always exempt."""

    @property
    def _grouping(self) -> dict[str, Any]:
        return {"decay_tokens": self.decay_tokens}


class ClassifierOptimConfig(OptimizerConfig):
    """Optimizer, schedule, layer decay and weight average; the defaults fine-tune MAE's ViT-B but for
    `layer_decay`, which is 0.65 there (MAE, Table 9)."""

    base_lr: Annotated[float, Field(gt=0, le=1e4)] | Literal["auto"] = 5e-4  # type: ignore[assignment]
    """Peak learning rate per 256 images of the global batch; `auto` chooses one of `auto_lrs`."""
    auto_lrs: tuple[Annotated[float, Field(gt=0, le=1e4)], ...] = (3e-3, 1e-3, 3e-4)
    """What `base_lr=auto` chooses from, by short runs that are compared on `data.holdout_share`'s images: the
    first, unless another is better by more than noise."""
    auto_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the run's budget that each of them has."""
    min_lr: float = Field(default=1e-6, ge=0, le=1e4)
    """Final learning rate, not scaled by the batch; layer decay scales it like any other, as MAE."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the run's compute over which the learning rate rises linearly from 0: a step has the rate at
    its beginning, the first one that of its middle."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same in optimizer steps, which `warmup_share` then follows: at most a quarter of the run, and for
    `budget_epochs` only. None leaves `warmup_share` as it is."""
    betas: tuple[Beta, ...] = (0.9, 0.999)
    """Decay rates of an optimizer's moments. Without it, optimizers other than `adamw` and `lamb` have timm's
    own; the same holds for `eps` and `momentum`."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor on the learning rate per layer away from the head; None trains all layers alike. See
    `etpp_ssl.model.layers` for the models it knows and what counts as a layer."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated and
    exported; None keeps none."""
    ema_warmup: bool = False
    """Let the average's decay rise to `ema` as 1 - t^(-2/3) over steps t, for short runs."""

    @model_validator(mode="after")
    def _averages_and_choices(self) -> ClassifierOptimConfig:
        if not self.auto_lrs:
            raise ValueError("auto_lrs is empty: give learning rates to choose from, such as [1e-4, 1e-3]")
        if self.ema_warmup and self.ema is None:
            raise ValueError("ema_warmup is true, but ema is null: set the decay, such as ema=0.9999")
        return self

    @property
    def first_base_lr(self) -> float:
        """`base_lr`; of `auto`, which a run has chosen before it starts, the first choice."""
        return self.auto_lrs[0] if self.base_lr == "auto" else self.base_lr

    @property
    def _grouping(self) -> dict[str, Any]:
        return {"layer_decay": self.layer_decay}
