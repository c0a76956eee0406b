"""CSWin against the paper: published sizes and names, and its formula with loops over stripes.

Legend: B batch, h, w grid, s, t height and width of a stripe, D width, E width of one branch.
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

from etpp_ssl.model.zoo.cswin import CSWinBlock, CSWinTransformer

TINY: dict[str, Any] = {
    "img_size": (64, 96),
    "embed_dim": 8,
    "depths": (1, 2, 2, 1),
    "num_heads": (2, 2, 4, 4),
    "mlp_ratio": 2.0,
    "num_classes": 5,
}
SIZES = [(64, 96), (32, 64), (96, 96), (96, 64), (32, 32)]


def tiny(**changes: Any) -> CSWinTransformer:
    """A tiny network in which no parameter has the special value of its initialisation."""
    torch.manual_seed(0)
    model = timm.create_model("cswin_tiny", **{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images_of(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "published_millions", "published_giga", "giga"),
    [("cswin_tiny", 23, 4.3, 4.324), ("cswin_small", 35, 6.9, 6.801), ("cswin_base", 78, 15.0, 14.955)],
)
def test_parameters_and_multiply_adds_are_the_published_ones(
    name: str, published_millions: int, published_giga: float, giga: float
) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm.create_model(name)
        model(torch.empty(1, 3, 224, 224))
    # The paper rounds 22.32, 34.64 and 77.38 up.
    assert -(-sum(p.numel() for p in model.parameters()) // 10**6) == published_millions
    assert round(counter.get_total_flops() / 2e9, 3) == giga
    # CSWin-S: the authors' own code, counted by the same counter, has 6.801 too, not the paper's 6.9.
    assert round(giga, 1) == published_giga or name == "cswin_small"
    assert giga == pytest.approx(published_giga, rel=0.015)


def published_shapes(dim: int, depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published ImageNet checkpoints, `cswin_*_224.pth`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes.update({f"{name}.weight": weight, f"{name}.bias": weight[:1]})

    layer("stage1_conv_embed.0", dim, 3, 7, 7)
    layer("stage1_conv_embed.2", dim)
    for i, depth in enumerate(depths):
        if i:
            layer(f"merge{i}.conv", 2 * dim, dim, 3, 3)
            dim *= 2
            layer(f"merge{i}.norm", dim)
        for j in range(depth):
            block, branches = f"stage{i + 1}.{j}", 1 if i == 3 else 2
            layer(f"{block}.norm1", dim)
            layer(f"{block}.qkv", 3 * dim, dim)
            for branch in range(branches):
                layer(f"{block}.attns.{branch}.get_v", dim // branches, 1, 3, 3)
            layer(f"{block}.proj", dim, dim)
            layer(f"{block}.norm2", dim)
            layer(f"{block}.mlp.fc1", 4 * dim, dim)
            layer(f"{block}.mlp.fc2", dim, 4 * dim)
    layer("norm", dim)
    layer("head", 1000, dim)
    return shapes


@pytest.mark.parametrize(
    ("name", "dim", "depths"),
    [
        ("cswin_tiny", 64, (1, 2, 21, 1)),
        ("cswin_small", 64, (2, 4, 32, 2)),
        ("cswin_base", 96, (2, 4, 32, 2)),
    ],
)
def test_tensors_are_named_and_shaped_as_in_the_published_checkpoints(
    name: str, dim: int, depths: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == published_shapes(dim, depths)


@pytest.mark.parametrize("side", [32, 96, 160, 192, 224, 384])
def test_stripes_follow_the_input(side: int) -> None:
    last = side // 32
    for stage, width in enumerate((1, 2, last)):
        map_side = side // (4, 8, 16)[stage]
        stripes = CSWinBlock(8, 2, stage, 2.0, 0.0).stripes((map_side, map_side))
        assert stripes == [(map_side, width), (width, map_side)]
    assert CSWinBlock(8, 2, 3, 2.0, 0.0).stripes((last, last)) == [(last, last)]


def test_on_a_rectangular_input_each_axis_has_its_own_stripes() -> None:
    # 64 x 160 pixels: 4 x 10 tokens in stage 3, 2 x 5 in the last.
    assert CSWinBlock(8, 2, 2, 2.0, 0.0).stripes((4, 10)) == [(4, 5), (2, 10)]
    assert CSWinBlock(8, 2, 0, 2.0, 0.0).stripes((16, 40)) == [(16, 1), (1, 40)]
    assert CSWinBlock(8, 2, 3, 2.0, 0.0).stripes((2, 5)) == [(2, 5)]


def plain_stripe(q: Tensor, k: Tensor, v: Tensor, kernel: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention within one stripe plus LePE, (B, s, t, E); LePE's convolution tap by tap."""
    (s, t), width = v.shape[1:3], v.shape[-1] // heads
    mixed = torch.zeros_like(v)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        keys, values = k[..., part].flatten(1, 2), v[..., part].flatten(1, 2)
        for row in range(s):
            for column in range(t):
                scores = (keys * q[:, row, column, part][:, None]).sum(-1) / width**0.5
                mixed[:, row, column, part] = (scores.softmax(-1)[..., None] * values).sum(1)
    padded = F.pad(v, (0, 0, 1, 1, 1, 1))
    lepe = bias.expand_as(v).clone()
    for row in range(3):
        for column in range(3):
            lepe += padded[:, row : row + s, column : column + t] * kernel[:, 0, row, column]
    return mixed + lepe


