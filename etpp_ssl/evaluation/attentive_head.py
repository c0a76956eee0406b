"""The head of the attentive probe: one learned query that attends to an image's patch tokens.

Legend: B batch, N tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from einops import rearrange
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from etpp_ssl.randomness import keyed_torch


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


class SharedQueryPool(AttentionPoolLatent):
    """timm's `AttentionPoolLatent` without output projection and MLP, computed in another order.

    The query is the same for all images, so the key projection can be applied to it instead of to the
    tokens, and the value projection to the pooled tokens instead of to each: D * D operations per token
    become H * D. The key's bias adds the same to all scores of a head, which the softmax removes.

    Args:
        width: D.
        num_heads: H, a divisor of D.
        seed: of the query and the projections, each uniform or normal with variance 1 / D.
    """

    def __init__(self, width: int, num_heads: int, seed: int) -> None:
        super().__init__(width, out_features=0, num_heads=num_heads)
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
        query_HD = (query_Hd[:, None] @ key_HdD)[:, 0] * self.scale
        scores_BHN = query_HD @ tokens_BND.mT
        pooled_BHD = scores_BHN.softmax(dim=-1) @ tokens_BND
        value_HDd = rearrange(value, "(H d) D -> H D d", H=self.num_heads)
        values_HBd = rearrange(pooled_BHD, "B H D -> H B D") @ value_HDd
        bias = self.kv.bias.chunk(2)[1]
        pooled: Tensor = rearrange(values_HBd, "H B d -> B (H d)") + bias
        return pooled
