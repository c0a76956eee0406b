"""PVT against the paper: published sizes and names, and its formula written on the state dict alone.

Legend: B batch, h, w grid, N tokens, M reduced tokens, D width, R side of a reduced cell.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from etpp_ssl.model.zoo import pvt
from etpp_ssl.model.zoo.pvt import PyramidVisionTransformer

TINY: dict[str, Any] = {
    "img_size": (64, 96),
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 2, 1, 2),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (3, 2, 2, 2),
    "num_classes": 5,
}
# The base; smaller, larger and turned; the base's number of tokens on another grid; one last-stage token.
SIZES = [(64, 96), (32, 64), (128, 96), (96, 64), (32, 192), (32, 32)]
REDUCTIONS = (8, 4, 2, 1)


def tiny(**changes: Any) -> PyramidVisionTransformer:
    """A tiny network in which no parameter has the special value of its initialisation."""
    torch.manual_seed(0)
    model = timm.create_model("pvt_tiny", **{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images_of(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    [("pvt_tiny", 13.2, 1.9), ("pvt_small", 24.5, 3.8), ("pvt_medium", 44.2, 6.7), ("pvt_large", 61.4, 9.8)],
)
def test_parameters_and_multiply_adds_are_the_published_ones(name: str, millions: float, giga: float) -> None:
    # The authors add the two products of attention to what their counter finds; torch's counts them too.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm.create_model(name)
        model(torch.empty(1, 3, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert round(counter.get_total_flops() / 2e9, 1) == giga


def published_shapes(depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published ImageNet checkpoints, `pvt_*.pth`."""
    dims, ratios, patches, sides = (64, 128, 320, 512), (8, 8, 4, 4), (4, 2, 2, 2), (56, 28, 14, 7)
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, 512)}

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, dim: int) -> None:
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def convolution(name: str, out: int, into: int, side: int) -> None:
        shapes.update({f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)})

    for i, dim in enumerate(dims):
        shapes[f"pos_embed{i + 1}"] = (1, sides[i] ** 2 + (i == 3), dim)
        convolution(f"patch_embed{i + 1}.proj", dim, dims[i - 1] if i else 3, patches[i])
        norm(f"patch_embed{i + 1}.norm", dim)
        for j in range(depths[i]):
            block = f"block{i + 1}.{j}"
            norm(f"{block}.norm1", dim)
            linear(f"{block}.attn.q", dim, dim)
            linear(f"{block}.attn.kv", 2 * dim, dim)
            linear(f"{block}.attn.proj", dim, dim)
            if i < 3:
                convolution(f"{block}.attn.sr", dim, dim, REDUCTIONS[i])
                norm(f"{block}.attn.norm", dim)
            norm(f"{block}.norm2", dim)
            linear(f"{block}.mlp.fc1", ratios[i] * dim, dim)
            linear(f"{block}.mlp.fc2", dim, ratios[i] * dim)
    norm("norm", 512)
    linear("head", 1000, 512)
    return shapes


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("pvt_tiny", (2, 2, 2, 2)),
        ("pvt_small", (3, 4, 6, 3)),
        ("pvt_medium", (3, 4, 18, 3)),
        ("pvt_large", (3, 8, 27, 3)),
    ],
)
def test_tensors_are_named_and_shaped_as_in_the_published_checkpoints(
    name: str, depths: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_shapes(depths)


def plain_attention(state: dict[str, Tensor], name: str, x: Tensor, heads: int, r: int) -> Tensor:
    """Spatial-reduction attention cell by cell and query by query: (B, h, w, D), or (B, N, D) at R = 1."""
    if r > 1:
        kernel, bias = state[f"{name}.sr.weight"], state[f"{name}.sr.bias"]
        cells = []
        for row in range(0, x.shape[1], r):
            for column in range(0, x.shape[2], r):
                cell = x[:, row : row + r, column : column + r]
                cells.append(torch.einsum("bpqd,edpq->be", cell, kernel) + bias)
        source = normed(state, f"{name}.norm", torch.stack(cells, dim=1), eps=1e-5)
    else:
        source = x
    q = applied(state, f"{name}.q", x.flatten(1, -2))
    k, v = applied(state, f"{name}.kv", source).chunk(2, dim=-1)
    width = q.shape[-1] // heads
    mixed = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for n in range(q.shape[1]):
            scores = (k[..., part] * q[:, n : n + 1, part]).sum(-1) / width**0.5
            mixed[:, n, part] = (scores.softmax(-1)[..., None] * v[..., part]).sum(1)
    return applied(state, f"{name}.proj", mixed).reshape(x.shape)


def plain_tokens(state: dict[str, Tensor], images: Tensor, base: tuple[int, int]) -> Tensor:
    """The network of `TINY`'s depths and heads from the paper's figure 3: normed tokens, (B, 1 + N, D)."""
    x = images
    for i, (depth, heads, r) in enumerate(zip(TINY["depths"], TINY["num_heads"], REDUCTIONS, strict=True)):
        stage, patch = i + 1, 4 if i == 0 else 2
        kernel, bias = (state[f"patch_embed{stage}.proj.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(x, kernel, bias, stride=patch).permute(0, 2, 3, 1)
        x = normed(state, f"patch_embed{stage}.norm", x, eps=1e-5)
        grid = x.shape[1:3]
        stage_base = base[0] // 2 ** (i + 2), base[1] // 2 ** (i + 2)
        positions = state[f"pos_embed{stage}"]
        rows = positions[:, 1:] if i == 3 else positions
        if grid != stage_base:
            # In float32, as the network does it.
            table = rows.float().unflatten(1, stage_base).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
            rows = table.double().flatten(2).transpose(1, 2)
        x = x + rows.unflatten(1, grid)
        if i == 3:
            cls = (state["cls_token"] + positions[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([cls, x.flatten(1, 2)], dim=1)
        for j in range(depth):
            block = f"block{stage}.{j}"
            x = x + plain_attention(state, f"{block}.attn", normed(state, f"{block}.norm1", x), heads, r)
            hidden = F.gelu(applied(state, f"{block}.mlp.fc1", normed(state, f"{block}.norm2", x)))
            x = x + applied(state, f"{block}.mlp.fc2", hidden)
        if i < 3:
            x = x.permute(0, 3, 1, 2)
    return normed(state, "norm", x)


def normed(state: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def applied(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


@pytest.mark.parametrize("size", SIZES)
def test_the_network_is_the_papers_at_any_size(size: tuple[int, int]) -> None:
    model = tiny().double()
    images = images_of(size).double()
    with torch.no_grad():
        tokens = plain_tokens(model.state_dict(), images, TINY["img_size"])
        torch.testing.assert_close(model.forward_features(images), tokens, rtol=0, atol=1e-11)
        logits = applied(model.state_dict(), "head", tokens[:, 0])
        torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-11)


def test_average_pooling_leaves_the_cls_token_out() -> None:
    model = tiny(global_pool="avg")
    with torch.no_grad():
        tokens = model.forward_features(images_of((64, 64)))
        pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, tokens[:, 1:].mean(1))


def test_the_base_size_uses_the_positions_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    expected = model(images_of((64, 96)))

    def resampled(parameter: Tensor, grid: Any, base: Any, prefix: int) -> Tensor:
        assert grid == base
        return parameter

    monkeypatch.setattr(pvt, "resampled_pos_embed", resampled)
    assert torch.equal(model(images_of((64, 96))), expected)
    with pytest.raises(AssertionError):
        model(images_of((96, 64)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_gradient_reaches_every_parameter_in_its_base_shape(size: tuple[int, int], pool: str) -> None:
    model = tiny(global_pool=pool)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model(images_of(size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape == shapes[name]
        if name.startswith("pos_embed"):
            assert (parameter.grad.abs().sum(-1) > 0).all(), f"some rows of {name}"
        assert parameter.grad.abs().sum() > 0, name


def test_layers_for_layer_decay() -> None:
    layers = group_parameters(tiny(), tiny().group_matcher(), reverse=True)
    # Blocks 1.0, 2.0, 2.1, 3.0, 4.0 and 4.1 are the layers 1 to 6.
    expected = {
        "patch_embed1.proj.weight": 0,
        "patch_embed1.norm.bias": 0,
        "pos_embed1": 0,
        "block1.0.attn.sr.weight": 1,
        "patch_embed2.proj.weight": 2,
        "pos_embed2": 2,
        "block2.0.mlp.fc1.weight": 2,
        "block2.1.norm1.weight": 3,
        "pos_embed3": 4,
        "block3.0.attn.kv.weight": 4,
        "cls_token": 5,
        "patch_embed4.norm.weight": 5,
        "pos_embed4": 5,
        "block4.0.attn.q.bias": 5,
        "block4.1.mlp.fc2.bias": 6,
        # timm counts the last norm with the block before it.
        "norm.weight": 6,
        "head.weight": 7,
    }
    assert {name: layers[name] for name in expected} == expected
    coarse = group_parameters(tiny(), tiny().group_matcher(coarse=True), reverse=True)
    assert [coarse[f"pos_embed{stage}"] for stage in (1, 2, 3, 4)] == [0, 2, 3, 4]
    assert [coarse[f"block{stage}.0.norm1.weight"] for stage in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert (coarse["cls_token"], coarse["norm.bias"], coarse["head.bias"]) == (4, 4, 5)


def test_positions_and_the_cls_token_are_exempt_from_weight_decay() -> None:
    tokens = {name for name, parameter in tiny().named_parameters() if name.startswith(("pos_", "cls_"))}
    assert tiny().no_weight_decay() == tokens
    assert len(tokens) == 5
