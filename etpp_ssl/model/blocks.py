"""Running timm's transformer blocks in pre-training: recomputed in the backward pass, or compiled.

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
    """How a stack of blocks is run; no choice changes a result beyond rounding.

    Args:
        grad_checkpointing: recompute each block in the backward pass.
        compiled: run blocks through `torch.compile`. All blocks of one kind share a graph, so a stage
            compiles one for the encoder and one for the decoder.
    """

    grad_checkpointing: bool = False
    compiled: bool = False

    def __call__(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`: tokens, (B, N, D) to (B, N, D), and what else a block reads."""
        run = _compiled() if self.compiled else call_block
        if self.grad_checkpointing:
            output: Tensor = checkpoint(run, block, *inputs, use_reentrant=False)
            return output
        return run(block, *inputs)


def call_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    """The plain call, through the module, so that hooks (FSDP's among them) see it."""
    output: Tensor = block(*inputs)
    return output


@cache
def _compiled() -> Callable[..., Tensor]:
    # Shapes change with the stage only; torch's default would make the second stage's graph dynamic.
    return torch.compile(call_block, dynamic=False)
