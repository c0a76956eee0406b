"""The crop that is drawn once, and the view around it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.views import ProbeView, single_draw_crop_box

SIZES = [(31, 17), (17, 31), (200, 20), (1, 1), (3, 90)]


@pytest.mark.parametrize("size", SIZES)
def test_the_box_lies_within_the_picture_and_is_the_first_draw_cut_to_it(size: tuple[int, int]) -> None:
    cut = 0
    for seed in range(300):
        left, top, right, bottom = single_draw_crop_box(size, (0.08, 1.0), random.Random(seed))
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        # The same two draws, by their definition.
        draw = random.Random(seed)
        area = draw.uniform(0.08, 1.0) * size[0] * size[1]
        ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        assert right - left == min(size[0], max(1, width))
        assert bottom - top == min(size[1], max(1, height))
        cut += width > size[0] or height > size[1]
    if max(size) > 4 * min(size):
        assert cut > 100


def test_every_place_of_the_box_is_drawn() -> None:
    boxes = [single_draw_crop_box((6, 4), (0.1, 0.3), random.Random(seed)) for seed in range(400)]
    assert {box[0] for box in boxes} >= set(range(5))
    assert {box[2] for box in boxes} >= set(range(2, 7))
    assert {box[1] for box in boxes} >= set(range(3))
    assert {box[3] for box in boxes} >= set(range(2, 5))


def test_the_view_is_a_function_of_seed_and_position() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (19, 26, 3), dtype=np.uint8)
    picture = DecodedPicture((Image.fromarray(pixels),))
    view = ProbeView((12, 20), (0.08, 1.0), True, 5)
    first = view(picture, 7, (12, 20))
    assert first.shape == (3, 12, 20)
    assert first.dtype == torch.uint8
    assert torch.equal(first, view(picture, 7, (4, 4), 0.3))
    others = [view(picture, 8, (12, 20)), ProbeView((12, 20), (0.08, 1.0), True, 6)(picture, 7, (12, 20))]
    assert not any(torch.equal(first, other) for other in others)

    whole = ProbeView((19, 26), (1.0, 1.0), True, 0)
    plain = ProbeView((19, 26), (1.0, 1.0), False, 0)
    mirrored = [
        torch.equal(whole(picture, i, (19, 26)), plain(picture, i, (19, 26)).flip(2)) for i in range(40)
    ]
    assert 8 < sum(mirrored) < 32
