"""RandAugment: timm's pictures, at a key instead of wherever the global generators stand."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Server
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.data.rand_augment import RAMP_STAGES, RandAugment, global_draws, rand_augment_sections
from etpp_ssl.data.views import to_channels, to_tensor
from etpp_ssl.randomness import derive_key

SEED = 5
MEAN = (0.485, 0.456, 0.406)
PUBLISHED = "rand-m9-mstd0.5-inc1"


def picture(channels: int = 3, size: tuple[int, int] = (30, 41), seed: int = 0) -> Tensor:
    """A smooth colour ramp with noise on it, so that every operation leaves a trace."""
    height, width = size
    ramp = torch.arange(height)[:, None] * 3 + torch.arange(width)[None, :] * 2
    noise = torch.randint(0, 30, (channels, height, width), generator=torch.Generator().manual_seed(seed))
    return (ramp + 20 * torch.arange(channels)[:, None, None] + noise).clamp(0, 255).to(torch.uint8)


def augment(config: str = PUBLISHED, **changes: Any) -> RandAugment:
    settings = {"ramp": False, "mean": MEAN, "image_size": (30, 41), "interpolation": "bicubic", "seed": SEED}
    return RandAugment(config, **{**settings, **changes})


def timms(config: str, view: Tensor, position: int, interpolation: str = "bicubic") -> Tensor:
    """The definition: timm's transform as its factory builds it, its generators at the sample's key."""
    transform = rand_augment_transform(
        config,
        {
            "translate_const": int(30 * 0.45),
            "img_mean": tuple(round(255 * value) for value in MEAN),
            "interpolation": Image.Resampling[interpolation.upper()],
        },
    )
    key = derive_key(SEED, "rand_augment", position)
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    return to_tensor((transform(to_channels(view)[0]),))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "config", ["rand-m7-mstd0.5-inc1", "rand-m5-n3-p0.9", "rand-m4-mstd101-inc1", "rand-m6-tweights"]
)
def test_pictures_are_timms(config: str, interpolation: str) -> None:
    ours = augment(config, interpolation=interpolation)
    changed = 0
    for position in range(40):
        view = picture(seed=position)
        found = ours(view, position, 0.3)
        assert torch.equal(found, timms(config, view, position, interpolation))
        changed += not torch.equal(found, view)
    assert changed > 15


def test_a_ramp_of_nine_is_the_published_stages() -> None:
    ramped = augment(ramp=True)
    differ = 0
    for stage in range(RAMP_STAGES):
        for position in range(12):
            view = picture(seed=position)
            # Where noise lifts the magnitude to 10, timm keeps no bit, which Pillow 13 refuses.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(auto_augment.ImageOps, "posterize", posterize_to_black)
                expected = timms(f"rand-m{stage}-mstd0.5-inc1", view, position)
            for progress in (stage / RAMP_STAGES, (stage + 0.99) / RAMP_STAGES):
                found = ramped(view, position, progress)
                assert torch.equal(found, expected)
            differ += not torch.equal(found, ramped(view, position, 0.0))
    assert differ > 30
    assert torch.equal(ramped(picture(), 3, 1.0), ramped(picture(), 3, 0.95))


def posterize_to_black(image: Image.Image, bits: int) -> Image.Image:
    """Pillow's up to version 12."""
    return image.point([i & ~(2 ** (8 - bits) - 1) for i in range(256)] * len(image.getbands()))


def test_other_ramps_end_at_the_strings_magnitude() -> None:
    for config, last in (("rand-m6-inc1", 6), ("rand-m15-mmax20", 15), ("rand", 10)):
        found = [stage.ops[0].magnitude for stage in augment(config, ramp=True)._stages]
        assert found == pytest.approx([last * stage / 9 for stage in range(10)])
        assert {op.magnitude for op in augment(config)._stages[0].ops} == {last}
        assert torch.equal(augment(config, ramp=True)(picture(), 3, 0.99), augment(config)(picture(), 3, 0.1))


def test_without_a_ramp_progress_plays_no_part() -> None:
    ours = augment()
    for position in range(10):
        assert torch.equal(ours(picture(), position, 0.0), ours(picture(), position, 0.99))


def test_a_picture_is_a_function_of_seed_and_position() -> None:
    ours = augment()
    wanted = [ours(picture(), position, 0.5) for position in range(8)]
    random.seed(99)
    np.random.seed(98)
    random.gauss(0, 1)  # Leaves the second number of a pair behind.
    for position in (6, 1, 7, 0):
        assert torch.equal(ours(picture(), position, 0.5), wanted[position])
    other = pickle.loads(pickle.dumps(ours))
    assert all(torch.equal(other(picture(), position, 0.5), wanted[position]) for position in range(8))
    assert len({tuple(view.flatten().tolist()) for view in wanted}) > 4
    assert any(not torch.equal(augment(seed=6)(picture(), p, 0.5), wanted[p]) for p in range(8))