def plain_attention(state: dict[str, Tensor], name: str, x: Tensor, heads: int, stage: int) -> Tensor:
    """Cross-shaped window attention, (B, h, w, D): the first half of the channels in vertical stripes."""
    h, w = x.shape[1:3]
    q, k, v = applied(state, f"{name}.qkv", x).chunk(3, dim=-1)
    mixed = torch.zeros_like(x)
    if stage == 4:
        branches = [(slice(None), h, w)]
    else:
        wide, high = {1: (1, 1), 2: (2, 2), 3: (w // 2, h // 2)}[stage]
        half = x.shape[-1] // 2
        branches = [(slice(0, half), h, wide), (slice(half, None), high, w)]
    for branch, (channels, s, t) in enumerate(branches):
        lepe = (state[f"{name}.attns.{branch}.get_v.{part}"] for part in ("weight", "bias"))
        kernel, bias = lepe
        for row in range(0, h, s):
            for column in range(0, w, t):
                stripe = (slice(None), slice(row, row + s), slice(column, column + t), channels)
                mixed[stripe] = plain_stripe(
                    q[stripe], k[stripe], v[stripe], kernel, bias, heads // len(branches)
                )
    return applied(state, f"{name}.proj", mixed)


def plain_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network of `TINY`'s depths and heads from the paper's figure 2."""
    x = convolved(state, "stage1_conv_embed.0", images, stride=4, padding=2)
    x = normed(state, "stage1_conv_embed.2", x)
    for stage, (depth, heads) in enumerate(zip(TINY["depths"], TINY["num_heads"], strict=True), start=1):
        if stage > 1:
            x = convolved(state, f"merge{stage - 1}.conv", x.permute(0, 3, 1, 2), stride=2, padding=1)
            x = normed(state, f"merge{stage - 1}.norm", x)
        for j in range(depth):
            block = f"stage{stage}.{j}"
            x = x + plain_attention(state, block, normed(state, f"{block}.norm1", x), heads, stage)
            hidden = F.gelu(applied(state, f"{block}.mlp.fc1", normed(state, f"{block}.norm2", x)))
            x = x + applied(state, f"{block}.mlp.fc2", hidden)
    return applied(state, "head", normed(state, "norm", x).mean((1, 2)))


def convolved(state: dict[str, Tensor], name: str, x: Tensor, stride: int, padding: int) -> Tensor:
    """(B, C, H, W) to (B, h, w, D)."""
    kernel, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.conv2d(x, kernel, bias, stride, padding).permute(0, 2, 3, 1)


def normed(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def applied(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


@pytest.mark.parametrize("size", SIZES)
def test_the_network_is_the_papers_at_any_size(size: tuple[int, int]) -> None:
    model = tiny().double()
    images = images_of(size).double()
    with torch.no_grad():
        expected = plain_logits(model.state_dict(), images)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_reaches_every_parameter(size: tuple[int, int]) -> None:
    model = tiny()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model(images_of(size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape == shapes[name]
        assert parameter.grad.abs().sum() > 0, name


def test_the_base_size_shapes_no_parameter() -> None:
    model, other = tiny(), tiny(img_size=224)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(images_of((96, 32))), other(images_of((96, 32))))


def test_layers_for_layer_decay() -> None:
    layers = group_parameters(tiny(), tiny().group_matcher(), reverse=True)
    # Blocks 1.0, 2.0, 2.1, 3.0, 3.1 and 4.0 are the layers 1 to 6.
    expected = {
        "stage1_conv_embed.0.weight": 0,
        "stage1_conv_embed.2.bias": 0,
        "stage1.0.qkv.weight": 1,
        "merge1.conv.weight": 2,
        "stage2.0.attns.1.get_v.weight": 2,
        "stage2.1.norm2.bias": 3,
        "merge2.norm.weight": 4,
        "stage3.0.proj.weight": 4,
        "stage3.1.mlp.fc1.weight": 5,
        "merge3.conv.bias": 6,
        "stage4.0.attns.0.get_v.bias": 6,
        # timm counts the last norm with the block before it.
        "norm.weight": 6,
        "head.weight": 7,
    }
    assert {name: layers[name] for name in expected} == expected
    coarse = group_parameters(tiny(), tiny().group_matcher(coarse=True), reverse=True)
    assert [coarse[f"merge{i}.conv.weight"] for i in (1, 2, 3)] == [2, 3, 4]
    assert [coarse[f"stage{stage}.0.norm1.weight"] for stage in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert (coarse["stage1_conv_embed.0.weight"], coarse["norm.bias"], coarse["head.bias"]) == (0, 4, 5)
