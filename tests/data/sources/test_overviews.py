"""Overviews serve training crops if they are averages, and not otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyramids import Pyramid, Shrink, asked, know_pyramids, write_pyramid
from torch.nn.functional import interpolate

from etpp_ssl.data.formats.base import Place, Reading
from etpp_ssl.data.sources.folder import FileSource, FolderConfig
from etpp_ssl.data.sources.overviews import overviews_are_averages
from etpp_ssl.data.sources.splits import open_split
from etpp_ssl.data.views import EvalView, TrainView


@pytest.fixture(autouse=True)
def a_format_of_pyramids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()
    know_pyramids(monkeypatch)


def averaged(values: np.ndarray, factor: int) -> np.ndarray:
    """Means as GDAL has them: the sides of what a pixel stands for need not be whole numbers."""
    for axis in (0, 1):
        size = values.shape[axis]
        edges = np.arange(-(-size // factor) + 1) * size / -(-size // factor)
        pixels = np.arange(size)
        overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        values = np.moveaxis(
            np.tensordot(overlap.clip(0) / (edges[1] - edges[0]), values, (1, axis)), 0, axis
        )
    return values


def cut(values: np.ndarray, factor: int) -> np.ndarray:
    """Means of whole blocks, as most others have them."""
    height, width = (side // factor * factor for side in values.shape[:2])
    blocks = values[:height, :width].reshape(height // factor, factor, width // factor, factor, -1)
    return blocks.mean(axis=(1, 3))


def every_other(values: np.ndarray, factor: int) -> np.ndarray:
    return values[::factor, ::factor].astype(np.float64)


def kernel(values: np.ndarray, factor: int) -> np.ndarray:
    tensor = torch.from_numpy(values.astype(np.float64)).permute(2, 0, 1)[None]
    size = tuple(-(-side // factor) for side in values.shape[:2])
    return interpolate(tensor, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, (*size, 2), dtype=np.uint16)


def told(shrink: Shrink, values: np.ndarray, num_files: int = 3, seed: int = 0, **others: Any) -> bool | None:
    levels = [values, *(shrink(values, factor) for factor in (2, 4, 8))]
    reading = Reading(2, range="dtype", overviews=True)
    return overviews_are_averages(lambda file: Pyramid(levels, reading, **others), num_files, seed)


@pytest.mark.parametrize("size", [(512, 768), (301, 517), (40, 1000)])
def test_averages_are_known_from_pixels_that_were_left_out(size: tuple[int, int]) -> None:
    for seed in range(2):
        assert told(averaged, noise(size), seed=seed) is True
        assert told(lambda values, n: np.rint(averaged(values, n)), noise(size), seed=seed) is True
        assert told(cut, noise(size), seed=seed) is True
        assert told(kernel, noise(size), seed=seed) is True
        assert told(every_other, noise(size), seed=seed) is False
    # Smooth images, too, as long as their pixels differ.
    y, x = np.mgrid[: size[0], : size[1]]
    smooth = (2000 + 1000 * np.sin(x / 9) + 900 * np.cos(y / 13))[:, :, None].repeat(2, 2)
    assert told(averaged, smooth) is True
    assert told(cut, smooth) is True
    assert told(every_other, smooth) is False


def test_one_file_that_is_not_averaged_decides() -> None:
    values = noise((512, 512))
    reading = Reading(2, range="dtype", overviews=True)
    good = Pyramid([values, averaged(values, 2)], reading)
    bad = Pyramid([values, every_other(values, 2)], reading)
    assert overviews_are_averages(lambda file: good, 8, 0) is True
    assert overviews_are_averages(lambda file: bad if file == 5 else good, 8, 0) is False


def test_what_shows_nothing_tells_nothing() -> None:
    assert told(every_other, np.full((300, 300, 2), 7, np.uint16)) is None
    values = noise((512, 512))
    assert told(averaged, values, valid=np.zeros((512, 512), bool)) is None
    assert overviews_are_averages(lambda file: Pyramid([values], Reading(2, overviews=True)), 3, 0) is None
    # Without its overviews.
    levels = [values, every_other(values, 2)]
    assert overviews_are_averages(lambda file: Pyramid(levels, Reading(2)), 3, 0) is None


def test_pixels_without_data_do_not_count() -> None:
    values, valid = noise((512, 512)), np.ones((512, 512), bool)
    holes = values.copy()
    holes[100:400:3, 50:300] = 60_000
    valid[100:400:3, 50:300] = False
    levels = [holes, averaged(values, 2)]
    picture = Pyramid(levels, Reading(2, overviews=True), valid)
    assert overviews_are_averages(lambda file: picture, 3, 0) is True


def opened(root: Path, **keys: Any) -> FileSource:
    config = FolderConfig(root=str(root), **{"range": (0, 4000), **keys})
    source = config.open("train", in_chans=2, image_size=(96, 96), seed=0)
    asked.clear()
    return source


def test_the_key_and_the_check_decide(tmp_path: Path) -> None:
    for number in range(3):
        write_pyramid(tmp_path / "good" / f"{number}.pyr", noise((600, 500), number), averaged)
        write_pyramid(tmp_path / "bad" / f"{number}.pyr", noise((600, 500), number), every_other)
        write_pyramid(tmp_path / "none" / f"{number}.pyr", noise((600, 500), number), None)
    good, bad, none = (opened(tmp_path / name) for name in ("good", "bad", "none"))
    assert good.reading.overviews
    assert good.describe().endswith("; their overviews serve small crops")
    assert not bad.reading.overviews
    assert bad.describe().endswith("; their overviews are not read: they are no averages of the pixels")
    assert not none.reading.overviews
    assert none.describe().endswith("(3 .pyr; no labels)")
    for keys in ({"overviews": "never"}, {"decode": "full"}):
        source = opened(tmp_path / "good", **keys)
        assert not source.reading.overviews
        assert source.describe() == none.describe().replace("/none", "/good")
    assert good.fingerprint() == opened(tmp_path / "good", overviews="never").fingerprint()


def test_windows_crops_come_from_overviews_and_evaluations_do_not(tmp_path: Path) -> None:
    # Blocks of one value, so that every level shows the same.
    values = noise((128, 128)).repeat(4, 0).repeat(4, 1)
    write_pyramid(tmp_path / "a.pyr", noise((600, 700)), averaged)
    write_pyramid(tmp_path / "b.pyr", values, averaged)
    config = FolderConfig(root=str(tmp_path), range=(0, 4000), tile=400, stride=112)
    source = open_split(config, "train", in_chans=2, image_size=(96, 96), seed=0)
    full = open_split(
        config.model_copy(update={"overviews": "never"}), "train", in_chans=2, image_size=(96, 96), seed=0
    )
    assert len(source) == len(full) == 12 + 4
    view = TrainView(
        image_size=(96, 96),
        crop_scale=(0.9, 1.0),
        flip=True,
        lanczos=False,
        seed=0,
        decode="reduced",
        deep=True,
    )
    asked.clear()
    # The last window is b's, and 112 pixels are whole ones at a quarter.
    for index in (12, 13, 14, 15):
        one, other = (s.open(index).region((0, 0, 400, 400), (96, 96)) for s in (source, full))
        assert one.box == (0, 0, 100, 100)
        np.testing.assert_array_equal(one.pixels.repeat(4, 0).repeat(4, 1), other.pixels)
    assert asked == [2, 0] * 4
    asked.clear()
    for sample in range(20):
        view(source.open(3), sample, (96, 96))
    assert set(asked) == {1, 2}
    asked.clear()
    EvalView((96, 96), 0.875)(source.open(3), 0, (96, 96))
    assert asked == [0]


def test_views_of_overviews_show_what_full_ones_show(tmp_path: Path) -> None:
    y, x = np.mgrid[:512, :512]
    smooth = (2000 + 900 * np.sin(x / 40) + 900 * np.cos(y / 31))[:, :, None].repeat(2, 2)
    write_pyramid(tmp_path / "a.pyr", smooth.astype("u2"), averaged)
    view = TrainView(
        image_size=(96, 96),
        crop_scale=(0.2, 1.0),
        flip=True,
        lanczos=False,
        seed=0,
        decode="reduced",
        deep=True,
    )
    one, other = opened(tmp_path), opened(tmp_path, overviews="never")
    for sample in range(30):
        found, expected = (view(source.open(0), sample, (96, 96)) for source in (one, other))
        # Of 1,800 values; less than a pixel is off at the border, where both repeat it.
        assert (found - expected).abs()[:, 3:-3, 3:-3].max() < 8
    assert {1, 2} <= set(asked)


def test_a_place_survives_the_values(tmp_path: Path) -> None:
    place = Place((5.0, 0.5, 0.0, 9.0, 0.0, -0.5), "EPSG:4326")
    write_pyramid(tmp_path / "a.pyr", noise((300, 300)), None, place)
    config = FolderConfig(root=str(tmp_path), range=(0, 4000), tile=100)
    source: Any = open_split(config, "train", in_chans=2, image_size=(96, 96), seed=0)
    assert source.place(5) == place.at(200, 100)
