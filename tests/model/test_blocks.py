"""Running blocks: compiled or recomputed, they give what they give when they are called."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from etpp_ssl.model.attention import BlockRunner, call_block
from etpp_ssl.model.timm_layers import use_attention


def outcome(block: nn.Module, tokens: Tensor, run: BlockRunner | None) -> tuple[Tensor, list[Tensor]]:
    block.zero_grad()
    out = block(tokens) if run is None else run(block, tokens)
    out.square().mean().backward()
    return out.detach(), [p.grad.clone() for p in block.parameters() if p.grad is not None]


@pytest.mark.parametrize("kernel", ["fused", "unfused"])
def test_recomputation_changes_no_bit(kernel: str) -> None:
    torch.manual_seed(1)
    block, tokens = Block(12, 3, qkv_bias=True), torch.randn(2, 7, 12)
    use_attention(block, kernel)  # type: ignore[arg-type]
    out, gradients = outcome(block, tokens, BlockRunner(grad_checkpointing=True))
    expected, of_call = outcome(block, tokens, None)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_call, strict=True))


def test_blocks_of_a_kind_share_one_graph_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call_block, dynamic=False, backend=backend)
    monkeypatch.setattr("etpp_ssl.model.attention._compiled", lambda: compiled)
    run = BlockRunner(compiled=True)
    torch.manual_seed(0)
    blocks = [Block(12, 3, qkv_bias=True) for _ in range(3)]
    for block in blocks:
        use_attention(block, "unfused")
    for length, expected in [(5, 1), (9, 2), (5, 2)]:
        for block in blocks:
            tokens = torch.randn(2, length, 12)
            (out, gradients), (plain, of_plain) = (outcome(block, tokens, r) for r in (run, None))
            torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradients, of_plain, rtol=1e-4, atol=1e-5)
        assert len(graphs) == expected
