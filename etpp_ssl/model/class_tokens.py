"""Several class tokens, pooled by their mean (Pixio, arXiv 2512.15715), in timm's VisionTransformer.

timm has one `cls_token` (1, 1, D) and behind it any number of `reg_token` (1, R, D), each with a row of
`pos_embed`. The first class token is stored as the one, the others as the first of the registers, so that
stock timm builds the network and loads it. Only their pooling is ours: timm's takes the first token alone.

Legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from etpp_ssl.config import UserError


class SeveralClassTokens(VisionTransformer):
    """A VisionTransformer whose token pooling is the mean of its class tokens; see `pool_class_tokens`."""

    num_class_tokens: int

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(B, N, D) to (B, D); other poolings are timm's."""
        if (pool_type or self.global_pool) == "token":
            return x[:, : self.num_class_tokens].mean(dim=1)
        return super().pool(x, pool_type)  # type: ignore[no-any-return]


def pool_class_tokens(net: nn.Module, number: int | None) -> None:
    """Let a network pool its first prefix tokens by their mean; None and 1 leave timm's pooling.

    The module changes its class in place, as `torch.nn.utils.parametrize` does: names and hooks stay.

    Args:
        net: built by arguments that went through `with_class_tokens`.
        number: of class tokens.

    Raises:
        UserError: if the network cannot have so many.
    """
    if number is None or number == 1:
        return
    held = int(net.num_prefix_tokens) if isinstance(net, VisionTransformer) else 0
    if not 1 < number <= held:
        raise UserError(f"class_tokens is {number!r}, and the {type(net).__name__} has {held} prefix tokens")
    net.__class__ = SeveralClassTokens
    net.num_class_tokens = number  # type: ignore[assignment]


def num_class_tokens(net: nn.Module) -> int:
    """How many class tokens a network pools by their mean; 1 where it is as timm has it."""
    return net.num_class_tokens if isinstance(net, SeveralClassTokens) else 1


def with_class_tokens(dims: dict[str, Any], named: Any, name: str) -> dict[str, Any]:
    """timm's arguments of a ViT's dimensions, `class_tokens` written as a class token and registers.

    Args:
        dims: by the keys of `etpp_ssl.model.encoders.VIT_DIMS`.
        named: timm's network of that name, which has what `dims` leave out.
        name: of the model, for messages.

    Raises:
        UserError: for class tokens of a network that cannot have them.
    """
    if "class_tokens" not in dims:
        return dims
    rest = {key: value for key, value in dims.items() if key != "class_tokens"}
    number = dims["class_tokens"]
    reason = None
    if not isinstance(named, VisionTransformer):
        reason = f"{name} is a {type(named).__name__}, and only Vision Transformers have class tokens"
    elif rest.get("class_token") is False:
        reason = "model.class_token is false; leave one of them out"
    elif number > 1 and named.no_embed_class:
        reason = (
            f"{name} keeps no positions for prefix tokens, and each class token has one of its own; take a "
            f"model that does, such as vit_base_patch16_224"
        )
    if reason is not None:
        raise UserError(f"model.class_tokens is {number}, but {reason}")
    registers = rest.get("reg_tokens", named.num_reg_tokens)
    return {**rest, "class_token": True, "reg_tokens": number - 1 + registers}
