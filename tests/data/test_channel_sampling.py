"""Images of which some channels are shown: keyed draws, batches of images that differ, means over all."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.data.channels import mean_over_channels, stacked
from etpp_ssl.data.formats import open_picture
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.formats.values import ValuePicture
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.views import EvalView, Normalise, TrainView

SIZE = (12, 16)


def picture(num_channels: int, in_chans: int = 1) -> ValuePicture:
    """Channel c holds 100 c everywhere."""
    values = np.broadcast_to(100 * np.arange(num_channels, dtype=np.int16), (30, 40, num_channels))
    reading = Reading(in_chans, range=((0.0, 1000.0),), sampled=True)
    return ValuePicture(ArrayPicture(np.ascontiguousarray(values)), reading)


def train_view(num_channels: int | None, decode: str = "reduced", seed: int = 3) -> TrainView:
    return TrainView(
        SIZE,
        (0.2, 1.0),
        True,
        False,
        seed,
        decode=decode,
        deep=True,
        num_channels=num_channels,  # type: ignore[arg-type]
    )


def as_file(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def shown(view: Tensor) -> tuple[int, ...]:
    assert (view.flatten(1).std(dim=1) < 1e-2).all()
    return tuple((view.flatten(1).mean(dim=1) / 100).round().int().tolist())


@pytest.mark.parametrize("decode", ["full", "reduced"])
@pytest.mark.parametrize(("there", "taken"), [(5, 1), (5, 2), (3, 3)])
def test_every_choice_of_channels_is_as_likely_and_in_order(there: int, taken: int, decode: str) -> None:
    view, image = train_view(taken, decode), picture(there, taken)
    found = [shown(view(image, sample, SIZE)) for sample in range(1200)]
    choices = list(itertools.combinations(range(there), taken))
    assert set(found) == set(choices)
    for count in Counter(found).values():
        assert abs(count - 1200 / len(choices)) < 5 * (1200 / len(choices)) ** 0.5
    assert found[:300] == [shown(train_view(taken, decode)(image, sample, SIZE)) for sample in range(300)]
    if taken < there:
        assert found[:300] != [shown(train_view(taken, decode, seed=4)(image, n, SIZE)) for n in range(300)]


def test_the_crop_does_not_depend_on_the_channels_shown() -> None:
    ramp = np.arange(1200, dtype=np.float32).reshape(30, 40, 1)
    image = ArrayPicture(np.concatenate([ramp, ramp + 5000], axis=2))
    for sample in range(20):
        one, both = train_view(1)(image, sample, SIZE), train_view(None)(image, sample, SIZE)
        assert any(torch.allclose(one[0], channel, atol=1e-2) for channel in both)


def test_an_evaluation_view_shows_all_unless_a_draw_is_asked_for() -> None:
    assert shown(EvalView(SIZE, 0.875)(picture(4), 0, SIZE)) == (0, 1, 2, 3)
    drawn = EvalView(SIZE, 0.875, 2, 7)
    assert len({shown(drawn(picture(4, 2), sample, SIZE)) for sample in range(60)}) == 6


def test_files_of_more_channels_are_read_and_those_of_fewer_refused() -> None:
    reading = FolderConfig(root="x", range=(0, 1), channel_sampling=2).reading(2)
    assert reading.sampled
    for num_channels in (2, 3, 7):
        whole = open_picture(as_file(np.zeros((4, 5, num_channels), np.float32)), reading)
        assert whole.region((0, 0, 5, 4), (5, 4)).pixels.shape == (4, 5, num_channels)
    few = open_picture(as_file(np.zeros((4, 5), np.float32)), reading)
    with pytest.raises(UnreadableImage, match=r"it has 1 channel, but data\.channel_sampling is 2"):
        few.region((0, 0, 5, 4), (5, 4))
    four = FolderConfig(root="x", range=(0, 1), channel_sampling=2, channels=(4, 0, 2, 1)).reading(2)
    values = as_file(np.arange(5, dtype=np.float32) * np.ones((4, 5, 1), np.float32))
    assert open_picture(values, four).region((0, 0, 1, 1), (1, 1)).pixels.tolist() == [[[4, 0, 2, 1]]]


@pytest.mark.parametrize("num_channels", [1, 3, 4, 7])
def test_bands_of_a_tiff_are_read_whatever_their_number(num_channels: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    reading = FolderConfig(root="x", range="dtype", channel_sampling=1).reading(1)
    values = np.random.default_rng(0).integers(0, 1 << 16, (9, 8, num_channels)).astype(np.uint16)
    several = {"planarconfig": "contig"} if num_channels > 1 else {}
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", **several)
    region = open_picture(file.getvalue(), reading).region((0, 0, 8, 9), (8, 9))
    np.testing.assert_allclose(region.pixels, values / 65535, atol=1e-6)


def test_a_photograph_has_three_channels_and_a_gray_one() -> None:
    reading = FolderConfig(root="x", range="dtype", channel_sampling=1).reading(1)
    for mode, num_channels in (("RGB", 3), ("L", 1)):
        file = io.BytesIO()
        Image.new(mode, (8, 9), "white").save(file, "PNG")
        region = open_picture(file.getvalue(), reading).region((0, 0, 8, 9), (8, 9))
        assert region.pixels.shape == (9, 8, num_channels)
        assert (region.pixels == 1).all()


def test_missing_pixels_of_any_channels_are_filled_with_the_common_mean() -> None:
    reading = FolderConfig(root="x", range=(0, 1000), nodata=-1, channel_sampling=3).reading(3)
    values = np.full((4, 5, 5), 200, np.int16)
    values[1, 2, 4] = -1
    region = ValuePicture(ArrayPicture(values), reading).region((0, 0, 5, 4), (5, 4))
    assert region.valid is not None
    assert region.valid.sum() == 19
    assert region.pixels[1, 2].tolist() == [500.0] * 5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"channel_sampling": 1}, "channel_sampling needs range"),
        ({"channel_sampling": 2, "range": ((0, 1), (0, 2))}, "any channel takes any place: give one"),
        ({"channel_sampling": 0, "range": (0, 1)}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_are_a_sentence(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        FolderConfig(root="x", **settings)


def test_the_encoder_takes_as_many_channels_as_are_shown() -> None:
    config = FolderConfig(root="x", range=(0, 1), channel_sampling=1)
    with pytest.raises(UserError, match=r"data\.channel_sampling is 1, but in_chans is 3"):
        config.reading(3)
    with pytest.raises(UserError, match=r"data\.channels has 2 entries, but in_chans is 3"):
        FolderConfig(root="x", range=(0, 1), channel_sampling=3, channels=(0, 1)).reading(3)
    assert FolderConfig(root="x", range=(0, 1), channel_sampling=3).statistics(3)[0] == (0.5,) * 3


def plain_mean(image: Tensor, taken: int) -> Tensor:
    """The sum of each group's product with fixed weights, one image after the other."""
    starts = list(range(0, len(image) - taken + 1, taken))
    if len(image) % taken:
        starts.append(len(image) - taken)
    return torch.stack([features(image[None, s : s + taken])[0] for s in starts]).mean(dim=0)


