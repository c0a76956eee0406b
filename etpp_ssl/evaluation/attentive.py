"""Attentive probe: one cross-attention pooling layer and a linear classifier on frozen patch tokens.

A masked autoencoder never trains its cls token on anything, and what it knows about an image lies in the
patch tokens; a learned query finds it there (as in V-JEPA, Bardes et al. 2024, and CAPI, Darcet et al.
2025, whose attentive probes differ in detail). The settings are fixed, no images are used to choose any.

Legend: B batch, N tokens, D width, H heads, d = D / H, n images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import psutil
import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import UserError
from etpp_ssl.data.sampler import KeyedOrder, process_part
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.views import ProbeView
from etpp_ssl.evaluation.base import LabelledImages, ProbeContext
from etpp_ssl.evaluation.classification import accuracy
from etpp_ssl.evaluation.features import evaluating, gather_rows
from etpp_ssl.evaluation.training import (
    EpochSteps,
    HeadConfig,
    epoch_steps,
    evaluated,
    frozen,
    training_batches,
)
from etpp_ssl.optim.groups import parameter_groups
from etpp_ssl.randomness import keyed_torch


class AttentiveConfig(HeadConfig):
    """Attentive probe of the encoder as it stands: unmasked, at full resolution, in eval mode."""

    name: Literal["attentive"] = "attentive"
    epochs: int = Field(default=20, ge=1)
    """Passes over the training images."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Epochs over which the learning rate rises linearly from 0; then a cosine to 0."""
    base_lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW per 256 images of the batch."""
    batch_size: int = Field(default=256, ge=2)
    """Images per step over all processes, at most the training set; what an epoch leaves over is dropped."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of the head's weight matrices and its query."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Without `cache`: area range of the random resized crop."""
    flip: bool = True
    """Without `cache`: mirror half of the training images."""
    num_heads: int | None = Field(default=None, ge=1)
    """Heads of the pooling layer; None takes the encoder's."""
    cache: bool = True
    """True: the training images are seen in the evaluation view, and their tokens computed once and kept in
    memory, in bf16: 2 * n * N * D bytes over all processes (CIFAR-10, 64 tokens of width 128: 0.8 GB).
    False: augmented views, computed anew every epoch."""

    def build(self, context: ProbeContext) -> AttentiveProbe:
        """The probe.

        Raises:
            UserError: if there is no evaluation split, there are no labels, or too few images.
        """
        return AttentiveProbe(self, context)


class _Part(NamedTuple):
    """Some images of a step, on this process: tokens (B, N, D) and labels (B,)."""

    step: int
    tokens: Tensor
    labels: Tensor


