"""The settings of supervised augmentation, and the view that they build."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from etpp_ssl.config import UserError
from etpp_ssl.data.augmentation import AugmentConfig
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.loader import Batch, BatchBuilder, load_batches
from etpp_ssl.data.resize import KERNELS
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.views import TrainView
from etpp_ssl.messages import validation_sentence

# More workers than cores are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = (120, 152)
SMALL = (40, 56)
MEAN = (0.485, 0.456, 0.406)


def base(**changes: Any) -> TrainView:
    settings = {"crop_scale": (0.3, 1.0), "flip": True, "lanczos": False, "seed": 4}
    return TrainView(SIZE, **{**settings, **changes})


def photo() -> DecodedPicture:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return DecodedPicture((Image.fromarray(noise).resize((211, 170), Image.Resampling.BICUBIC),))


@pytest.mark.parametrize("decode", ["full", "reduced"])
@pytest.mark.parametrize("bandwidth", [SMALL, SIZE])
@pytest.mark.parametrize("lanczos", [False, True])
def test_rand_augment_comes_after_the_mirror_and_before_lanczos(
    decode: Any, bandwidth: tuple[int, int], lanczos: bool
) -> None:
    plain = base(decode=decode)
    view = AugmentConfig().build_view(base(decode=decode, lanczos=lanczos), MEAN)
    assert view.augment is not None
    changed = 0
    for position in range(12):
        seen = plain(photo(), position, bandwidth)
        expected = view.augment(seen, position, 0.5)
        changed += not torch.equal(expected, seen)
        found = view(photo(), position, bandwidth, 0.5)
        assert found.dtype == torch.uint8
        if lanczos and bandwidth != SIZE:
            assert found.shape == (3, *bandwidth)
            pixels = Image.fromarray(expected.permute(1, 2, 0).numpy())
            shrunk = np.asarray(pixels.resize(bandwidth[::-1], KERNELS["lanczos"]))
            assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - shrunk).max() <= 2
        else:
            assert torch.equal(found, expected)
    assert changed > 4


def test_without_rand_augment_it_is_the_training_view() -> None:
    view = AugmentConfig(rand_augment=None).build_view(base(), (0.5,) * 5)
    for position in range(5):
        assert torch.equal(view(photo(), position, SIZE, 0.2), base()(photo(), position, SIZE))


def ramped_batches(num_workers: int, *, first: int = 0) -> list[Batch]:
    source = SyntheticConfig(num_images=12).open("train", in_chans=3, image_size=(20, 28), seed=0)
    view = AugmentConfig(ramp=True).build_view(base(), MEAN)
    requests = [
        BatchRequest(step, tuple(range(4 * step, 4 * step + 4)), (1, 5, 0, 7), SMALL, step / 6, 1.0, True)
        for step in range(first, 6)
    ]
    loader = load_batches(
        BatchBuilder(source, view, KeyedOrder(12, 0)),
        requests,
        num_workers=num_workers,
        prefetch=2,
        pin_memory=False,
    )
    return list(loader)


def test_batches_are_the_same_for_any_workers_and_start() -> None:
    wanted = ramped_batches(0)
    for num_workers, first in ((2, 0), (3, 2), (0, 5)):
        found = ramped_batches(num_workers, first=first)
        assert len(found) == 6 - first
        for one, other in zip(found, wanted[first:], strict=True):
            assert torch.equal(one.images, other.images)
            assert one.first_sample_id == other.first_sample_id == 4 * one.request.step


def test_a_request_carries_the_progress_of_its_own_step() -> None:
    view = AugmentConfig(ramp=True).build_view(base(), MEAN)
    source = SyntheticConfig(num_images=12).open("train", in_chans=3, image_size=(20, 28), seed=0)
    for batch in ramped_batches(0):
        for row, (position, index) in enumerate(
            zip(batch.request.sample_ids, batch.request.indices, strict=True)
        ):
            expected = view(source.open(index), position, SMALL, batch.request.step / 6)
            assert torch.equal(batch.images[row], expected)


def test_the_parts_get_the_settings() -> None:
    config = AugmentConfig(erasing=0.3, mixup=0.2, cutmix=0.4, smoothing=0.05)
    erasing, mixup = config.build_erasing(9), config.build_mixup(6, 9)
    assert (erasing.probability, erasing.seed) == (0.3, 9)
    assert (mixup.mixup, mixup.cutmix, mixup.smoothing) == (0.2, 0.4, 0.05)
    assert (mixup.num_classes, mixup.seed) == (6, 9)


def test_bad_settings_are_sentences() -> None:
    def sentence(**values: Any) -> str:
        with pytest.raises(ValidationError) as error:
            AugmentConfig(**values)
        return validation_sentence(error.value, AugmentConfig)

    assert sentence(rand_augment="rand-m9-x3").startswith(
        "rand_augment: 'rand-m9-x3' is not a setting of timm's"
    )
    assert "there is no magnitude to grow" in sentence(ramp=True, rand_augment=None)
    assert sentence(erasing=1.2).startswith("erasing is 1.2")
    assert sentence(smoothing=1.0).startswith("smoothing is 1.0")
    assert sentence(mixup=-0.1).startswith("mixup is -0.1")
    with pytest.raises(UserError, match=r"augment\.rand_augment=null"):
        AugmentConfig().build_view(base(), (0.5,) * 5)
