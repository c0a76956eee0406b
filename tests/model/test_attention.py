"""The unfused attention against its definition, and the choice of a kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from etpp_ssl.model.attention import (
    FLOAT32_UNFUSED_TOKENS,
    UNFUSED_TOKENS,
    AttentionName,
    is_fused,
    unfused_attention,
)
from etpp_ssl.model.decoders import MAEDecoderConfig
from etpp_ssl.model.mae import ModelConfig
from etpp_ssl.model.timm_net import SelfAttention, use_attention

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (3, 10, 2, 7), (2, 37, 4, 8)]
"""(B, N, H, D)."""


def plain_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """The definition, one image and head at a time."""
    batch, length, packed = qkv.shape
    width = packed // 3 // num_heads
    q, k, v = qkv.reshape(batch, length, 3, num_heads, width).unbind(2)
    images = []
    for b in range(batch):
        heads = []
        for h in range(num_heads):
            scores = q[b, :, h] @ k[b, :, h].T / width**0.5
            heads.append(scores.softmax(dim=-1) @ v[b, :, h])
        images.append(torch.cat(heads, dim=-1))
    return torch.stack(images)


def random_qkv(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    batch, length, heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(batch, length, 3 * heads * width, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_unfused_kernel_equals_the_definition_with_its_gradient(shape: tuple[int, int, int, int]) -> None:
    ours, plain = (random_qkv(shape).requires_grad_() for _ in range(2))
    out, expected = unfused_attention(ours, shape[2]), plain_attention(plain, shape[2])
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_the_written_out_gradient_is_the_derivative() -> None:
    qkv = random_qkv((2, 5, 3, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unfused_attention(x, 3), (qkv,))


def test_the_input_may_be_a_strided_view() -> None:
    dense = random_qkv((2, 9, 3, 4))
    strided = dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(unfused_attention(strided, 3), unfused_attention(dense, 3))


def test_half_precision_stays_close_to_float32() -> None:
    qkv = random_qkv((2, 37, 4, 8))
    half = unfused_attention(qkv.bfloat16(), 4)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), unfused_attention(qkv, 4), rtol=0, atol=2e-2)


class PromotedSoftmax(TorchFunctionMode):
    """What CUDA's autocast does: softmax gives float32 unless it is told otherwise."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.softmax:
            self.calls += 1
            kwargs = {"dtype": torch.float32, **kwargs}
        return func(*args, **kwargs)


def test_an_autocast_that_promotes_softmax_does_not_break_the_backward_pass() -> None:
    qkv = random_qkv((2, 7, 2, 4)).bfloat16().requires_grad_()
    with PromotedSoftmax() as promoted:
        unfused_attention(qkv, 2).sum().backward()
    assert promoted.calls == 1
    assert qkv.grad is not None
    assert qkv.grad.dtype == torch.bfloat16


def test_large_scores_do_not_overflow() -> None:
    qkv = 1e4 * random_qkv((1, 5, 2, 4))
    assert torch.isfinite(unfused_attention(qkv, 2)).all()


@pytest.mark.parametrize(
    ("name", "device", "dtype", "num_tokens", "fused"),
    [
        ("fused", "cpu", torch.bfloat16, 10, True),
        ("unfused", "cuda", torch.bfloat16, 10, False),
        ("auto", "cuda", torch.bfloat16, 10, True),
        ("auto", "cpu", torch.bfloat16, 197, False),
        ("auto", "cpu", torch.bfloat16, UNFUSED_TOKENS + 1, True),
        ("auto", "cpu", torch.float32, FLOAT32_UNFUSED_TOKENS, False),
        ("auto", "cpu", torch.float32, FLOAT32_UNFUSED_TOKENS + 1, True),
    ],
)
def test_the_kernel_of_a_device(
    name: str, device: str, dtype: torch.dtype, num_tokens: int, fused: bool
) -> None:
    assert is_fused(name, device, dtype, num_tokens) is fused  # type: ignore[arg-type]


BLOCKS: dict[str, partial[nn.Module]] = {
    "plain": partial(Block, 12, 3, qkv_bias=True),
    "no bias": partial(Block, 12, 3, qkv_bias=False),
    "layer scale": partial(Block, 12, 3, qkv_bias=True, init_values=0.5),
    "query norm": partial(Block, 12, 3, qk_norm=True, norm_layer=LayerNorm),
    "attention dropout": partial(Block, 12, 3, attn_drop=0.5),
    "parallel": partial(ParallelScalingBlock, 12, 3),
}


def make(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    block = BLOCKS[kind]()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(2, 7, 12)


def outcome(block: nn.Module, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    block.zero_grad()
    torch.manual_seed(2)
    out = block(tokens)
    out.square().mean().backward()
    return out.detach(), [p.grad.clone() for p in block.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("kernel", ["fused", "unfused", "auto"])
def test_a_block_gives_what_timm_gives(kind: str, kernel: AttentionName) -> None:
    block, tokens = make(kind)
    expected, of_timm = outcome(block, tokens)
    use_attention(block, kernel)
    out, gradients = outcome(block, tokens)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, of_timm, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_in_evaluation_a_block_is_timms_to_the_bit(kind: str) -> None:
    block, tokens = make(kind)
    block.eval()
    expected, keys = block(tokens), list(block.state_dict())
    use_attention(block, "unfused")
    assert torch.equal(block(tokens), expected)
    assert list(block.state_dict()) == keys


class Functions(TorchFunctionMode):
    """Keeps the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def test_the_kernel_is_the_one_asked_for() -> None:
    block, tokens = make("plain")
    for kernel, expected in (("unfused", 0), ("fused", 1), ("unfused", 0)):
        use_attention(block, kernel)  # type: ignore[arg-type]
        with Functions() as functions:
            block(tokens)
        assert functions.called.count(F.scaled_dot_product_attention) == expected


def test_a_recipes_kernel_reaches_every_block_of_encoder_and_decoder() -> None:
    config = ModelConfig(name="vit", patch_size=4, embed_dim=12, depth=2, num_heads=3, attention="unfused")
    config = config.model_copy(update={"decoder": MAEDecoderConfig(embed_dim=8, depth=2, num_heads=2)})
    model = config.build(image_size=(8, 12), in_chans=3, num_values=48)
    kernels = [m.kernel for m in model.modules() if isinstance(m, SelfAttention)]
    assert kernels == ["unfused"] * 4