class AttentiveProbe:
    """See `Probe`; yields `attentive_top1` and `attentive_macro_top1` in per cent, on the evaluation images
    after the last epoch."""

    def __init__(self, config: AttentiveConfig, context: ProbeContext) -> None:
        self.config = config
        self.context = context
        self.images = LabelledImages.open(context, config.name).drawn(config, context.seed)
        self.evaluation = self.images.evaluation

    def run(self, model: nn.Module) -> dict[str, float]:
        """Train a head from scratch and evaluate it."""
        predicted, labels = self.predicted(model, self.fit(model), self.images.evaluation)
        return accuracy("attentive_", predicted == labels, labels)

    def fit(self, model: nn.Module) -> AttentiveHead:
        """Train a head from scratch."""
        config, context = self.config, self.context
        encoder: Any = model.encoder
        width = int(encoder.num_features)
        num_heads = config.num_heads or heads_of(encoder)
        if width % num_heads:
            raise UserError(f"probe.num_heads is {num_heads}: use a divisor of the encoder's width {width}")
        head = AttentiveHead(width, num_heads, self.images.num_classes, context.seed)
        head.to(context.accelerator.device)
        with evaluating(model):
            if config.cache:
                cache = TokenCache(context, encoder, self.images.train, config.micro_batch_size)
                plan = epoch_steps(context, cache.num_images, config.batch_size, config.epochs)
                self._train(head, plan, self._cached(cache, plan))
            else:
                plan = epoch_steps(context, len(self.images.train), config.batch_size, config.epochs)
                self._train(head, plan, self._computed(encoder, plan))
        return head

    def _train(self, head: AttentiveHead, plan: EpochSteps, parts: Iterable[_Part]) -> None:
        config = self.config
        schedule = config.schedule(plan.batch_size)
        groups = parameter_groups(head, weight_decay=config.weight_decay, decay_tokens=True)
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        for step, here in groupby(parts, key=lambda part: part.step):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step / plan.num_steps)
            optimizer.zero_grad()
            for part in here:
                loss = F.cross_entropy(head(part.tokens), part.labels, reduction="sum") / plan.batch_size
                loss.backward()
            if self.context.accelerator.num_processes > 1:
                self._sum_gradients(head)
            optimizer.step()
        if not all(parameter.isfinite().all() for parameter in head.parameters()):
            raise UserError("the attentive probe's weights are not finite: lower probe.base_lr")

    def _sum_gradients(self, head: nn.Module) -> None:
        """Over the processes; one that has no image of the step adds zeros."""
        gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        total = self.context.accelerator.reduce(flat, reduction="sum")
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _computed(self, encoder: nn.Module, plan: EpochSteps) -> Iterator[_Part]:
        """Augmented views, through the encoder anew in every epoch."""
        context, config = self.context, self.config
        view = ProbeView(context.view.image_size, config.crop_scale, config.flip, context.seed)
        steps = range(plan.num_steps)
        for batch in training_batches(context, self.images.train, view, plan, steps, config.micro_batch_size):
            tokens = frozen(context, partial(patch_tokens, encoder), batch.images)
            yield _Part(batch.request.step, tokens, batch.labels)

    def _cached(self, cache: TokenCache, plan: EpochSteps) -> Iterator[_Part]:
        """Of each step's images, those whose tokens this process keeps."""
        order = KeyedOrder(plan.num_images, self.context.seed)
        for step in range(plan.num_steps):
            yield _Part(step, *cache.take([order.index(position) for position in plan(step).samples]))

    @torch.no_grad()
    def predicted(self, model: nn.Module, head: AttentiveHead, source: ImageSource) -> tuple[Tensor, Tensor]:
        """Predicted classes and labels of a source's readable images, int64 (n,) each, of all processes.

        Raises:
            UserError: if none can be read.
        """
        context = self.context
        answers = [torch.empty(0, 2, dtype=torch.int64, device=context.accelerator.device)]
        encoder: Any = model.encoder
        with evaluating(model):
            for tokens, labels in evaluated(
                context, source, partial(patch_tokens, encoder), self.config.micro_batch_size
            ):
                answers.append(torch.stack([head(tokens).argmax(dim=1), labels], dim=1))
        rows = gather_rows(torch.cat(answers), context.accelerator)
        if not len(rows):
            raise UserError("probe=attentive: none of the evaluation images can be read")
        return rows[:, 0], rows[:, 1]


