"""What the pyramids that timm lacks, PVT and CSWin, have in common: timm's conventions for a classifier.

Legend: B batch, C channels, H, W pixels, N tokens of the last stage, P prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import global_pool_nlc, trunc_normal_
from torch import Tensor, nn

from etpp_ssl.config import UserError, as_pair, show_size
from etpp_ssl.model.attention import BlockRunner

STRIDES = (4, 8, 16, 32)
"""Pixels per token and axis in each stage, of both papers."""


def default_cfg(**changes: Any) -> dict[str, Any]:
    """What timm knows of a pyramid, without weights: the papers' evaluation at 224 pixels."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **changes,
    }


def build(model_class: type[Pyramid], name: str, pretrained: bool, **args: Any) -> Pyramid:
    """A registered pyramid, as timm builds its own.

    Raises:
        UserError: for `features_only`.
    """
    if args.get("features_only"):
        raise UserError(f"{name} gives features of its last stage only: leave features_only out")
    model: Pyramid = timm.models.build_model_with_cfg(model_class, name, pretrained, **args)
    return model


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """The probability to drop each block's branches, per stage: linear, from 0 to `last`."""
    total = sum(depths)
    rates = iter(last * block / max(total - 1, 1) for block in range(total))
    return [[next(rates) for _ in range(depth)] for depth in depths]


class Pyramid(nn.Module):
    """A classifier of four stages, at strides 4, 8, 16 and 32, with the attributes timm gives its own.

    A subclass builds its stages and calls `init_weights` at the end; it gives `forward_features`.

    Args:
        img_size: (H, W) in pixels at full resolution, or one number for both.
        in_chans: C.
        num_classes: of the head; 0 leaves it out.
        global_pool: one of the class's `pools`; the first where None.
        embed_dims: D of the four stages.
        stage_names: of the four modules that hold the stages' blocks.

    Raises:
        UserError: for a size that is not a multiple of 32, or another pooling.
    """

    pools: ClassVar[tuple[str, ...]] = ("avg", "")
    """Of the last stage's tokens: their mean, the cls token, or, for "", none at all."""
    num_prefix_tokens: ClassVar[int] = 0
    dynamic_img_size: ClassVar[bool] = True
    """timm's word for a network that takes other sizes than `img_size`."""
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str | None,
        embed_dims: Sequence[int],
        stage_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.img_size = as_pair(img_size if isinstance(img_size, int) else (img_size[0], img_size[1]))
        self.check_size(self.img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": name}
            for dim, stride, name in zip(embed_dims, STRIDES, stage_names, strict=True)
        ]
        self.grad_checkpointing = False
        self._set_pool(self.pools[0] if global_pool is None else global_pool)

    def init_weights(self) -> None:
        """As published: linear layers truncated normal(0.02) with zero biases, convolutions torch's own."""
        self.apply(_init_linear)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError for images that the strides of the stages do not divide."""
        if size[0] % STRIDES[-1] or size[1] % STRIDES[-1]:
            raise UserError(
                f"{type(self).__name__} takes images whose sides are multiples of {STRIDES[-1]} pixels, "
                f"not {show_size(size)}"
            )

    def run_blocks(self, stage: str, x: Tensor) -> Tensor:
        """Through the blocks of a stage; under gradient checkpointing recomputed in the backward pass."""
        run = BlockRunner(self.grad_checkpointing)
        for block in getattr(self, stage):
            x = run(block, x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """float (B, C, H, W) to the last stage's normed tokens, (B, P + N, D), row by row."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, P + N, D) to logits (B, num_classes), or to what the head reads, (B, D)."""
        pooled: Tensor = global_pool_nlc(x, self.global_pool, self.num_prefix_tokens)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """float (B, C, H, W), H and W multiples of 32, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give it a new head, and another pooling where one is named."""
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.norm.parameters())
        self.head = self._new_head().to(device=like.device, dtype=like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass, or stop doing so."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, beside those of one dimension."""
        return set()

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, self.num_classes)
        _init_linear(head)
        return head

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in self.pools:
            valid = ", ".join(repr(pool) for pool in self.pools)
            raise UserError(f"global_pool of {type(self).__name__} is one of {valid}, not {global_pool!r}")
        self.global_pool = global_pool


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
