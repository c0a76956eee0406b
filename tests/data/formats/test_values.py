"""Values of any depth, from the file to the normalised view: against plain numpy in float64."""

from __future__ import annotations

import io
import json
import math
import sys
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from etpp_ssl.config import UserError
from etpp_ssl.data.formats import open_picture
from etpp_ssl.data.formats.base import Reading, Region, UnreadableImage
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.formats.values import ValuePicture
from etpp_ssl.data.given import viewed
from etpp_ssl.data.resize import resize
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.views import EvalView, Normalise, ProbeView, TrainView, random_crop_box
from etpp_ssl.randomness import keyed_random

DTYPES = ("uint8", "uint16", "int16", "int32", "float16", "float32", "float64", "bool")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def drawn(dtype: str, shape: tuple[int, ...] = (7, 10, 2), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.startswith("float"):
        return (rng.standard_normal(shape) * 100).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(max(info.min, -(2**24)), min(info.max, 2**24), shape, dtype=dtype, endpoint=True)


def whole(data: bytes, reading: Reading) -> Region:
    picture = open_picture(data, reading)
    return picture.region((0, 0, *picture.size), picture.size)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_of_number_arrives_as_it_is(dtype: str, order: str) -> None:
    values = drawn(dtype)
    stored = values.astype(values.dtype.newbyteorder(order))
    found = whole(npy(stored), Reading(2, range=((-1e6, 1e6),)))
    assert found.pixels.dtype == np.float32
    assert found.valid is None
    np.testing.assert_array_equal(found.pixels, values.astype(np.float32))


@pytest.mark.parametrize(("axes", "order"), [("hwc", (0, 1, 2)), ("chw", (2, 0, 1)), ("wch", (1, 2, 0))])
def test_axes_are_taken_as_they_are_named(axes: str, order: tuple[int, ...]) -> None:
    values = drawn("int16")
    reading = Reading(2, range=((0, 1),), axes=axes)
    np.testing.assert_array_equal(whole(npy(values.transpose(order)), reading).pixels, values)


def test_channels_are_chosen_ordered_and_repeated_only_when_asked() -> None:
    values = drawn("uint16", (4, 5, 6))
    reading = Reading(3, range=((0, 65535),), channels=(5, 0, 5))
    np.testing.assert_array_equal(whole(npy(values), reading).pixels, values[:, :, [5, 0, 5]])
    with pytest.raises(UnreadableImage, match=r"no channel 6 of data\.channels; there are 0 to 5"):
        whole(npy(values), Reading(1, range=((0, 1),), channels=(6,)))
    with pytest.raises(UnreadableImage, match=r"not \(height, width, 4\)"):
        whole(npy(values), Reading(4, range=((0, 1),)))


def gray16(values: np.ndarray, form: str) -> bytes:
    file = io.BytesIO()
    if form == "PGM":
        most = int(values.max())
        return b"P5\n# a comment\n%d %d\n%d\n" % (*values.shape[::-1], most) + values.astype(">u2").tobytes()
    Image.fromarray(values).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "PGM"])
