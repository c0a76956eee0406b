"""Swin's windows at other sizes against attention written out pair by pair, and its resampled table."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from etpp_ssl.model.zoo.swin import (
    ResizableSwinBlock,
    WindowView,
    make_resizable,
    offset_weights,
    resampled_table,
    window_at,
)

CPU = torch.device("cpu")
BASE_GRID, BASE_WINDOW, HEADS, DIM = (8, 12), 4, 2, 8


def make_block(shift: int) -> SwinTransformerBlock:
    torch.manual_seed(0)
    block = SwinTransformerBlock(
        DIM, BASE_GRID, num_heads=HEADS, window_size=BASE_WINDOW, shift_size=shift
    ).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter))
    make_resizable(block)
    return block


def kernel(distance: float) -> float:
    """Keys' cubic kernel with a = -0.5."""
    x = abs(distance)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bias_at(table: Tensor, head: int, offset: tuple[float, float], spacing: tuple[float, float]) -> Tensor:
    """The base table at an offset in base patches, at most its last: a weighted mean over all its entries."""
    offset = tuple(max(1.0 - BASE_WINDOW, min(BASE_WINDOW - 1.0, d)) for d in offset)  # type: ignore[assignment]
    total, weights = torch.zeros(()), 0.0
    for down in range(1 - BASE_WINDOW, BASE_WINDOW):
        for right in range(1 - BASE_WINDOW, BASE_WINDOW):
            weight = kernel((offset[0] - down) / max(spacing[0], 1))
            weight *= kernel((offset[1] - right) / max(spacing[1], 1))
            entry = (down + BASE_WINDOW - 1) * (2 * BASE_WINDOW - 1) + right + BASE_WINDOW - 1
            total, weights = total + weight * table[entry, head], weights + weight
    return total / weights


