"""Optimizers of both tasks, and the learning rate as a pure function of the share of compute spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from etpp_ssl.config import Config
from etpp_ssl.optim.groups import parameter_groups, weight_decay_groups


class OptimConfig(Config):
    """AdamW and its schedule (MAE, Table 8)."""

    base_lr: float = Field(default=1.5e-4, gt=0, le=1e4)
    """Peak learning rate per 256 images of the global batch, that of the stage where stages differ."""
    min_lr: float = Field(default=0.0, ge=0, le=1e4)
    """Final learning rate, as it is (not scaled by the batch)."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run's compute over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.05, ge=0, le=1e4)
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's addend in the denominator."""
    decay_tokens: bool = True
    """Apply weight decay to the cls, register and mask tokens, as the original does (mmpretrain and
    timm exempt them). One-dimensional parameters and position embeddings are always exempt."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest gradient norm; None does not clip, as MAE."""

    def build(self, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
        """AdamW over a masked autoencoder's trainable parameters, its learning rate still 0.

        Args:
            model: the masked autoencoder.
            device: where it will be trained.
        """
        groups = weight_decay_groups(model, weight_decay=self.weight_decay, decay_tokens=self.decay_tokens)
        fused = device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=fused)

    def schedule(self, batch_size: int) -> Schedule:
        """The learning-rate function of steps with a global batch of `batch_size` images."""
        return Schedule(
            peak=self.base_lr * batch_size / 256,
            minimum=self.min_lr,
            warmup_share=self.warmup_share,
        )


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one half-cosine, unbroken across stages of one batch size.

    The reference re-bases its cosine at every stage change, where its learning rate jumps up; ours
    is continuous, on purpose. Where the global batch changes with the stage, the peak changes with it
    (linear scaling), and the learning rate jumps by the same factor.
    """

    peak: float
    minimum: float
    warmup_share: float

    def __call__(self, progress: float) -> float:
        """The learning rate once a share `progress`, in [0, 1], of the compute is spent."""
        if progress < self.warmup_share:
            return self.peak * progress / self.warmup_share
        rest = (progress - self.warmup_share) / (1 - self.warmup_share)
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1 + math.cos(math.pi * rest))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group of `etpp_ssl.optim.groups` the rate `lr`, times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


_READ_BY = {"betas": ("adamw", "lamb"), "eps": ("adamw", "lamb"), "momentum": ("sgd",)}


class ClassifierOptimConfig(Config):
    """Optimizer, schedule, layer decay and weight average; the defaults fine-tune MAE's ViT-B but for
    `layer_decay`, which is 0.65 there (MAE, Table 9)."""

    name: Literal["adamw", "lamb", "sgd"] = "adamw"
    """`lamb` is timm's, `sgd` torch's with Nesterov momentum. Weight decay is decoupled from the gradient
    in `adamw` only; `lamb` adapts the rate of the decayed parameters only."""
    base_lr: float = Field(default=5e-4, gt=0, le=1e4)
    """Peak learning rate per 256 images of the global batch."""
    min_lr: float = Field(default=1e-6, ge=0, le=1e4)
    """Final learning rate, not scaled by the batch; layer decay scales it like any other, as MAE."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the run's compute over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.05, ge=0, le=1e4)
    """Weight decay; biases, scales, position embeddings and tokens are exempt."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Of `adamw` and `lamb`."""
    eps: float = Field(default=1e-8, gt=0)
    """Of `adamw` and `lamb` (timm's own default for the latter is 1e-6)."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """Of `sgd`."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Factor on the learning rate per layer away from the head; None trains all layers alike. See
    `etpp_ssl.optim.groups` for the models it knows and what counts as a layer."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest gradient norm; None does not clip, with `lamb` neither (timm's clips at 1 by itself)."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated and
    exported; None keeps none."""
    ema_warmup: bool = False
    """Let the average's decay rise to `ema` as 1 - t^(-2/3) over steps t, for short runs."""

    @model_validator(mode="after")
    def _all_keys_are_read(self) -> ClassifierOptimConfig:
        # Compared with the default, because a run's resolved recipe holds every key.
        for key, names in _READ_BY.items():
            value = getattr(self, key)
            if self.name not in names and value != type(self).model_fields[key].default:
                raise ValueError(f"{key} is {value}, but {self.name} has none, only {' and '.join(names)}")
        if self.ema_warmup and self.ema is None:
            raise ValueError("ema_warmup is true, but ema is null: set the decay, such as ema=0.9999")
        return self

    def schedule(self, batch_size: int) -> Schedule:
        """The learning-rate function of steps with a global batch of `batch_size` images."""
        return Schedule(
            peak=self.base_lr * batch_size / 256,
            minimum=self.min_lr,
            warmup_share=self.warmup_share,
        )

    def build(self, net: nn.Module, device: torch.device) -> torch.optim.Optimizer:
        """The optimizer over a timm model's trainable parameters, its learning rate still 0.

        Its groups are those of `parameter_groups`; give them their rate with `set_learning_rate`.

        Args:
            net: the model.
            device: where it will be trained.

        Raises:
            UserError: if `layer_decay` does not know the model's layers.
        """
        groups = parameter_groups(net, weight_decay=self.weight_decay, layer_decay=self.layer_decay)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, nesterov=True)
        if self.name == "lamb":
            from timm.optim import Lamb

            # The loop clips; here it would be done a second time, and without being asked.
            lamb: torch.optim.Optimizer = Lamb(
                groups, lr=0.0, betas=self.betas, eps=self.eps, max_grad_norm=None
            )
            return lamb
        fused = device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=fused)
