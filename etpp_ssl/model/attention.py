"""Kernels of attention in training, and how transformer blocks are run: plainly, recomputed or compiled.

The kernel is the one that is fastest on the device; the results differ by rounding.

Legend: B batch, H heads, N tokens, M query tokens, D head width or width of a block, E = H D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from etpp_ssl import moved

AttentionName = Literal["auto", "fused", "unfused"]

FLOAT32_UNFUSED_TOKENS = 64
"""Most tokens for which a CPU takes the unfused kernel in float32. Measured on whole steps
(`tools/bench_step.py --attention fused,unfused`): with AVX2 it saved 11 to 16 % at 5 to 37 tokens, with
AVX-512 nothing; at 197 tokens it cost 6 %."""
UNFUSED_TOKENS = 1024
"""Most tokens for which `auto` keeps attention matrices: larger ones need more memory than activations."""


MAX_COMPILED_SHAPES = 32
"""Most numbers of tokens that blocks are compiled for in a run; each takes seconds to minutes."""
GRAPHS_PER_SHAPE = 6
"""Graphs of one: of encoder and decoder, for whole micro-batches, the last one of a batch, and evaluation."""


def is_fused(name: AttentionName, device: str, dtype: torch.dtype, num_tokens: int) -> bool:
    """The attention kernel to use: torch's `scaled_dot_product_attention` (fused) or plain products.

    Args:
        name: "fused" or "unfused" take that one; "auto" chooses by what was measured.
        device: its type, such as "cpu" or "cuda".
        dtype: of queries, keys and values.
        num_tokens: N.
    """
    if name != "auto":
        return name == "fused"
    if device != "cpu" or num_tokens > UNFUSED_TOKENS:
        return True
    # The fused backward pass is slow in half precision on a CPU.
    return dtype == torch.float32 and num_tokens > FLOAT32_UNFUSED_TOKENS


class CrossAttention(nn.Module):
    """Multi-head attention whose keys and values come from other tokens, at their width.

    Args:
        width: E, of queries and output.
        memory_width: of the tokens that keys and values are made of.
        num_heads: H.
    """

    kernel: AttentionName = "auto"

    def __init__(self, width: int, memory_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, M, E) and (B, N, memory_width) to (B, M, E)."""
        q = rearrange(self.q(queries), "b m (h d) -> b h m d", h=self.num_heads)
        k, v = rearrange(self.kv(memory), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        longest = max(queries.shape[1], memory.shape[1])
        if is_fused(self.kernel, q.device.type, q.dtype, longest):
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1) @ v
        result: Tensor = self.proj(rearrange(mixed, "b h m d -> b m (h d)"))
        return result


def unfused_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V by plain batched products.

    Equal to `scaled_dot_product_attention` up to rounding. Keeps the attention matrices, (B, H, N, N),
    for the backward pass, which is written out: it fills one gradient of the packed input in place of
    three that autograd would have to bring together.

    Args:
        qkv: (B, N, 3 E), queries, keys and values packed as timm's `qkv` layer gives them.
        num_heads: H.

    Returns:
        (B, N, E), of the type of `qkv`.
    """
    mixed: Tensor = _Unfused.apply(qkv, num_heads)
    return mixed


class _Unfused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        packed = rearrange(qkv, "b n (three h d) -> three (b h) n d", three=3, h=num_heads)
        q, k, v = packed
        # CUDA's autocast would return float32, which the backward pass cannot multiply with the rest.
        weights = _scaled_product(q, k.transpose(1, 2)).softmax(dim=-1, dtype=q.dtype)
        ctx.save_for_backward(packed, weights)
        ctx.num_heads = num_heads
        mixed: Tensor = rearrange(weights @ v, "(b h) n d -> b n (h d)", h=num_heads)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packed, weights = ctx.saved_tensors
        q, k, v = packed
        gradient = rearrange(gradient, "b n (h d) -> (b h) n d", h=ctx.num_heads)
        of_packed = torch.empty_like(packed)
        of_q, of_k, of_v = of_packed
        torch.bmm(weights.transpose(1, 2), gradient, out=of_v)
        of_weights = gradient @ v.transpose(1, 2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        _scaled_product(of_scores, k, out=of_q)
        _scaled_product(of_scores.transpose(1, 2), q, out=of_k)
        return rearrange(of_packed, "three (b h) n d -> b n (three h d)", h=ctx.num_heads), None


def _scaled_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b / sqrt(D) in one pass, D the width of queries and keys."""
    width = a.shape[-1] if out is None else b.shape[-1]
    # With beta = 0 the addend is not read.
    addend = a.new_empty(1) if out is None else out
    return torch.baddbmm(addend, a, b, beta=0, alpha=width**-0.5, out=out)


if not TYPE_CHECKING:
    __getattr__ = moved.names_of("model.attention")


@dataclass(frozen=True)
class BlockRunner:
    """How transformer blocks are run in training; no choice changes a result beyond rounding.

    Args:
        grad_checkpointing: recompute each block in the backward pass.
        compiled: run blocks through `torch.compile`. All blocks of one kind share a graph, so each number of
            tokens compiles one for the encoder and one for the decoder; `ModelConfig.check_compiled` bounds
            how many there are in a run.
    """

    grad_checkpointing: bool = False
    compiled: bool = False

    def __call__(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`: tokens (B, N, D), and what else the block reads, to tokens (B, N, D)."""
        run = compiled_call() if self.compiled else call_block
        if self.grad_checkpointing:
            output: Tensor = checkpoint(run, block, *inputs, use_reentrant=False)
            return output
        return run(block, *inputs)


def call_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    """The plain call, through the module, so that hooks such as FSDP's run."""
    output: Tensor = block(*inputs)
    return output


@cache
def compiled_call() -> Callable[..., Tensor]:
    """`call_block` through `torch.compile`, one function for all blocks of the process."""
    # All graphs belong to one function, and torch stops compiling it beyond a limit of 8 by default.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_SHAPE * MAX_COMPILED_SHAPES)
    # Shapes change only between stages; torch's default would make the second stage's graph dynamic.
    return torch.compile(call_block, dynamic=False)


PLAIN = BlockRunner()
"""Blocks as they are."""
