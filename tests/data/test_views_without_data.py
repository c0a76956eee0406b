"""Views of pictures in which pixels have no data: crops drawn again, fills, and what a batch says of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etpp_ssl.data.formats.base import Reading, WithoutData
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.formats.values import ValuePicture
from etpp_ssl.data.loader import Batch, BatchBuilder
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.views import (
    MAX_CROPS,
    EvalView,
    Normalise,
    ProbeView,
    TrainView,
    by_lanczos,
    has_gaps,
)

SIZE = (20, 28)
LOW = 1000


def picture(values: np.ndarray) -> ValuePicture:
    return ValuePicture(ArrayPicture(values), Reading(2, range=((0.0, 4000.0),), nodata=-1, fill=(0.3, 0.3)))


def scene(share: float, *, seed: int = 0, size: tuple[int, int] = (60, 90)) -> np.ndarray:
    """int16 (H, W, 2), values from 1000 on, of which a share of the columns has data, on the left."""
    values = np.random.default_rng(seed).integers(LOW, 3000, (*size, 2)).astype(np.int16)
    values[:, round(share * size[1]) :] = -1
    return values


def train_view(**changes: Any) -> TrainView:
    settings = {"crop_scale": (0.1, 0.3), "flip": True, "lanczos": False, "seed": 5, "deep": True}
    return TrainView(SIZE, **{**settings, **changes})


def half(view: Tensor, bandwidth: tuple[int, int], progress: float) -> bool:
    return bool(view.isnan().float().mean() <= 0.5)


@pytest.mark.parametrize("decode", ["full", "reduced"])
@pytest.mark.parametrize("bandwidth", [SIZE, (10, 14)])
def test_crops_are_drawn_again_until_they_show_enough(decode: Any, bandwidth: tuple[int, int]) -> None:
    view, plain = train_view(decode=decode, enough=half), train_view(decode=decode)
    image = picture(scene(0.4))
    again = 0
    for sample in range(60):
        found, first = view(image, sample, bandwidth), plain(image, sample, bandwidth)
        assert half(found, bandwidth, 0.0)
        assert not first.isnan().all()
        if half(first, bandwidth, 0.0):
            assert torch.equal(found.nan_to_num(-1), first.nan_to_num(-1))
        else:
            again += 1
        assert torch.equal(found.nan_to_num(-1), view(image, sample, bandwidth).nan_to_num(-1))
    assert 10 < again < 50


def test_whether_a_crop_shows_enough_is_asked_of_what_the_device_gets() -> None:
    asked: list[tuple[Any, ...]] = []

    def enough(view: Tensor, *where: Any) -> bool:
        asked.append((tuple(view.shape), view.isnan().any().item(), *where))
        return True

    view = train_view(lanczos=True, enough=enough, crop_scale=(0.9, 1.0))
    view(picture(scene(0.5)), 0, (10, 14), 0.25)
    assert asked == [((2, 10, 14), True, (10, 14), 0.25)]
    asked.clear()
    # Whole crops are not asked about.
    view(picture(scene(1.0)), 0, (10, 14), 0.25)
    assert asked == []


def test_a_picture_without_enough_data_is_unreadable() -> None:
    tried: list[int] = []

    def enough(view: Tensor, bandwidth: tuple[int, int], progress: float) -> bool:
        tried.append(1)
        return False

    with pytest.raises(WithoutData, match="none of 32 random crops of it has enough pixels with data"):
        train_view(enough=enough, crop_scale=(1.0, 1.0))(picture(scene(0.5)), 0, SIZE)
    assert len(tried) == MAX_CROPS == 32
    for view in (train_view(), train_view(lanczos=True), ProbeView(SIZE, (0.2, 1.0), True, 0)):
        with pytest.raises(WithoutData, match="enough pixels with data"):
            view(picture(scene(0.0)), 0, (10, 14))
    with pytest.raises(WithoutData, match="its centre crop has no pixel with data"):
        EvalView(SIZE, 0.5)(picture(scene(0.1)), 0, SIZE)
    with pytest.raises(WithoutData, match="no pixel with data"):
        EvalView(SIZE, 0.875)(picture(scene(0.0)), 0, SIZE)


def test_eight_bits_are_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1, 3, 4, 4)
    assert not has_gaps(images)
    images[0, 2, 3, 3] = torch.nan
    assert has_gaps(images)
    monkeypatch.setattr(Tensor, "isnan", None)
    monkeypatch.setattr(Tensor, "min", None)
    assert not has_gaps(images.nan_to_num().to(torch.uint8))


def test_a_crop_of_a_probe_shows_data() -> None:
    view, image = ProbeView(SIZE, (0.05, 0.1), True, 0), picture(scene(0.2))
    found = [view(image, sample, SIZE) for sample in range(40)]
    assert not any(one.isnan().all() for one in found)
    assert sum(bool(one.isnan().any()) for one in found) > 5


@pytest.mark.parametrize("fast", [False, True])
def test_lanczos_does_not_ring_around_a_gap(fast: bool) -> None:
    view = torch.full((2, 40, 60), 3000.0)
    view[:, 10:20, 20:41] = torch.nan
    found = by_lanczos(view, (16, 24), fast=fast)
    assert 0 < found.isnan().float().mean() < 0.5
    torch.testing.assert_close(
        found[~found.isnan()], torch.full((1,), 3000.0).expand(int((~found.isnan()).sum()))
    )
    assert by_lanczos(torch.full((2, 40, 60), torch.nan), (16, 24), fast=fast).isnan().all()


def test_a_pixel_that_lacks_one_channel_is_filled_in_all() -> None:
    images = torch.tensor([500.0, 2000.0]).view(1, 2, 1, 1).repeat(1, 1, 2, 3)
    images[0, 1, 0, 1] = torch.nan
    normalise = Normalise(
        (0.3, 0.3), (0.25, 0.25), torch.device("cpu"), Reading(2, range=((0.0, 4000.0),), nodata=-1)
    )
    found = normalise(images)
    assert not found[0, :, 0, 1].any()
    assert (found != 0).sum() == 10


def builder_of(folder: Path) -> BatchBuilder:
    for number, share in enumerate((1.0, 0.4, 0.0, 1.0)):
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{number}.npy", scene(share, seed=number))
    config = FolderConfig(root=str(folder), range=(0, 4000), nodata=-1)
    source = config.open("train", in_chans=2, image_size=SIZE, seed=0)
    return BatchBuilder(source, train_view(enough=half), KeyedOrder(4, 0))


def test_a_batch_says_whether_it_has_gaps_and_what_has_no_data_is_replaced(tmp_path: Path) -> None:
    builder = builder_of(tmp_path / "scenes")

    def batch(*indices: int) -> Batch:
        samples = tuple(range(len(indices)))
        return builder[BatchRequest(0, samples, indices, SIZE, progress=0.0, weight=1.0, last=True)]

    whole = batch(0, 3, 0)
    assert not whole.has_gaps
    assert whole.images.dtype == torch.float32
    with_gaps = batch(0, *[1] * 12)
    assert with_gaps.has_gaps
    assert with_gaps.images.isnan().any()
    assert with_gaps.to(torch.device("meta")).has_gaps
    assert with_gaps.renumbered(3).has_gaps
    replaced = batch(2)
    assert [(bad.index, bad.name, bad.without_data) for bad in replaced.bad] == [(2, "2.npy", True)]
    assert "enough pixels with data" in replaced.bad[0].reason


def test_a_view_that_asks_can_be_pickled(tiny_recipe: Callable[..., Any]) -> None:
    from etpp_ssl.tasks.mae import MaskedAutoencoding, shows_enough

    recipe = tiny_recipe()
    view = MaskedAutoencoding(recipe, recipe.build_model(), torch.device("cpu")).view
    again = pickle.loads(pickle.dumps(view))
    assert again.enough.args == view.enough.args
    assert isinstance(view.enough, partial)
    assert view.enough.func is shows_enough
    assert again.enough.args[0].min_valid == 0.25
