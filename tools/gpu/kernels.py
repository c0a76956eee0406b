"""Kernels that may be chosen: fused against unfused attention, compiled against eager blocks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from etpp_ssl.model import attention as kernels
from etpp_ssl.model.attention import BlockRunner, unfused_attention
from etpp_ssl.recipe import Recipe
from gpu.arithmetic import error_of, loss_and_gradients, step_recipe, tf32
from gpu.parts import Cases, Figures, Place, bounded

ATTENTION = {"fp32": 5e-6, "bf16": 2e-2, "fp16": 3e-3}
"""Bounds of output and gradient, by precision."""
COMPILED = {"fp32": 5e-5, "bf16": 8e-2}
"""Bounds of the gradient of a compiled step against float64."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS, HEAD_WIDTH = 6, 64


def attention(place: Place) -> Cases:
    """Both kernels of self-attention, forward and backward, at the numbers of tokens of the stages."""
    for num_tokens in (10, 37, 50, 197, 577) if not place.smoke else (5, 37):
        shape = (8 if not place.smoke else 2, num_tokens, 3 * HEADS * HEAD_WIDTH)
        generator = torch.Generator().manual_seed(num_tokens)
        qkv = torch.randn(shape, generator=generator)
        weight = torch.randn(*shape[:2], HEADS * HEAD_WIDTH, generator=generator)
        for precision, bound in ATTENTION.items():
            for name, kernel in (("fused", _fused), ("unfused", unfused_attention)):

                def run(
                    qkv: Tensor = qkv,
                    weight: Tensor = weight,
                    precision: str = precision,
                    bound: float = bound,
                    kernel: Callable[[Tensor, int], Tensor] = kernel,
                ) -> Figures:
                    values = qkv.to(DTYPES[precision])
                    right = _both(_fused, values.double(), weight.double())
                    with tf32(False, place.device):
                        found = _both(kernel, values.to(place.device), weight.to(place.device, values.dtype))
                    output, gradient = (error_of(a, b) for a, b in zip(found, right, strict=True))
                    return bounded(max(output, gradient), bound, output=output, gradient=gradient)

                yield f"{num_tokens} tokens, {precision}, {name}", run


def _fused(qkv: Tensor, num_heads: int) -> Tensor:
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def _both(kernel: Callable[[Tensor, int], Tensor], qkv: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    output = kernel(qkv, HEADS)
    (output * weight).sum().backward()
    assert qkv.grad is not None
    return output, qkv.grad


def compiled(place: Place) -> Cases:
    """The gradients of compiled blocks at each stage, and what compiling costs."""
    recipe = step_recipe(place)
    if place.smoke:
        # What traces the blocks, without the minute that a C++ compiler takes for their kernels.
        traced = torch.compile(kernels.call_block, dynamic=False, backend="aot_eager")
        kernels.compiled_call = lambda: traced  # type: ignore[assignment]
    for size in (96, 160, 224) if not place.smoke else (24,):
        right = loss_and_gradients(recipe, (size, size), "cpu", "fp64")
        for precision, bound in COMPILED.items() if not place.smoke else [("fp32", COMPILED["fp32"])]:

            def run(
                size: int = size,
                precision: str = precision,
                bound: float = bound,
                right: tuple[Tensor, Tensor] = right,
                recipe: Recipe = recipe,
            ) -> Figures:
                seconds = []
                for _ in range(2):
                    start = time.perf_counter()
                    _, gradient = loss_and_gradients(
                        recipe, (size, size), place.device, precision, BlockRunner(compiled=True)
                    )
                    seconds.append(time.perf_counter() - start)
                return bounded(error_of(gradient, right[1]), bound, compile_seconds=seconds[0] - seconds[1])

            yield f"{size} px, {precision}", run
