"""Running blocks: compiled or recomputed, they give what they give when they are called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.model.attention import BlockRunner, compiled_call
from etpp_ssl.model.timm_net import use_attention
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.plan import plan_run


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

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled_call.cache_clear()
    run = BlockRunner(compiled=True)
    torch.manual_seed(0)
    kinds = [[Block(width, 3, qkv_bias=True) for _ in range(blocks)] for width, blocks in ((12, 3), (24, 2))]
    # Six graphs: more than the limit.
    lengths = (5, 9, 5, 10)
    try:
        # torch's default is 8, and `import timm.optim` raises it to a million.
        with torch._dynamo.config.patch(recompile_limit=4):
            for length, blocks in product(lengths, kinds):
                for block in blocks:
                    use_attention(block, "unfused")
                    tokens = torch.randn(2, length, block.norm1.weight.numel())
                    (out, gradients), (plain, of_plain) = (outcome(block, tokens, r) for r in (run, None))
                    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(gradients, of_plain, rtol=1e-4, atol=1e-5)
    finally:
        compiled_call.cache_clear()
    assert len(graphs) == 2 * len(set(lengths))


def test_a_mask_ratio_that_needs_too_many_graphs_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    large = ("image_size=64", "model.compiled=true", "curriculum=constant")
    ramp = (*large, "model.mask_ratio={start: 0.5, end: 0.75}")
    words = (
        "model.compiled is true, and the blocks would be compiled anew for 65 numbers of visible patches, "
        "more than 32; use model.compiled=false, or one model.mask_ratio in place of a start and an end"
    )
    for refusing in (open_run, plan_run):
        with pytest.raises(UserError) as refused:
            refusing(tiny_recipe(*ramp))
        assert str(refused.value) == words
    for taken in (
        [*large],
        [*ramp, "model.compiled=false"],
        [*large, "model.mask_ratio={start: 0.7, end: 0.8}"],
    ):
        recipe = tiny_recipe(*taken)
        recipe.check_curriculum(recipe.build_curriculum(64))
