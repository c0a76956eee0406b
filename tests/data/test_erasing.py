"""Random erasing: the plain definition, keyed per image, and timm's distribution."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch import Tensor

from etpp_ssl.data.augmentation import ATTEMPTS, RandomErasing, keyed_normal
from etpp_ssl.randomness import keyed_words

SEED = 7
SIZES = [(20, 28), (9, 31), (17, 17), (33, 8), (3, 2), (1, 1)]


def images_of(count: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, *size, generator=generator)


def plain_box(words: list[int], probability: float, height: int, width: int) -> tuple[int, ...] | None:
    """(top, left, h, w) as the paper and timm draw it: one attempt after the other."""
    units = [(word >> 40 & 0xFFFFFF) / 2**24 for word in words]
    if units[0] >= probability:
        return None
    for attempt in range(ATTEMPTS):
        area, aspect, top, left = (1 + kind * ATTEMPTS + attempt for kind in range(4))
        target = (0.02 + units[area] * (1 / 3 - 0.02)) * height * width
        low, high = math.log(0.3), math.log(1 / 0.3)
        ratio = math.exp(low + (high - low) * units[aspect])
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < height and w < width:
            return words[top] % (height - h + 1), words[left] % (width - w + 1), h, w
    return None


def plain_erasing(images: Tensor, positions: Tensor, probability: float) -> Tensor:
    found = images.clone()
    for row, position in enumerate(positions):
        words = keyed_words(SEED, "erasing", position[None], 1 + 4 * ATTEMPTS)[0].tolist()
        box = plain_box(words, probability, *images.shape[2:])
        if box is not None:
            top, left, h, w = box
            noise = keyed_normal(SEED, "erasing noise", position[None], images[0].numel())
            part = noise.view(images.shape[1:])[:, top : top + h, left : left + w]
            found[row, :, top : top + h, left : left + w] = part
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_it_is_the_plain_definition(size: tuple[int, int], probability: float) -> None:
    images, positions = images_of(40, size), torch.arange(40) + 10**9
    found = RandomErasing(probability, SEED)(images, positions)
    assert torch.equal(found, plain_erasing(images, positions, probability))
    if min(size) > 8:
        assert 1 < (found != images).flatten(1).any(1).sum() <= 40


def test_an_image_does_not_depend_on_its_batch() -> None:
    images, positions = images_of(30, (20, 28)), torch.arange(30) * 17
    erase = RandomErasing(0.5, SEED)
    whole = erase(images, positions)
    for split in ([30], [1] * 30, [7, 13, 10]):
        parts = zip(images.split(split), positions.split(split), strict=True)
        assert torch.equal(torch.cat([erase(*part) for part in parts]), whole)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert torch.equal(erase(images[order], positions[order]), whole[order])
    torch.manual_seed(5)
    assert torch.equal(erase(images, positions), whole)
    assert not torch.equal(RandomErasing(0.5, SEED + 1)(images, positions), whole)
    assert not torch.equal(erase(images, positions + 1), whole)


def test_the_images_given_are_left_alone_and_their_dtype_is_kept() -> None:
    images, positions = images_of(20, (20, 28)), torch.arange(20)
    before = images.clone()
    RandomErasing(1.0, SEED)(images, positions)
    assert torch.equal(images, before)
    half = RandomErasing(1.0, SEED)(images.bfloat16(), positions)
    assert half.dtype == torch.bfloat16
    assert torch.equal(RandomErasing(0.0, SEED)(images, positions), images)


def test_the_noise_is_standard_normal_and_independent() -> None:
    noise = keyed_normal(SEED, "noise", torch.arange(200), 2001)
    assert noise.shape == (200, 2001)
    assert noise.dtype == torch.float32
    reference = np.random.default_rng(0).standard_normal(noise.numel())
    assert farthest(noise.flatten().numpy(), reference) < 1
    # Neighbours, the two numbers of one word, and the same number of two images.
    for one, other in (
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :1000], noise[:, 1001:]),
        (noise[1:], noise[:-1]),
    ):
        assert abs(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]) < 0.008
    assert torch.equal(keyed_normal(SEED, "noise", torch.arange(200), 2000)[:, :1000], noise[:, :1000])


def farthest(ones: np.ndarray, others: np.ndarray) -> float:
    """Kolmogorov and Smirnov's distance of two samples, in units of its value at p = 0.001."""
    values = np.sort(np.concatenate([ones, others]))
    shares = [
        np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (ones, others)
    ]
    return float(np.abs(shares[0] - shares[1]).max() / (1.95 * math.sqrt(1 / len(ones) + 1 / len(others))))


def boxes_of(erased: Tensor) -> list[tuple[int, int, int, int]]:
    """(top, left, h, w) of each image's erased part, of those that have one."""
    found = []
    for mask in erased:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows):
            h, w = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
            assert mask.sum() == h * w
            found.append((int(rows[0]), int(columns[0]), h, w))
    return found


@pytest.mark.parametrize("size", [(40, 56), (32, 32)])
def test_boxes_have_timms_distribution(size: tuple[int, int]) -> None:
    count, probability = 6000, 0.4
    ours = boxes_of(RandomErasing(probability, SEED).boxes(torch.arange(count), *size))
    random.seed(3)
    timm = TimmErasing(probability, mode="const", device="cpu")
    theirs = boxes_of(timm(torch.ones(count, 1, *size))[:, 0] == 0)
    for found in (ours, theirs):
        assert abs(len(found) / count - probability) < 4 * math.sqrt(probability * (1 - probability) / count)
    mine, reference = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    for name, of in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: np.log(b[:, 2] / b[:, 3]),
        "top": lambda b: b[:, 0] / (size[0] - b[:, 2] + 1),
        "left": lambda b: b[:, 1] / (size[1] - b[:, 3] + 1),
    }.items():
        assert farthest(of(mine), of(reference)) < 1, name
    area = mine[:, 2] * mine[:, 3] / (size[0] * size[1])
    assert 0.015 < area.min() < 0.04
    assert 0.3 < area.max() < 0.36
