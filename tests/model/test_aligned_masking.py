"""Aligned blocks: Pixio's masks, their share of the scene at any bandwidth, and blocks that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from etpp_ssl.config import UserError
from etpp_ssl.model.mask_patterns import AlignedMaskingConfig
from etpp_ssl.model.masking import Mask, Masker, block_ranks
from etpp_ssl.randomness import keyed_words

PATCH = (16, 8)
"""At 256 x 128 px the grid is 16 x 16."""


def make_masker(block: int, unit: Any = "patches", ratio: float = 0.75, **others: Any) -> Masker:
    pattern = AlignedMaskingConfig(block=block, unit=unit)
    return Masker(pattern, ratio, others.pop("predict", None), PATCH, seed=3, base_grid=(16, 16), **others)


def test_at_pixios_size_4_of_16_blocks_are_visible_as_its_rule_has_it() -> None:
    samples = torch.arange(40)
    mask = make_masker(4)(samples, (256, 128), 0.0)
    order = keyed_words(3, "mask-aligned", samples, 16).argsort(dim=1)
    for ids, blocks in zip(mask.ids_keep.tolist(), order[:, : int(16 * (1 - 0.75))].tolist(), strict=True):
        inside = [
            (4 * (block // 4) + row) * 16 + 4 * (block % 4) + column
            for block in blocks
            for row in range(4)
            for column in range(4)
        ]
        assert ids == sorted(inside)


@pytest.mark.parametrize(("bandwidth", "sides"), [((96, 48), (1, 2, 1, 2)), ((160, 80), (2, 3, 2, 3))])
def test_a_patch_belongs_to_the_block_of_the_scene_in_which_its_centre_lies(
    bandwidth: tuple[int, int], sides: tuple[int, ...]
) -> None:
    length = sum(sides)
    number = [axis for axis, side in enumerate(sides) for _ in range(side)]
    assert number == [int((i + 0.5) * 16 / length // 4) for i in range(length)]
    ranks = block_ranks(torch.arange(3), (length, length), (4, 4), 3, "any")
    order = keyed_words(3, "any", torch.arange(3), 16).argsort(dim=1).tolist()
    expected = [[[of.index(4 * row + column) for column in number] for row in number] for of in order]
    assert ranks.view(3, length, length).tolist() == expected
    # Whole blocks but for the last: what is visible of each block is all or nothing, except for one.
    mask = make_masker(4, "scene")(torch.arange(60), bandwidth, 0.0)
    assert mask.ids_keep.shape == (60, round(length**2 / 4))
    assert cut_blocks(mask.ids_keep, length, number) <= {0, 1}


def cut_blocks(ids: torch.Tensor, length: int, number: list[int]) -> set[int]:
    """How many blocks an image shows in part."""
    shown = torch.zeros(len(ids), length**2).scatter(1, ids, 1.0).view(-1, length, length)
    axis = torch.nn.functional.one_hot(torch.tensor(number)).float()
    share = axis.T @ shown @ axis / (axis.sum(0)[:, None] * axis.sum(0))
    return set(((share > 0) & (share < 1)).flatten(1).sum(dim=1).tolist())


def test_patches_to_predict_are_drawn_by_block_and_those_with_data_first() -> None:
    number = [i // 4 for i in range(16)]
    masker = make_masker(4, predict=0.1875)
    mask: Mask = masker(torch.arange(50), (256, 128), 0.0)
    assert mask.ids_predict.shape == (50, 48)
    assert cut_blocks(mask.ids_predict, 16, number) == {0}
    # The draw says nothing about what is visible: every block is predicted sometimes.
    assert len(mask.ids_predict.unique()) == 256
    valid = torch.ones(50, 1, 256, 128, dtype=torch.bool)
    valid[:, :, :128] = False
    gaps = masker(torch.arange(50), (256, 128), 0.0, valid)
    assert gaps.ids_keep.min() >= 128
    assert gaps.ids_predict.min() >= 128


@pytest.mark.parametrize(
    ("masker", "bandwidth", "message"),
    [
        (
            make_masker(4),
            (32, 24),
            r"block 4 is larger than .* 32x24 \(2x3 patches\); legal is 1 there; .*scene",
        ),
        (
            make_masker(4),
            (192, 48),
            r"block 4 does not divide .* 192x48 \(12x6 patches\); legal are 1, 2, 3 ",
        ),
        (
            make_masker(4),
            (64, 32),
            r"block 4 has 16 patches, more than the 4 that are visible at .* are 1, 2 ",
        ),
        (make_masker(5, "scene"), (96, 48), r"block 5 does not divide .* full resolution \(16x16 patches\)"),
        (make_masker(32, "scene"), (96, 48), r"block 32 is larger than the grid of full resolution"),
        (
            make_masker(16, "scene"),
            (256, 128),
            r"block 16 has 256 patches, more than the 64 .* 1, 2, 4, 8 there$",
        ),
    ],
)
def test_a_block_that_does_not_fit_is_told_with_those_that_do(
    masker: Masker, bandwidth: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        masker.check(bandwidth, (0.0, 1.0))


def test_blocks_that_fit_pass_at_every_bandwidth() -> None:
    for bandwidth in ((64, 48), (112, 56), (256, 128)):
        make_masker(8, "scene").check(bandwidth, (0.0, 1.0))
        make_masker(1).check(bandwidth, (0.0, 1.0))