@pytest.mark.parametrize("most", [300, 4095, 16383, 65535])
def test_gray_images_keep_every_level(form: str, most: int) -> None:
    values = np.random.default_rng(0).integers(0, most, (9, 14), dtype=np.uint16, endpoint=True)
    values[0, 0] = most
    found = whole(gray16(values, form), Reading(1, range=((0, most),))).pixels
    np.testing.assert_array_equal(found[:, :, 0], values)
    with pytest.raises(UnreadableImage, match="1 channel, but in_chans is 3"):
        whole(gray16(values, form), Reading(3, range=((0, most),)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_colours_of_16_bits_keep_every_level_upright_and_without_alpha(orientation: int) -> None:
    values = drawn("uint16", (9, 14, 4))
    plain = Image.fromarray((values[:, :, :3] >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    plain.save(file, "PNG", exif=exif)
    chunk = file.getvalue()[file.getvalue().index(b"eXIf") - 4 :]
    chunk = chunk[: 12 + int.from_bytes(chunk[:4], "big")]
    # Behind the signature and the header.
    data = imagecodecs.png_encode(values)
    data = data[:33] + chunk + data[33:]
    found = whole(data, Reading(3, range="dtype")).pixels
    upright = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    np.testing.assert_array_equal(np.rint(found * 65535).astype(int) >> 8, upright)
    if orientation == 1:
        np.testing.assert_array_equal(np.rint(found * 65535), values[:, :, :3])


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_avif_keeps_its_depth(bits: int, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (9, 14) if samples == 1 else (9, 14, samples)
    values = np.random.default_rng(0).integers(0, 2**bits, shape, np.uint8 if bits == 8 else np.uint16)
    data = imagecodecs.avif_encode(values, level=100, bitspersample=bits)
    expected = np.atleast_3d(values)[:, :, :3]
    for reading in (Reading(expected.shape[2], range=((0, 4095),)), Reading(expected.shape[2], range="raw")):
        found = whole(data, reading).pixels
        np.testing.assert_allclose(found, expected, atol=1 if bits == 8 else 0)
    channels = np.dstack([np.asarray(channel) for channel in open_picture(data, Reading(3)).channels()])
    assert abs(channels.astype(float).mean() - (expected >> (bits - 8)).mean()) < 6
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    if bits > 8:
        with pytest.raises(UnreadableImage, match=r"AVIF of more than 8 bits needs imagecodecs.*\[tiff\]"):
            whole(data, Reading(expected.shape[2], range=((0, 4095),)))


def test_8_bits_become_shares_of_their_type_or_raw_values() -> None:
    values = drawn("uint8", (6, 5, 3))
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    np.testing.assert_array_equal(whole(file.getvalue(), Reading(3, range=((0, 99),))).pixels, values)
    shares = whole(file.getvalue(), Reading(3, range="dtype")).pixels
    np.testing.assert_array_equal(shares, values / np.float32(255))
    with pytest.raises(UnreadableImage, match="float32, whose type tells no range"):
        whole(npy(drawn("float32")), Reading(2, range="dtype"))


def test_without_a_range_what_8_bits_cannot_hold_is_refused() -> None:
    for dtype in ("int16", "float32", "int32"):
        with pytest.raises(UnreadableImage, match=r"not uint8 or uint16: data\.range reads them"):
            open_picture(npy(drawn(dtype)), Reading(2))
    for values in (np.array([[["a"]]]), np.array([[[1j]]])):
        with pytest.raises(UnreadableImage, match="integers and floats are read"):
            whole(npy(values), Reading(1, range=((0, 1),)))


@pytest.mark.parametrize(
    ("dtype", "nodata", "stored"),
    [
        ("float32", None, math.nan),
        ("float32", None, math.inf),
        ("float32", -9999.0, -9999.0),
        ("float32", -3.4028234663852886e38, np.float32(-3.4028235e38)),
        ("float64", -1.7976931348623157e308, -1.7976931348623157e308),
        ("int16", -32768.0, -32768),
        ("uint8", 0.0, 0),
    ],
)
def test_pixels_without_data_are_marked_and_filled_with_the_mean(
    dtype: str, nodata: float | None, stored: Any
) -> None:
    values = np.abs(drawn(dtype, (6, 9, 2))) % 100 + 1
    values = values.astype(dtype)
    values[2, 3, 1] = stored
    values[4, :, 0] = stored
    reading = Reading(2, range=((0, 200), (0, 400)), nodata=nodata, fill=(0.5, 0.25))
    found = whole(npy(values), reading)
    expected = np.ones((6, 9), bool)
    expected[2, 3] = expected[4] = False
    assert found.valid is not None
    np.testing.assert_array_equal(found.valid, expected)
    np.testing.assert_array_equal(found.pixels[~expected], np.full((10, 2), 100, np.float32))
    np.testing.assert_array_equal(found.pixels[expected], values[expected].astype(np.float32))


def test_values_outside_the_range_are_noticed_and_clipped_only_when_asked() -> None:
    values = np.array([[[-5.0], [0.0], [7.0], [10.0], [11.0]]], np.float32)
    for clip in (False, True):
        picture = open_picture(npy(values), Reading(1, range=((0, 10),), clip=clip))
        assert isinstance(picture, ValuePicture)
        assert not picture.outside
        found = picture.region((0, 0, 5, 1), (5, 1)).pixels
        assert picture.outside
        np.testing.assert_array_equal(found, values.clip(0, 10) if clip else values)
    inside = open_picture(npy(values), Reading(1, range=((-5, 11),)))
    inside.region((0, 0, 5, 1), (5, 1))
    assert not inside.outside  # type: ignore[attr-defined]
    too_large = np.full((2, 3, 1), 1e300)
    with pytest.raises(UnreadableImage, match="float32 does not reach"):
        whole(npy(too_large), Reading(1, range=((0, 1),)))


def kernel(name: str, x: np.ndarray) -> np.ndarray:
    """The resize kernels in float64: the triangle, and Keys' cubic with a = -1/2."""
    x = np.abs(x)
    if name == "bilinear":
        return np.maximum(0, 1 - x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def plain_weights(name: str, size: int, start: float, end: float, out: int) -> np.ndarray:
    """(out, size): an antialiased resize of [start, end) along one axis, in float64."""
    factor = (end - start) / out
    spread = max(factor, 1)
    centres = start + (np.arange(out) + 0.5) * factor
    weights = kernel(name, (np.arange(size)[None] + 0.5 - centres[:, None]) / spread)
    return weights / weights.sum(axis=1, keepdims=True)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    out=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    channels=st.sampled_from([1, 3, 5]),
    name=st.sampled_from(["bilinear", "bicubic"]),
)
@settings(max_examples=40, deadline=None)
def test_resizes_equal_float64_without_wrap_or_clamp(
    height: int, width: int, out: tuple[int, int], channels: int, name: Any
) -> None:
    values = drawn("int16", (height, width, channels), seed=height * 41 + width).astype(np.float32)
    found = resize(Region(values, (0, 0, width, height)), out[::-1], name)
    rows = plain_weights(name, height, 0, height, out[0])
    columns = plain_weights(name, width, 0, width, out[1])
    expected = np.einsum("yh,hwc,xw->cyx", rows, values.astype(np.float64), columns)
    # A quarter of a level of 16 bits: torch computes in float32 where the kernel lies.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=0.25)


def test_boxes_between_pixels_are_resized_alike() -> None:
    values = drawn("int16", (30, 41, 2)).astype(np.float32)
    for box in ((0, 0, 20.5, 30), (0.5, 0.25, 40.5, 29.75), (3.5, 0, 41, 30)):
        found = resize(Region(values, box), (13, 11), "bicubic").numpy()
        rows = plain_weights("bicubic", 30, box[1], box[3], 11)
        columns = plain_weights("bicubic", 41, box[0], box[2], 13)
        expected = np.einsum("yh,hwc,xw->cyx", rows, values.astype(np.float64), columns)
        # Kernels differ at a box's border: torch's see the pixels beyond it, Pillow's do not.
        np.testing.assert_allclose(found[:, 3:-3, 3:-3], expected[:, 3:-3, 3:-3], rtol=0, atol=0.5)


def test_what_is_made_of_pixels_without_data_has_none() -> None:
    values = np.ones((20, 30, 1), np.float32)
    valid = np.ones((20, 30), bool)
    valid[:, 12:15] = False
    found = resize(Region(values, (0, 0, 30, 20), valid), (10, 10), "bicubic")[0]
    gaps = found.isnan().all(dim=0)
    assert torch.equal(found.isnan().any(dim=0), gaps)
    # Output pixel i stands for the input pixels 3 i to 3 i + 2, and its kernel reaches 3 further each way.
    assert gaps.nonzero()[:, 0].tolist() == [3, 4, 5]


VIEWS = {
    "full": TrainView((12, 16), (0.2, 1.0), flip=True, lanczos=False, seed=3, decode="full", deep=True),
    "reduced": TrainView((12, 16), (0.2, 1.0), flip=True, lanczos=False, seed=3, decode="reduced", deep=True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_training_views_are_the_crop_in_float64(name: str) -> None:
    values = drawn("uint16", (31, 45, 3))
    picture = open_picture(npy(values), Reading(3, range=((0, 65535),)))
    for sample in range(6):
        view = VIEWS[name](picture, sample, (12, 16))
        assert view.dtype == torch.float32
        draw = keyed_random(3, "crop", sample)
        left, top, right, bottom = random_crop_box((45, 31), (0.2, 1.0), draw)
        part = values[top:bottom, left:right].astype(np.float64)
        rows = plain_weights("bicubic", bottom - top, 0, bottom - top, 12)
        columns = plain_weights("bicubic", right - left, 0, right - left, 16)
        expected = np.einsum("yh,hwc,xw->cyx", rows, part, columns)
        if draw.random() < 0.5:
            expected = expected[:, :, ::-1]
        np.testing.assert_allclose(view.numpy(), expected, rtol=0, atol=0.25)


def test_views_of_8_bits_agree_with_pillow_to_its_rounding() -> None:
    values = drawn("uint8", (31, 45, 3))
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    shallow = open_picture(file.getvalue(), Reading(3))
    deep = open_picture(file.getvalue(), Reading(3, range=((0, 255),)))
    for view in (EvalView((12, 16), 0.875), ProbeView((12, 16), (0.3, 1.0), True, 5)):
        levels = view(shallow, 4, (12, 16)).float()
        found = view(deep, 4, (12, 16))
        # Pillow rounds after each axis and clips overshoots.
        assert (found.clamp(0, 255) - levels).abs().max() < 2


def test_normalised_values_are_those_of_float64() -> None:
    reading = Reading(2, range=((-100, 300), (1e4, 1.2e4)))
    mean, std = (0.4, 0.6), (0.2, 0.3)
    values = np.stack([drawn("float32", (5, 6)), drawn("float32", (5, 6)) + 1.1e4])
    found = Normalise(mean, std, torch.device("cpu"), reading)(torch.from_numpy(values)[None])[0]
    low, high = (bound[:, None, None] for bound in reading.bounds())
    scaled = (values.astype(np.float64) - low) / (high - low)
    expected = (scaled - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)
    gap = torch.from_numpy(values)[None].clone()
    gap[0, :, 2, 3] = torch.nan
    filled = Normalise(mean, std, torch.device("cpu"), reading)(gap)[0]
    assert filled[:, 2, 3].tolist() == [0, 0]
    gap[0, :, 2, 3] = torch.from_numpy(values)[:, 2, 3]
    assert torch.equal(Normalise(mean, std, torch.device("cpu"), reading)(gap)[0], found)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"range": (5, 5)}, r"range has \[5\.0, 5\.0\]: use \[low, high\], low < high"),
        ({"range": ((0, 1), (2, 1))}, r"range has \[2\.0, 1\.0\]"),
        ({"range": (0, math.inf)}, "finite number"),
        ({"clip": True}, "clip needs range"),
        ({"nodata": 0}, "nodata needs range"),
        ({"axes": "hwh"}, "one letter an axis"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FolderConfig(root="x", **settings)


def test_settings_of_other_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.range has 2 pairs, but in_chans is 3"):
        FolderConfig(root="x", range=((0, 1), (0, 2))).reading(3)
    with pytest.raises(UserError, match=r"data\.channels has 2 entries, but in_chans is 1"):
        FolderConfig(root="x", channels=(0, 1)).reading(1)


def test_an_array_picture_gives_parts_as_they_lie() -> None:
    values, valid = drawn("int32", (9, 8, 3)), drawn("bool", (9, 8))
    found = ArrayPicture(values, valid).region((2, 1, 7, 8), (1, 1))
    np.testing.assert_array_equal(found.pixels, values[1:8, 2:7])
    assert found.valid is not None
    np.testing.assert_array_equal(found.valid, valid[1:8, 2:7])
    assert found.box == (0, 0, 5, 7)


def test_settings_survive_the_config_of_an_export() -> None:
    reading = Reading(2, range=((0, 1), (2, 3)), clip=True, nodata=-1.0, channels=(1, "B4"), fill=(0.1, 0.2))
    again = Reading.of_settings(json.loads(json.dumps(reading.settings())), (0.1, 0.2))
    assert again == reading
    assert Reading(3, fill=(0.0, 0.1, 0.2)).settings() == {}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "int32", "float32"])
def test_a_picture_that_a_caller_has_opened_keeps_its_depth(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 256 if dtype == "uint8" else 4096, (9, 14)).astype(dtype)
    image = Image.fromarray(values)
    # At its own size the evaluation view changes nothing.
    found = viewed(image, 0, EvalView((9, 14), 1.0), Reading(1, range=((0, 4095),)))
    np.testing.assert_array_equal(found[0].numpy(), values.astype(np.float32))
    if dtype != "uint8":
        with pytest.raises(UserError, match="1 channel, but in_chans is 3"):
            viewed(image, 0, EvalView((9, 14), 1.0), Reading(3, range=((0, 4095),)))
