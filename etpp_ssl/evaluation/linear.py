"""Linear probe in the protocol of MAE (He et al., CVPR 2022, Appendix A.1), as in its published code.

A linear classifier behind a BatchNorm without affine, trained by LARS on augmented views of the frozen
encoder's features. What differs from that code: the BatchNorm sees the global batch where MAE's sees the
512 images of a GPU, so that the result does not depend on the number of processes; its running statistics
begin with an average of the first batches (no difference after MAE's 7,020 steps); and the number given is
the last epoch's, where MAE prints the best of all epochs on the test set.

Legend: B global batch, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import Interrupted, UserError, may_change, may_change_on_resume
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.views import ProbeView
from etpp_ssl.evaluation.base import LabelledImages, ProbeContext
from etpp_ssl.evaluation.classification import accuracy
from etpp_ssl.evaluation.feature_cache import state_key
from etpp_ssl.evaluation.features import Pool, evaluating, gather_rows, num_features, pooled_features
from etpp_ssl.evaluation.training import (
    EpochSteps,
    HeadConfig,
    ProbeState,
    epoch_steps,
    evaluated,
    frozen,
    training_batches,
)
from etpp_ssl.optim.lars import Lars
from etpp_ssl.randomness import keyed_torch


class LinearConfig(HeadConfig):
    """Linear probe of the encoder as it stands; the defaults are MAE's for ViT-B (50 epochs for L and H)."""

    name: Literal["linear"] = "linear"
    epochs: int = Field(default=90, ge=1)
    """Passes over the training images."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Epochs over which the learning rate rises linearly from 0; then a cosine to 0."""
    base_lr: float = Field(default=0.1, gt=0)
    """Peak learning rate of LARS per 256 images of the batch."""
    batch_size: int = Field(default=16384, ge=2)
    """Images per step over all processes, at most the training set; what an epoch leaves over is dropped.
    The head sees the whole batch at once."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of the head's weights."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop, which is drawn once and cut to the picture."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of LARS."""
    pool: Pool | None = None
    """cls token or mean of the patch tokens; None is the encoder's own: the token where it has one."""
    save_minutes: float = may_change(10.0, gt=0)
    """Between two writings of the state that `etpp probe` resumes from after an interruption."""

    def build(self, context: ProbeContext) -> LinearProbe:
        """The probe.

        Raises:
            UserError: if there is no evaluation split, there are no labels, or too few images.
        """
        return LinearProbe(self, context)