def features(images: Tensor) -> Tensor:
    weights = torch.arange(1, 1 + images[0].numel(), dtype=torch.float32).view(images[0].shape)
    return torch.stack([(images * weights).flatten(1).sum(1), images.flatten(1).amax(1)], dim=1)


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_features_are_the_mean_over_groups_of_an_images_own_channels(taken: int) -> None:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(c, 3, 4, generator=generator) for c in (5, 3, 7, 3, 6, 5)]
    views[2][:, 1, 1] = torch.nan  # A pixel without data is no missing channel.
    calls: list[int] = []

    def counted(images: Tensor) -> Tensor:
        assert images.shape[1] == taken
        calls.append(len(images))
        return features(images.nan_to_num())

    batch = stacked(views)
    assert batch.shape == (6, 7, 3, 4)
    found = mean_over_channels(batch, taken, counted)
    expected = torch.stack([plain_mean(view.nan_to_num(), taken) for view in views])
    torch.testing.assert_close(found, expected)
    assert max(calls) <= 6


def test_images_of_the_encoders_channels_go_through_as_they_are() -> None:
    views = [torch.randn(2, 3, 4) for _ in range(3)]
    assert torch.equal(stacked(views), torch.stack(views))
    batch = torch.stack(views)
    given: list[Tensor] = []
    mean_over_channels(batch, 2, lambda images: given.append(images) or images)  # type: ignore[func-returns-value]
    assert given[0] is batch


def test_normalise_knows_its_channels() -> None:
    assert Normalise((0.5,) * 4, (0.2,) * 4, torch.device("cpu")).num_channels == 4
