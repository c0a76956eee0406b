"""The learning rate as a pure function of the share of compute spent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn

from etpp_ssl.config import Config
from etpp_ssl.optim.groups import weight_decay_groups


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
