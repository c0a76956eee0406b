"""Optimizers of both tasks and of MAE's linear probe; the learning rate as a function of compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from etpp_ssl.config import Config
from etpp_ssl.optim.groups import parameter_groups, weight_decay_groups


class OptimConfig(Config):
    """AdamW and its schedule (MAE, Table 8)."""

    base_lr: float = Field(default=1.5e-4, gt=0, le=1e4)
    """Peak learning rate per 256 images of the global batch, that of the stage where stages differ."""
    min_lr: float = Field(default=0.0, ge=0, le=1e4)
    """Final learning rate, as it is (not scaled by the batch)."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run's compute over which the learning rate rises linearly from 0: a step has the rate at
    its beginning, the first one that of its middle."""
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
    base_lr: Annotated[float, Field(gt=0, le=1e4)] | Literal["auto"] = 5e-4
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
    `etpp_ssl.model.layers` for the models it knows and what counts as a layer."""
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
        if not self.auto_lrs:
            raise ValueError("auto_lrs is empty: give learning rates to choose from, such as [1e-4, 1e-3]")
        if self.ema_warmup and self.ema is None:
            raise ValueError("ema_warmup is true, but ema is null: set the decay, such as ema=0.9999")
        return self

    def schedule(self, batch_size: int) -> Schedule:
        """The learning-rate function of steps with a global batch of `batch_size` images; of `auto`, which a
        run has chosen before it starts, that of the first choice."""
        base_lr = self.auto_lrs[0] if self.base_lr == "auto" else self.base_lr
        return Schedule(
            peak=base_lr * batch_size / 256,
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


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the weights.

    For a parameter w of two or more dimensions, with gradient g: u = g + weight_decay * w, scaled by
    trust_coefficient * |w| / |u|, or by 1 where one of the norms is 0. One-dimensional parameters are
    neither decayed nor scaled: u = g. Then v = momentum * v + u and w = w - lr * v, with v = 0 at first.

    timm's `Lars` scales only where weight_decay > 0, or with `always_adapt` one-dimensional parameters
    too, and divides by |g| + weight_decay * |w| + eps.

    Args:
        params: parameters or groups of them; a group may have its own `lr` and other settings.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: >= 0.
        trust_coefficient: > 0.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient if parameter.ndim <= 1 else _scaled(parameter, gradient, group)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(velocity, alpha=-group["lr"])


def _scaled(parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    update = gradient.add(parameter, alpha=group["weight_decay"])
    size, change = parameter.norm(), update.norm()
    # On the device, without waiting for it: the quotient that is not taken may be infinite.
    ratio = torch.where(
        (size > 0) & (change > 0), group["trust_coefficient"] * size / change, torch.ones_like(size)
    )
    return update.mul_(ratio)