class LinearHead(nn.Module):
    """BatchNorm without affine, then a linear layer with weights normal(0.01) and bias 0.

    Args:
        width: D.
        num_classes: number of outputs.
        seed: of the weights.
    """

    def __init__(self, width: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        # Without its own initialisation, which would draw from the global generator.
        self.linear = nn.utils.skip_init(nn.Linear, width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01, generator=keyed_torch(seed, "linear-head"))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """float32 (B, D) to logits (B, classes)."""
        logits: Tensor = self.linear(self.norm(features))
        return logits


class LinearProbe:
    """See `Probe`; yields `linear_top1` and `linear_macro_top1` in per cent, with more than five classes
    `linear_top5`, and the mean cross-entropy `linear_loss`, all on the evaluation images after the last
    epoch."""

    def __init__(self, config: LinearConfig, context: ProbeContext) -> None:
        self.config = config
        self.context = context
        self.images = LabelledImages.open(context, config.name).drawn(config, context.seed)
        self.evaluation = self.images.evaluation
        self.plan = epoch_steps(context, len(self.images.train), config.batch_size, config.epochs)
        self.schedule = config.schedule(self.plan.batch_size)

    def run(self, model: nn.Module) -> dict[str, float]:
        """Train a head from scratch, or resume an interrupted probe of the same encoder."""
        device = self.context.accelerator.device
        encoder: Any = model.encoder
        with evaluating(model):
            head = LinearHead(num_features(encoder), self.images.num_classes, self.context.seed)
            head.to(device)
            optimizer = Lars(
                head.parameters(), momentum=self.config.momentum, weight_decay=self.config.weight_decay
            )
            state = ProbeState(self._state_file(encoder), head, optimizer)
            self._train(encoder, head, state)
            numbers = self._evaluate(encoder, head.eval())
        self.context.accelerator.wait_for_everyone()
        if self.context.accelerator.is_main_process:
            state.remove()
        return numbers

    def _train(self, encoder: nn.Module, head: LinearHead, state: ProbeState) -> None:
        optimizer, plan = state.optimizer, self.plan
        steps = range(state.load(), plan.num_steps)
        report = _Report(self.context, plan, steps.start)
        saved = time.monotonic()
        with self.context.stop_signal() as signal, closing(self._features(encoder, steps)) as batches:
            for step, (features, labels) in zip(steps, batches, strict=True):
                lr = self.schedule(step / plan.num_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # A plain average of the first ten batches: torch's own start, mean 0 and variance 1, would
                # still show after a hundred steps where features vary little.
                head.norm.momentum = max(0.1, 1 / (step + 1))
                loss = F.cross_entropy(head(features), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                report.step_done(step + 1, loss.detach(), lr)
                signum = signal()
                due = time.monotonic() - saved >= 60 * self.config.save_minutes
                # All processes hold the same state.
                if (signum or due) and self.context.accelerator.is_main_process:
                    try:
                        state.save(step + 1)
                    except UserError as error:
                        if signum:
                            raise
                        self.context.say(f"warning: {error}; the probe continues")
                    saved = time.monotonic()
                if signum and state.file is not None:
                    raise Interrupted(signum, step + 1)

    def _features(self, encoder: nn.Module, steps: range) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Features float32 (B, D) and labels (B,) of each step's global batch, on every process.

        They are small, so every process takes the whole step: gradients need no exchange, and one process
        does what many do.
        """
        context, config = self.context, self.config
        view = ProbeView(context.view.image_size, config.crop_scale, config.flip, context.seed)
        forward = partial(pooled_features, encoder, pool=config.pool)
        features: list[Tensor] = []
        labels: list[Tensor] = []
        batch: Batch
        for batch in training_batches(
            context, self.images.train, view, self.plan, steps, config.micro_batch_size
        ):
            features.append(frozen(context, forward, batch.images))
            labels.append(batch.labels)
            if batch.request.last:
                yield (
                    gather_rows(torch.cat(features), context.accelerator),
                    gather_rows(torch.cat(labels), context.accelerator),
                )
                features, labels = [], []

    @torch.no_grad()
    def _evaluate(self, encoder: nn.Module, head: nn.Module) -> dict[str, float]:
        context = self.context
        forward = partial(pooled_features, encoder, pool=self.config.pool)
        # Losses, and rows of the true class and its rank: 0 where it is the first.
        device = context.accelerator.device
        losses, ranks = [torch.empty(0, device=device)], [torch.empty(0, 2, dtype=torch.int64, device=device)]
        for features, labels in evaluated(
            context, self.images.evaluation, forward, self.config.micro_batch_size
        ):
            logits = head(features)
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            order = logits.argsort(dim=1, descending=True, stable=True)
            ranks.append(torch.stack([labels, (order == labels[:, None]).int().argmax(dim=1)], dim=1))
        loss = gather_rows(torch.cat(losses), context.accelerator)
        true, rank = gather_rows(torch.cat(ranks), context.accelerator).unbind(dim=1)
        if not len(rank):
            raise UserError("probe=linear: none of the evaluation images can be read")
        numbers = accuracy("linear_", rank < 1, true)
        if self.images.num_classes > 5:
            numbers["linear_top5"] = 100.0 * (rank < 5).double().mean().item()
        return {**numbers, "linear_loss": loss.double().mean().item()}

    def _state_file(self, encoder: nn.Module) -> Path | None:
        context, config = self.context, self.config
        if context.folder is None:
            return None
        protocol = {key: value for key, value in config if not may_change_on_resume(LinearConfig, key)}
        black = torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=context.accelerator.device)
        key = state_key(
            encoder,
            protocol=protocol,
            seed=context.seed,
            precision=context.accelerator.mixed_precision,
            image_size=context.view.image_size,
            normalised=[context.normalise(shade).flatten().tolist() for shade in (black, black + 255)],
            images=self.images.train.fingerprint(),
        )
        return context.folder / f"linear_probe-{key}.safetensors"


class _Report:
    """Says how each epoch went, and stops a probe whose loss is not finite."""

    def __init__(self, context: ProbeContext, plan: EpochSteps, first_step: int) -> None:
        self.context = context
        self.plan = plan
        self.first_step = first_step
        self.start = time.monotonic()
        if first_step:
            context.say(f"the linear probe resumes after step {first_step} of {plan.num_steps}")

    def step_done(self, step: int, loss: Tensor, lr: float) -> None:
        """Record that `step` steps are done."""
        epoch, rest = divmod(step, self.plan.per_epoch)
        if rest:
            return
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the linear probe's loss is {value} after epoch {epoch}: lower probe.base_lr, or use "
                f"precision=fp32 if the encoder's features overflow"
            )
        per_step = (time.monotonic() - self.start) / (step - self.first_step)
        left = (self.plan.num_steps - step) * per_step / 60
        self.context.say(
            f"epoch {epoch} of {self.plan.epochs}: loss {value:.4f}, lr {lr:.4g}, "
            f"{self.plan.batch_size / per_step:,.0f} images/s, {left:,.0f} minutes left"
        )
