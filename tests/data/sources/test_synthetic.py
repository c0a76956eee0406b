"""Synthetic pictures: functions of (seed, split, index), with a natural spectrum and learnable classes."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from etpp_ssl.data.formats.base import Region
from etpp_ssl.data.sources import synthetic
from etpp_ssl.data.sources.synthetic import CLASSES, KINDS, SHAPES, TEXTURES, SyntheticConfig, SyntheticSource
from etpp_ssl.data.views import to_tensor
from etpp_ssl.randomness import keyed_numpy


def source(
    split: str = "train", *, in_chans: int = 3, image_size: tuple[int, int] = (21, 34), **settings: object
) -> SyntheticSource:
    config = SyntheticConfig(**settings)  # type: ignore[arg-type]
    return config.open(split, in_chans=in_chans, image_size=image_size, seed=0)


def images(data: SyntheticSource, count: int) -> np.ndarray:
    """float64 (count, C, H, W) in [0, 1]."""
    return np.stack([to_tensor(data.open(i).channels()).numpy() for i in range(count)]) / 255.0


def test_a_picture_is_a_function_of_seed_split_and_index() -> None:
    data = source()
    first = to_tensor(data.open(5).channels())
    for index in (0, 6, 2000):
        data.open(index).channels()
    np.random.seed(1)
    for again in (data, source(), pickle.loads(pickle.dumps(data)), source(num_images=6)):
        assert (to_tensor(again.open(5).channels()) == first).all()
    others = [data.open(15).channels(), source("eval").open(5).channels(), source(seed=1).open(5).channels()]
    for other in others:
        assert (to_tensor(other) != first).float().mean() > 0.5


def test_channels_share_most_of_their_background() -> None:
    corners = images(source(image_size=(40, 48)), 60)[:, :, :7, :9]
    steps = np.diff(corners, axis=3).reshape(60, 3, -1)
    shared = np.mean([np.corrcoef(step)[0, 1] for step in steps])
    assert 0.6 < shared < 0.999


def test_the_recipes_seed_plays_no_part_and_its_size_only_by_default() -> None:
    config = SyntheticConfig()
    left, right = (config.open("train", in_chans=3, image_size=(20, 30), seed=s) for s in (0, 1))
    assert (to_tensor(left.open(3).channels()) == to_tensor(right.open(3).channels())).all()
    assert left.open(3).channels()[0].size == (30, 20)
    assert source(size=17).open(3).channels()[0].size == (17, 17)
    assert source(size=(12, 19)).open(3).channels()[0].size == (19, 12)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(21, 34), (40, 17), (16, 16), (1, 1), (1, 9), (2, 3)])
def test_any_size_and_channel_count(in_chans: int, size: tuple[int, int]) -> None:
    data = source(in_chans=in_chans, image_size=size)
    for index in range(len(CLASSES)):
        channels = data.open(index).channels()
        assert len(channels) == (1 if in_chans == 3 else in_chans)
        assert {channel.mode for channel in channels} == {"RGB" if in_chans == 3 else "L"}
        assert {channel.size for channel in channels} == {size[::-1]}
    if min(size) >= 16:
        pixels = to_tensor(data.open(0).channels()).flatten(1).double().numpy()
        assert pixels.std(axis=1).min() > 5
        if in_chans > 1:
            correlation = np.corrcoef(pixels)[0, 1]
            assert 0.3 < correlation < 0.99999


@pytest.mark.parametrize("num_classes", [2, 7, 10])
def test_labels_are_balanced_and_need_no_picture(num_classes: int) -> None:
    # Pictures that no memory holds.
    data = source(num_images=103, num_classes=num_classes, image_size=(10**7, 10**7))
    with pytest.raises(MemoryError):
        data.open(0)
    counts = np.bincount([data.label(i) for i in range(len(data))], minlength=num_classes)
    assert len(data) == counts.sum() == 103
    assert len(counts) == num_classes
    assert counts.max() - counts.min() <= 1
    assert data.classes == list(CLASSES[:num_classes])
    assert CLASSES[data.label(9)] in data.name(9)
    assert len({data.name(i) for i in range(103)}) == 103


def test_every_shape_and_every_texture_is_in_two_classes() -> None:
    assert len(set(KINDS)) == len(set(CLASSES)) == 10
    for position, names in ((0, SHAPES), (1, TEXTURES)):
        assert [kind[position] for kind in KINDS].count(names[0]) == 2
        assert sorted(kind[position] for kind in KINDS) == sorted(names * 2)


@pytest.mark.parametrize("index", [-1, 12])
def test_no_picture_outside_the_data_set(index: int) -> None:
    with pytest.raises(IndexError):
        source(num_images=12).open(index).channels()


def test_split_sizes() -> None:
    assert len(source(num_images=7, num_eval_images=3)) == 7
    assert len(source("eval", num_images=7, num_eval_images=3)) == 3


def test_fingerprint_follows_everything_that_determines_the_pictures() -> None:
    variants = [
        source(),
        source("eval", num_eval_images=2048),
        source(in_chans=1),
        source(image_size=(21, 35)),
        source(num_images=2047),
        source(num_classes=9),
        source(seed=1),
    ]
    prints = [variant.fingerprint() for variant in variants]
    assert len(set(prints)) == len(prints)
    assert source().fingerprint() == prints[0]
    assert source(size=(21, 34), image_size=(50, 50), num_workers=0).fingerprint() == prints[0]


@pytest.mark.parametrize(
    "wrong", [{"num_classes": 1}, {"num_classes": 11}, {"num_images": 0}, {"size": 0}, {"size": (8, 0)}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticConfig(**wrong)  # type: ignore[arg-type]


def slope(pictures: np.ndarray) -> float:
    """Exponent of the mean amplitude against frequency, from 1 to N / 2 cycles: (B, N, N) in."""
    side = pictures.shape[-1]
    power = (np.abs(np.fft.fft2(pictures - pictures.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    cycles = side * np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    rings = np.arange(1, side // 2)
    amplitude = [np.sqrt(power[np.rint(cycles) == ring].mean()) for ring in rings]
    return float(np.polyfit(np.log(rings), np.log(amplitude), 1)[0])


@pytest.mark.parametrize("side", [32, 49])
def test_the_spectrum_falls_like_one_over_frequency(side: int) -> None:
    pictures = images(source(image_size=(side, side)), 600)
    # Photographs lie between -0.8 and -1.5 (Tolhurst et al., 1992); noise would give 0, blobs -2.
    assert -1.3 < slope(pictures.mean(axis=1)) < -0.9


@pytest.mark.parametrize("size", [(48, 48), (31, 40), (40, 31), (2, 2), (5, 1), (1, 6)])
def test_noise_has_the_promised_variance_and_spectrum(size: tuple[int, int]) -> None:
    fields = synthetic._noise(keyed_numpy(0, "test"), 4000, size).astype(np.float64)
    assert fields.shape == (4000, *size)
    assert abs(fields.mean(axis=(1, 2))).max() < 1e-5
    assert fields.var() == pytest.approx(1, abs=0.05)
    power = (np.abs(np.fft.fft2(fields)) ** 2).mean(axis=0)
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None])
    flat = (power * frequency**2).ravel()[1:]
    # A mean over 4000 draws of an exponential (or chi-squared) variable: standard error 2.3 % at most.
    np.testing.assert_allclose(flat / flat.mean(), 1, atol=0.13)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_cover_the_same_area_with_soft_edges(shape: str) -> None:
    rows, columns = synthetic._pixel_centres((121, 141))
    for angle in (0.0, 0.7, 2.0):
        covered = synthetic._coverage(shape, columns - 70.3, rows - 60.2, 30.0, angle)
        assert covered.shape == (121, 141)
        assert covered.min() == 0
        assert covered.max() == 1
        assert covered.sum() == pytest.approx(np.pi * 30**2, rel=0.015)
        assert ((covered > 0.1) & (covered < 0.9)).sum() > 100


def test_shapes_turn_and_differ() -> None:
    rows, columns = synthetic._pixel_centres((61, 61))
    masks = [synthetic._coverage(s, columns - 30.5, rows - 30.5, 15.0, 0.3) for s in SHAPES]
    for i, mask in enumerate(masks):
        turned = synthetic._coverage(SHAPES[i], columns - 30.5, rows - 30.5, 15.0, 0.3 + 2 * np.pi)
        np.testing.assert_allclose(turned, mask, atol=1e-4)
        assert all(np.abs(mask - other).sum() > 50 for other in masks[:i])


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_textures_have_unit_contrast(texture: str) -> None:
    rows, columns = synthetic._pixel_centres((64, 80))
    draw = keyed_numpy(0, "test")
    squares, means = [], []
    for _ in range(60):
        field = synthetic._noise(draw, 1, (64, 80))[0]
        pattern = synthetic._pattern(texture, draw, field, columns, rows, 8.0, 6.3 * draw.random())
        squares.append(np.square(pattern).mean())
        means.append(pattern.mean())
    assert np.mean(squares) == pytest.approx(1, abs=0.25)
    assert abs(np.mean(means)) < 0.1


def nearest_neighbours(train: np.ndarray, test: np.ndarray, classes: int, k: int) -> float:
    """Accuracy of a majority vote among the k nearest rows; label = index modulo classes."""
    distance = np.square(train).sum(axis=1) - 2 * test @ train.T
    votes = np.argpartition(distance, k, axis=1)[:, :k] % classes
    counts = (votes[:, :, None] == np.arange(classes)).sum(axis=1)
    return float((counts.argmax(axis=1) == np.arange(len(test)) % classes).mean())


def directions(pictures: np.ndarray) -> np.ndarray:
    """Pixels without their mean, at unit length: the closest that raw pixels come to the classes."""
    rows = (pictures - pictures.mean(axis=(2, 3), keepdims=True)).reshape(len(pictures), -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def local_patterns(pictures: np.ndarray) -> np.ndarray:
    """Mean responses of random 5 x 5 filters, rectified, on luma without its local mean: (B, 128)."""
    luma = pictures.mean(axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(luma, (5, 5), axis=(1, 2))[:, ::2, ::2]
    patches = windows.reshape(*windows.shape[:3], 25)
    patches = patches - patches.mean(axis=-1, keepdims=True)
    filters = np.random.default_rng(0).standard_normal((25, 64))
    responses = np.abs(patches @ filters)
    spread = np.sqrt(responses.var(axis=(1, 2)))
    return np.concatenate([responses.mean(axis=(1, 2)), spread], axis=1)


def test_classes_can_be_learnt_but_not_from_pixels_or_colours() -> None:
    train, test = images(source(image_size=(32, 32)), 2000), images(source("eval", image_size=(32, 32)), 500)
    pixels = nearest_neighbours(directions(train), directions(test), 10, 1)
    colours = nearest_neighbours(train.mean(axis=(2, 3)), test.mean(axis=(2, 3)), 10, 20)
    left, right = local_patterns(train), local_patterns(test)
    # A linear map of local statistics is about the least that an encoder would have to find.
    centre, scale = left.mean(axis=0), left.std(axis=0)
    left, right = ((part - centre) / scale for part in (left, right))
    labels = np.eye(10)[np.arange(2000) % 10]
    weights = np.linalg.solve(left.T @ left + 10 * np.eye(left.shape[1]), left.T @ (labels - 0.1))
    linear = float(((right @ weights).argmax(axis=1) == np.arange(500) % 10).mean())
    # Chance is 0.1, four standard errors of 500 draws are 0.054.
    assert pixels < 0.31
    assert colours < 0.155
    assert linear > 0.4


def raw(*, in_chans: int = 3, image_size: tuple[int, int] = (24, 30), **settings: object) -> SyntheticSource:
    """A source whose pictures have the values of their type."""
    data = source(in_chans=in_chans, image_size=image_size, range=(0.0, 1.0), **settings)
    return replace(data, reading=replace(data.reading, range="raw"))


def region(data: SyntheticSource, index: int) -> Region:
    size = data.size[::-1]
    return data.open(index).region((0, 0, *size), size)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 13])
@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"dtype": "uint8"}, 0, 255),
        ({"dtype": "uint16"}, 0, 65535),
        ({"dtype": "uint16", "bits": 12}, 0, 4095),
        ({"dtype": "int16"}, -32768, 32767),
        ({"dtype": "int16", "bits": 12}, -2048, 2047),
        ({"dtype": "float32"}, 0, 1),
    ],
)
def test_another_depth_is_the_same_picture_with_finer_levels(
    settings: dict[str, object], low: int, high: int, in_chans: int
) -> None:
    plain = source(in_chans=in_chans, image_size=(24, 30))
    deep = raw(in_chans=in_chans, **settings)
    for index in range(4):
        values = region(deep, index).pixels
        assert values.dtype == settings["dtype"]
        assert values.shape == (24, 30, in_chans)
        assert values.min() >= low
        assert values.max() <= high
        shown = to_tensor(plain.open(index).channels()).permute(1, 2, 0).numpy()
        np.testing.assert_allclose((values.astype(np.float64) - low) / (high - low) * 255, shown, atol=0.6)


def test_a_deep_picture_has_levels_that_8_bits_lack_and_the_same_spectrum() -> None:
    values = np.stack(
        [region(raw(dtype="uint16", image_size=(32, 32)), i).pixels[:, :, 0] for i in range(300)]
    )
    assert len(np.unique(values[0])) > 700
    assert len(np.unique(values & 255)) == 256
    assert -1.3 < slope(values / 65535) < -0.9


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_gaps_lie_on_one_side_and_hold_no_values(dtype: str) -> None:
    data = raw(dtype=dtype, gaps=0.2)
    shares = []
    for index in range(200):
        values, _, valid = region(data, index)
        assert valid is not None
        missing = values[~valid]
        assert np.isnan(missing).all() if dtype == "float32" else (missing == 0).all()
        shares.append((~valid).mean())
        # Along each row and column data begins or ends once at most.
        for axis in (0, 1):
            assert (np.diff(valid.astype(int), axis=axis) != 0).sum(axis=axis).max() <= 1
    assert 0.17 < np.mean(shares) < 0.23
    assert max(shares) < 0.42
    whole = raw(dtype=dtype)
    values, _, valid = region(data, 3)
    assert (values[valid] == region(whole, 3).pixels[valid]).all()


def test_of_a_faint_picture_8_bits_see_nothing_and_16_all() -> None:
    plain, faint = raw(dtype="uint16"), raw(dtype="uint16", faint=True)
    for index in range(20):
        values = region(faint, index).pixels
        assert len(np.unique(values >> 8)) == 1
        whole = np.clip(region(plain, index).pixels / 65535, 0, 1)
        np.testing.assert_allclose((values / 65535 - 3092 / 65536) / (200 / 65536), whole, atol=0.01)


def test_the_fingerprint_follows_the_depth() -> None:
    variants = [
        raw(),
        raw(dtype="uint16"),
        raw(dtype="uint16", bits=12),
        raw(dtype="uint16", faint=True),
        raw(dtype="int16"),
        raw(dtype="uint16", gaps=0.1),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    assert raw().fingerprint() == source(image_size=(24, 30)).fingerprint()
    assert raw(dtype="uint16", bits=16).fingerprint() == variants[1].fingerprint()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"dtype": "uint8", "bits": 12}, "at most 8"),
        ({"dtype": "float32", "bits": 12, "range": (0, 1)}, "floats"),
        ({"faint": True}, "more than 8 bits"),
        ({"dtype": "uint16", "bits": 8, "faint": True}, "more than 8 bits"),
        ({"gaps": 0.1}, "gaps needs range"),
        ({"dtype": "uint32"}, "uint16"),
    ],
)
def test_depths_that_do_not_fit_together_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SyntheticConfig(**wrong)  # type: ignore[arg-type]
