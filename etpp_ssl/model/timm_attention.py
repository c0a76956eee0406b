"""timm's self-attention with the kernel of choice in training.

Legend: B batch, N tokens, H heads, D head width, E = H D.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.model.attention import AttentionName, CrossAttention, choose_kernel, unfused_attention


class SelfAttention(Attention):
    """timm's attention, which in training takes the kernel of choice; in evaluation it is timm's to the bit.

    Query norms, gates and attention dropout are left to timm altogether. `use_attention` makes them.
    """

    kernel: AttentionName

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, E) to (B, N, E); further arguments, such as a mask, are timm's."""
        # timm's blocks hand on a mask that is None, under names that differ between its versions.
        no_mask = all(value is None or value is False for value in (*args, *kwargs.values()))
        if not self.training or not no_mask or not self._has_no_extras():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        qkv = self.qkv(x)
        if choose_kernel(self.kernel, qkv.device.type, qkv.dtype, qkv.shape[1]).fused:
            q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
            mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        else:
            mixed = unfused_attention(qkv, self.num_heads)
        return self.proj_drop(self.proj(mixed))  # type: ignore[no-any-return]

    def _has_no_extras(self) -> bool:
        norms = (self.q_norm, self.k_norm, getattr(self, "norm", nn.Identity()))
        identity = all(isinstance(norm, nn.Identity) for norm in norms)
        return identity and self.attn_drop.p == 0 and getattr(self, "gate", None) is None


def use_attention(module: nn.Module, kernel: AttentionName) -> None:
    """Let every plain attention below `module` take this kernel in training.

    timm's modules change their class in place, as `torch.nn.utils.parametrize` does it: parameters, their
    names and hooks stay, so that timm builds the networks and loads the weights.
    """
    for attention in module.modules():
        if type(attention) is Attention:
            attention.__class__ = SelfAttention
        if isinstance(attention, SelfAttention | CrossAttention):
            attention.kernel = kernel
