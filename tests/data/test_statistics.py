"""Counts of values against numpy's own numbers, whatever the type, the strips and the number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from etpp_ssl.data import statistics
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.sources.folder import open_folder
from etpp_ssl.data.statistics import Channel, Values, read_values, values_of

QUANTILES = (0.0, 0.001, 0.01, 0.25, 0.5, 0.99, 0.999, 1.0)
INTEGERS = ("bool", "uint8", "int8", "uint16", "int16")
OTHERS = ("uint32", "int32", "float16", "float32", "float64")


def arrays(dtype: str, count: int = 5) -> list[np.ndarray]:
    """(H, W, 2) of any size, channels of other ranges, one of them with its lowest bits 0."""
    draw = np.random.default_rng(3)
    found = []
    for number in range(count):
        size = (11 + number, 17)
        if np.dtype(dtype).kind == "f":
            planes = [draw.normal(-3, 20, size), np.exp(draw.normal(0, 2, size))]
        elif dtype == "bool":
            planes = [draw.random(size) < 0.3, draw.random(size) < 2]
        else:
            info = np.iinfo(dtype)
            low, high = max(info.min, -70_000), min(info.max, 300_000)
            planes = [draw.integers(low, high, size), draw.integers(low // 8, high // 8, size) * 4]
        found.append(np.stack(planes, axis=2).astype(dtype))
    return found


def counted(images: list[np.ndarray]) -> Values:
    values = Values()
    for number, image in enumerate(images):
        values.add(values_of(ArrayPicture(image), f"{number}.npy", None))
    return values


@pytest.mark.parametrize("dtype", INTEGERS)
def test_small_integers_are_exact(dtype: str) -> None:
    images = arrays(dtype)
    for number, channel in enumerate(counted(images).channels[dtype]):
        whole = np.concatenate([image[:, :, number].ravel() for image in images]).astype(np.int64)
        expected = np.quantile(whole, QUANTILES, method="inverted_cdf")
        assert [channel.quantile(share) for share in QUANTILES] == expected.tolist()
        assert (channel.least, channel.most) == (whole.min(), whole.max())
        assert channel.total == len(whole)
        np.testing.assert_allclose(channel.moments(), (whole.mean(), whole.std()), rtol=1e-12, atol=1e-12)
        assert channel.levels() == len(np.unique(whole))
        assert channel.levels(shift=2) == len(np.unique(whole >> 2))
        assert channel.saturated == (whole == whole.max()).mean()
        low, high = np.quantile(whole, (0.1, 0.8), method="inverted_cdf")
        assert channel.outside(low, high) == pytest.approx(((whole < low) | (whole > high)).mean())


@pytest.mark.parametrize("dtype", OTHERS)
def test_other_types_are_within_a_4096th(dtype: str) -> None:
    images = arrays(dtype)
    for number, channel in enumerate(counted(images).channels[dtype]):
        whole = np.concatenate([image[:, :, number].ravel() for image in images]).astype(np.float64)
        expected = np.quantile(whole, QUANTILES, method="inverted_cdf")
        found = np.array([channel.quantile(share) for share in QUANTILES])
        np.testing.assert_allclose(found, expected, rtol=1 / 4096 + 1e-6)
        assert (channel.least, channel.most) == (whole.min(), whole.max())
        np.testing.assert_allclose(channel.moments(), (whole.mean(), whole.std()), rtol=1e-12)
        assert channel.levels() is None


def test_zeros_of_floats_are_zeros() -> None:
    image = np.repeat(np.array([-2, 0, 0, -0.0, 1], np.float32), 20).reshape(5, 20, 1)
    (channel,) = counted([image]).channels["float32"]
    assert channel.quantile(0.5) == 0
    assert channel.quantile(0.3) == 0


def test_every_bin_of_floats_stands_for_a_value_of_its_own() -> None:
    channel = Channel(np.dtype(np.float32))
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) > np.finfo(np.float32).tiny)]
    back = channel.binning.values(channel.binning.bins(values))
    assert (channel.binning.bins(back.astype(np.float32)) == channel.binning.bins(values)).all()
    np.testing.assert_allclose(back, values, rtol=1 / 4096)
    ordered = np.sort(values)
    assert (np.diff(channel.binning.bins(ordered)) >= 0).all()


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ([0, 4095], (0, 12)),
        ([16, 65520], (4, 12)),
        ([0, 0], (0, 0)),
        ([257, 514], (0, 10)),
        ([256, 768], (8, 2)),
    ],
)
def test_the_bits_that_are_used(values: list[int], bits: tuple[int, int]) -> None:
    image = np.array(values, np.uint16).reshape(1, 2, 1)
    (channel,) = counted([image]).channels["uint16"]
    assert channel.used_bits == bits


def test_pixels_without_data_are_counted_apart() -> None:
    image = np.arange(40, dtype=np.int16).reshape(5, 8, 1)
    valid = np.ones((5, 8), bool)
    valid[0] = False
    values = Values()
    values.add(values_of(ArrayPicture(image, valid), "a", 39))
    (channel,) = values.channels["int16"]
    assert (values.num_pixels, values.num_missing) == (40, 9)
    assert (channel.least, channel.most, channel.total) == (8, 38, 31)
    hidden = np.full((2, 2, 1), np.nan, np.float32)
    values.add(values_of(ArrayPicture(hidden), "b", None))
    assert values.num_missing == 13
    assert values.channels["float32"] == []


def test_of_a_large_picture_the_middle_can_do() -> None:
    image = np.zeros((20, 31, 1), np.uint16)
    image[8:12, 13:17] = np.arange(1, 17).reshape(4, 4, 1)
    values = Values()
    values.add(values_of(ArrayPicture(image), "a", None, most_pixels=4))
    (channel,) = values.channels["uint16"]
    assert (channel.least, channel.most, channel.total) == (1, 16, 16)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_strips_change_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = arrays(dtype)
    whole = counted(images).channels[dtype]
    monkeypatch.setattr(statistics, "STRIP_VALUES", 70)
    for channel, other in zip(whole, counted(images).channels[dtype], strict=True):
        assert (channel.counts == other.counts).all()
        assert channel.used_bits == other.used_bits
        np.testing.assert_allclose(channel.moments(), other.moments(), rtol=1e-14)


def test_values_beyond_float32_are_refused_as_a_run_refuses_them() -> None:
    with pytest.raises(UnreadableImage, match="float32 does not reach"):
        values_of(ArrayPicture(np.full((2, 2, 1), 1e300)), "a", None)


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path) -> None:
    for number, image in enumerate([*arrays("float32", 23), *arrays("uint16", 7)]):
        np.save(tmp_path / f"{number:02}.npy", image)
    (tmp_path / "30.npy").write_bytes(b"\x93NUMPY no")
    source = open_folder("data.root", tmp_path, Reading(2, range="raw"))
    found = [read_values(source, range(31), None, num_workers=workers) for workers in (0, 1, 3)]
    for other in found[1:]:
        assert other.num_images == found[0].num_images == {"float32": 23, "uint16": 7}
        assert other.unreadable == found[0].unreadable
        assert list(other.unreadable.values()) == [["30.npy"]]
        for name, channels in found[0].channels.items():
            for one, two in zip(channels, other.channels[name], strict=True):
                assert (one.counts == two.counts).all()
                assert one.moments() == two.moments()
                assert (one.least, one.most, one.used_bits) == (two.least, two.most, two.used_bits)