class AttentiveHead(nn.Module):
    """Pooling, LayerNorm, linear classifier that starts at zero.

    Args:
        width: D.
        num_heads: of the pooling layer.
        num_classes: number of outputs.
        seed: of the pooling layer.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.pool = SharedQueryPool(width, num_heads, seed)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.utils.skip_init(nn.Linear, width, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """float (B, N, D) to logits (B, classes)."""
        logits: Tensor = self.linear(self.norm(self.pool(tokens_BND.float())))
        return logits


class SharedQueryPool(nn.Module):
    """timm's `AttentionPoolLatent` without output projection and MLP, computed in another order.

    The query is the same for all images, so the key projection can be applied to it instead of to the
    tokens, and the value projection to the pooled tokens instead of to each: D * D operations per token
    become H * D. The key's bias adds the same to all scores of a head, which the softmax removes.

    Args:
        width: D.
        num_heads: H, a divisor of D.
        seed: of the query and the projections' weights, each normal with variance 1 / D; biases are 0.
    """

    def __init__(self, width: int, num_heads: int, seed: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.utils.skip_init(nn.Linear, width, width)
        self.kv = nn.utils.skip_init(nn.Linear, width, 2 * width)
        generator = keyed_torch(seed, "attentive-pool")
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=width**-0.5, generator=generator)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        key, value = self.kv.weight.chunk(2)
        query_Hd = rearrange(self.q(self.latent), "1 1 (H d) -> H d", H=self.num_heads)
        key_HdD = rearrange(key, "(H d) D -> H d D", H=self.num_heads)
        query_HD = (query_Hd[:, None] @ key_HdD)[:, 0] * query_Hd.shape[1] ** -0.5
        scores_BHN = query_HD @ tokens_BND.mT
        pooled_BHD = scores_BHN.softmax(dim=-1) @ tokens_BND
        value_HDd = rearrange(value, "(H d) D -> H D d", H=self.num_heads)
        values_HBd = rearrange(pooled_BHD, "B H D -> H B D") @ value_HDd
        pooled: Tensor = rearrange(values_HBd, "H B d -> B (H d)") + self.kv.bias.chunk(2)[1]
        return pooled


def patch_tokens(encoder: Any, images: Tensor) -> Tensor:
    """What a timm network's `forward_features` gives, without prefix tokens: (B, C, H, W) to (B, N, D)."""
    tokens: Tensor = encoder.forward_features(images)
    if tokens.ndim == 4:
        channels_last = getattr(encoder, "output_fmt", "NCHW") == "NHWC"
        return tokens.flatten(1, 2) if channels_last else tokens.flatten(2).mT
    return tokens[:, getattr(encoder, "num_prefix_tokens", 0) :]


def heads_of(encoder: Any) -> int:
    """Heads of an encoder's last attention layer; of one without any, one for each 64 features."""
    found = [int(m.num_heads) for m in encoder.modules() if hasattr(m, "num_heads")]
    return found[-1] if found else max(1, encoder.num_features // 64)


class TokenCache:
    """bf16 patch tokens of this process's part of a source: each readable image once, in the evaluation view.

    Args:
        context: the run.
        encoder: in eval mode.
        source: labelled images.
        micro_batch_size: images per forward pass.

    Raises:
        UserError: if the tokens do not fit into half of the device's memory.
    """

    def __init__(
        self, context: ProbeContext, encoder: Any, source: ImageSource, micro_batch_size: int
    ) -> None:
        accelerator = context.accelerator
        device = accelerator.device
        part = process_part(range(len(source)), accelerator.process_index, accelerator.num_processes)
        self._tokens = torch.empty(0, 1, encoder.num_features, dtype=torch.bfloat16, device=device)
        labels = [torch.empty(0, dtype=torch.int64, device=device)]
        count = 0
        for tokens, labels_here in evaluated(
            context, source, partial(patch_tokens, encoder), micro_batch_size
        ):
            if count == 0:
                shape = (len(part), *tokens.shape[1:])
                _check_memory(shape, accelerator.num_processes, device)
                # Filled in place: pieces and their concatenation would take twice the memory.
                self._tokens = torch.empty(shape, dtype=torch.bfloat16, device=device)
            self._tokens[count : count + len(tokens)] = tokens
            labels.append(labels_here)
            count += len(tokens)
        self._labels = torch.cat(labels)
        counts = gather_rows(torch.tensor([count], device=device), accelerator).tolist()
        self._first = sum(counts[: accelerator.process_index])
        self.num_images = sum(counts)
        """Over all processes."""

    def take(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Of some images, by number over all processes, those that are kept here.

        Returns:
            bf16 (B, N, D) and labels int64 (B,); B may be 0.
        """
        rows = [index - self._first for index in indices]
        here = torch.tensor([row for row in rows if 0 <= row < len(self._labels)], dtype=torch.int64)
        here = here.to(self._labels.device)
        return self._tokens[here], self._labels[here]


def _check_memory(shape: tuple[int, ...], num_processes: int, device: torch.device) -> None:
    images, tokens, width = shape
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = psutil.virtual_memory().total // num_processes
    needed = 2 * images * tokens * width
    if needed > memory / 2:
        raise UserError(
            f"probe.cache keeps {tokens} tokens of width {width} for {images:,} images, {needed / 1e9:,.1f} "
            f"GB in each process, more than half of its {memory / 1e9:,.1f} GB: use probe.cache=false, or a "
            f"smaller probe.num_train"
        )