def in_another_process(position: int) -> list[int]:
    random.seed(position)
    return augment()(picture(), position, 0.5).flatten().tolist()


def test_another_process_draws_the_same(ranks: Server) -> None:
    # The ranks' server also salts Python's hashes anew.
    program = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import test_rand_augment as here; "
    )
    program += "print([here.in_another_process(position) for position in range(4)])"
    (printed,) = ranks.run(None, 1, before=program)
    assert json.loads(printed) == [in_another_process(position) for position in range(4)]


def test_the_global_generators_are_left_alone() -> None:
    random.seed(3)
    random.gauss(0, 1)
    np.random.seed(4)
    np.random.randn()
    before = random.getstate(), [np.copy(part) for part in np.random.get_state()], torch.get_rng_state()
    for position in range(20):
        augment()(picture(), position, 0.5)
    with pytest.raises(KeyError), global_draws(2**63 + 5):
        raise KeyError
    assert random.getstate() == before[0]
    assert all(
        np.array_equal(one, other) for one, other in zip(np.random.get_state(), before[1], strict=True)
    )
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_view_itself_is_left_alone() -> None:
    view = picture()
    before = view.clone()
    for position in range(10):
        augment()(view, position, 0.5).zero_()
    assert torch.equal(view, before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 3, 10])
@pytest.mark.parametrize("kind", ["-inc0", "-inc1", "-tweights", "-t3a", "-t3aw"])
def test_every_operation_works_on_gray_and_on_colour_at_every_magnitude(
    channels: int, magnitude: int, kind: str
) -> None:
    (transform,) = augment(f"rand-m{magnitude}{kind}-p1", mean=MEAN[:channels])._stages
    (image,) = to_channels(picture(channels))
    operations: list[AugmentOp] = transform.ops
    assert len(operations) >= 3
    for operation in operations:
        found = operation(image)
        assert (found.mode, found.size) == (image.mode, image.size), operation.name
        if (operation.name, magnitude) in (("PosterizeIncreasing", 10), ("Posterize", 0)):
            assert found.getextrema() == posterize_to_black(image, 0).getextrema()


def test_what_a_shift_uncovers_is_the_datas_mean() -> None:
    for channels in (1, 3):
        (transform,) = augment("rand-m10-p1", mean=MEAN[:channels])._stages
        shift = next(op for op in transform.ops if op.name == "TranslateXRel")
        with global_draws(0):
            found = to_tensor((shift(to_channels(picture(channels))[0]),))
        edges = {tuple(found[:, 5, x].tolist()) for x in (0, -1)}
        assert tuple(round(255 * value) for value in MEAN[:channels]) in edges


def test_a_box_kernel_is_bicubic_here() -> None:
    for position in range(20):
        found = augment(interpolation="box")(picture(), position, 0.5)
        assert torch.equal(found, augment()(picture(), position, 0.5))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_channels_are_a_sentence(channels: int) -> None:
    with pytest.raises(UserError, match=rf"in_chans is {channels}: use augment\.rand_augment=null"):
        augment(mean=(0.5,) * channels)


def test_sections_are_read() -> None:
    assert rand_augment_sections(PUBLISHED) == {"m": "9", "mstd": "0.5", "inc": "1"}
    assert rand_augment_sections("rand") == {}
    assert rand_augment_sections("rand-n3-mmax15-p0.7-t3aw") == {
        "n": "3",
        "mmax": "15",
        "p": "0.7",
        "t": "3aw",
    }


@pytest.mark.parametrize(
    "config",
    [
        *("", "rnd-m9", "m9", "rand-", "rand-m9-", "rand--m9", "rand-m9-m8", "rand-m-5", "rand-m9.5"),
        *("rand-mfoo", "rand-q3", "rand-inc2", "rand-n0", "rand-n20", "rand-p2", "rand-p", "rand-t"),
        *("rand-tfoo", "rand-mstd", "rand-M9", "rand_m9", "augmix-m3", "v0", "rand-m9 -inc1"),
    ],
)
def test_a_string_that_timm_would_misread_is_a_sentence(config: str) -> None:
    with pytest.raises(UserError) as error:
        augment(config)
    message = str(error.value)
    assert message.startswith(f"augment.rand_augment: {config!r} ")
    assert "rand-m9-mstd0.5-inc1" in message
    assert "\n" not in message