def plain_attention(block: SwinTransformerBlock, image_HWC: Tensor, window: tuple[int, int]) -> Tensor:
    """Each patch attends to those that lie in the same window of a partition that begins at the shift."""
    height, width, _ = image_HWC.shape
    spacing = (BASE_GRID[0] / height, BASE_GRID[1] / width)
    shifted = any(block.target_shift_size)
    shift = tuple(s // 2 if shifted and s < g else 0 for s, g in zip(window, (height, width), strict=True))
    places = [(row, column) for row in range(height) for column in range(width)]
    homes = [tuple((place[a] - shift[a]) // window[a] for a in (0, 1)) for place in places]
    qkv = block.attn.qkv(image_HWC.flatten(0, 1)).view(len(places), 3, HEADS, -1)
    cache: dict[tuple[int, float, float], Tensor] = {}
    outputs = []
    for i, here in enumerate(places):
        heads = []
        for head in range(HEADS):
            seen = [j for j in range(len(places)) if homes[j] == homes[i]]
            scores = []
            for j in seen:
                offset = tuple((here[a] - places[j][a]) * spacing[a] for a in (0, 1))
                key = (head, *offset)
                if key not in cache:
                    cache[key] = bias_at(block.attn.relative_position_bias_table, head, offset, spacing)
                product = qkv[i, 0, head] @ qkv[j, 1, head] / (DIM // HEADS) ** 0.5
                scores.append(product + cache[key])
            heads.append(torch.stack(scores).softmax(0) @ qkv[seen, 2, head])
        outputs.append(torch.cat(heads))
    return block.attn.proj(torch.stack(outputs)).view(height, width, -1)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        (BASE_GRID, (4, 4)),
        ((4, 6), (2, 2)),
        ((6, 9), (3, 3)),
        ((6, 6), (3, 2)),
        ((5, 12), (5, 4)),
        ((10, 15), (5, 5)),
    ],
)
@torch.no_grad()
def test_windows_at_any_size_equal_attention_pair_by_pair(
    shift: int, grid: tuple[int, int], window: tuple[int, int]
) -> None:
    block = make_block(shift)
    image = torch.randn(1, *grid, DIM, generator=torch.Generator().manual_seed(1))
    plain = plain_attention(block, image[0], window)
    torch.testing.assert_close(block._attn(image)[0], plain, rtol=1e-4, atol=1e-5)


def test_windows_are_a_thirty_second_of_the_image_where_they_are_7_of_224_pixels() -> None:
    for bandwidth in (32, 96, 160, 192, 224, 288, 384):
        for stage_stride in (4, 8, 16, 32):
            window = window_at(7, 224 // stage_stride, bandwidth // stage_stride)
            assert window == bandwidth // 32


@pytest.mark.parametrize(
    ("base_window", "base_grid", "grid", "window"),
    [
        (7, 32, 24, 6),
        (7, 14, 13, 13),
        (4, 8, 6, 3),
        (7, 7, 3, 3),
        (12, 96, 40, 5),
        (7, 8, 2, 2),
        (6, 6, 1, 1),
    ],
)
def test_a_window_divides_the_grid_and_is_the_nearest_that_does(
    base_window: int, base_grid: int, grid: int, window: int
) -> None:
    assert window_at(base_window, base_grid, grid) == window


@pytest.mark.parametrize(("base_window", "window"), [(7, 3), (7, 5), (4, 2), (3, 3), (3, 5)])
def test_weights_are_those_of_torchs_antialiased_bicubic(base_window: int, window: int) -> None:
    # With entries spread evenly over the whole table the two sample at the same places.
    weights = offset_weights(window, base_window, 2 * window - 1, 2 * base_window - 1, CPU)
    signal = torch.randn(2 * base_window - 1, generator=torch.Generator().manual_seed(0))
    size = (1, 2 * window - 1)
    expected = F.interpolate(signal.view(1, 1, 1, -1), size=size, mode="bicubic", antialias=True)
    # Beyond the table ours stays at the last entry, and torch extrapolates.
    spacing = (2 * base_window - 1) / (2 * window - 1)
    inside = (torch.arange(1 - window, window) * spacing).abs() <= base_window - 1
    torch.testing.assert_close((weights @ signal)[inside], expected.flatten()[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "window"), [((24, 40), (3, 5)), ((40, 24), (5, 3)), ((96, 64), (12, 8))])
def test_a_bias_that_depends_on_true_distance_keeps_it(
    grid: tuple[int, int], window: tuple[int, int]
) -> None:
    base = torch.arange(-6.0, 7.0)
    table = torch.stack([base.view(-1, 1).expand(13, 13), base.expand(13, 13), torch.ones(13, 13)], dim=-1)
    shown = resampled_table(table.flatten(0, 1), (7, 7), WindowView(window, grid, (56, 56)))
    shown = shown.view(2 * window[0] - 1, 2 * window[1] - 1, 3)
    for axis in (0, 1):
        # At the border the kernel has entries on one side only; elsewhere its sum over entries is not exact.
        centre, spacing = window[axis] - 1, 56 / grid[axis]
        inside = [d for d in range(-centre, centre + 1) if abs(d * spacing) <= 6 - 2 * max(spacing, 1)]
        assert 0 in inside
        for d in inside:
            place = (centre + d, window[1] - 1) if axis == 0 else (window[0] - 1, centre + d)
            assert float(shown[place][axis]) == pytest.approx(d * spacing, abs=0.03)
    torch.testing.assert_close(shown[..., 2], torch.ones_like(shown[..., 2]))
    torch.testing.assert_close(shown[..., :2], -shown.flip(0, 1)[..., :2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(24, 24), (28, 28), (40, 24), (56, 40)])
def test_every_entry_of_the_table_is_trained_at_every_bandwidth(grid: tuple[int, int]) -> None:
    table = torch.zeros(169, 1, requires_grad=True)
    view = WindowView((window_at(7, 56, grid[0]), window_at(7, 56, grid[1])), grid, (56, 56))
    shown = resampled_table(table, (7, 7), view)
    shown.backward(torch.randn(shown.shape, generator=torch.Generator().manual_seed(0)))
    assert table.grad is not None
    assert table.grad.count_nonzero() == 169


def test_the_identity_at_base_spacing() -> None:
    assert torch.equal(offset_weights(7, 7, 56, 56, CPU), torch.eye(13))


def small_swin(**changes: object) -> nn.Module:
    args = {"img_size": (64, 96), "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **{**args, **changes})


def test_a_size_seen_first_in_evaluation_can_be_trained_afterwards() -> None:
    net = small_swin().eval()
    make_resizable(net)
    images = torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        net(images)
    net.train()(images).sum().backward()
    tables = [p for name, p in net.named_parameters() if "relative_position_bias_table" in name]
    assert all(table.grad is not None and table.grad.any() for table in tables)


class Pads(TorchFunctionMode):
    """Keeps the widths of every `F.pad`."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.pad:
            self.widths.append(args[1])
        return func(*args, **(kwargs or {}))


def test_no_image_is_padded() -> None:
    net = small_swin().eval()
    make_resizable(net)
    assert any(isinstance(module, ResizableSwinBlock) for module in net.modules())
    with Pads() as pads:
        net(torch.randn(1, 3, 48, 80))
    assert pads.widths
    assert not any(any(widths) for widths in pads.widths)


def test_in_bfloat16_autocast_the_bias_stays_float32() -> None:
    net = small_swin().eval()
    make_resizable(net)
    attention = net.get_submodule("layers.0.blocks.0.attn")
    attention.view = WindowView((3, 4), (12, 20), (16, 24))  # type: ignore[assignment]
    plain = attention._get_rel_pos_bias()  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention._get_rel_pos_bias(), plain)  # type: ignore[operator]
