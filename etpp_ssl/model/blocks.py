"""How transformer blocks are run in training: plainly, recomputed in the backward pass, or compiled.

Legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class BlockRunner:
    """How transformer blocks are run in training; no choice changes a result beyond rounding.

    Args:
        grad_checkpointing: recompute each block in the backward pass.
        compiled: run blocks through `torch.compile`. All blocks of one kind share a graph, so each stage
            compiles one for the encoder and one for the decoder.
    """

    grad_checkpointing: bool = False
    compiled: bool = False

    def __call__(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`: tokens (B, N, D), and what else the block reads, to tokens (B, N, D)."""
        run = _compiled() if self.compiled else call_block
        if self.grad_checkpointing:
            output: Tensor = checkpoint(run, block, *inputs, use_reentrant=False)
            return output
        return run(block, *inputs)


def call_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    """The plain call, through the module, so that hooks such as FSDP's run."""
    output: Tensor = block(*inputs)
    return output


@cache
def _compiled() -> Callable[..., Tensor]:
    # Shapes change only between stages; torch's default would make the second stage's graph dynamic.
    return torch.compile(call_block, dynamic=False)


PLAIN = BlockRunner()
"""Blocks as they are."""
