"""Pictures that decode what they are asked for: where it is, how much it keeps, and what it looks like."""

from __future__ import annotations

import functools
import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.formats import decode, open_picture
from etpp_ssl.data.formats.base import Decoder, Reading, UnreadableImage
from etpp_ssl.data.formats.jpeg import JpegPicture
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.resize import resize
from etpp_ssl.data.sources.synthetic import SyntheticSource
from etpp_ssl.data.views import TrainView, intermediate_size, random_crop_box, to_tensor

ORIENTATION = 0x0112


@functools.lru_cache(maxsize=64)
def drawn(width: int, height: int, index: int = 0) -> Image.Image:
    """A picture with a photograph's spectrum."""
    source = SyntheticSource(
        split="train", num_images=100, num_classes=10, size=(height, width), reading=Reading(3), seed=1
    )
    return source.open(index).channels()[0]


def jpeg(picture: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture.save(file, "JPEG", exif=exif, **{"quality": 95, **options})
    return file.getvalue()


def psnr(found: Tensor, wanted: Tensor) -> float:
    error = torch.mean((found.double() - wanted.double()) ** 2).clamp(min=1e-6)
    return float(10 * torch.log10(255**2 / error))


def pixels_of(picture: DecodedPicture | JpegPicture, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.atleast_3d(np.asarray(picture.channels()[0].crop(box)))


sides = st.integers(1, 150)


@given(size=st.tuples(sides, sides), orientation=st.integers(1, 8), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_region_keeps_what_it_must_and_lies_where_it_says(
    size: tuple[int, int], orientation: int, data: st.DataObject
) -> None:
    picture = open_picture(jpeg(Image.new("RGB", size, (200, 90, 10)), orientation), Reading(3))
    assert picture.size == picture.channels()[0].size
    left = data.draw(st.integers(0, picture.size[0] - 1))
    top = data.draw(st.integers(0, picture.size[1] - 1))
    right = data.draw(st.integers(left + 1, picture.size[0]))
    bottom = data.draw(st.integers(top + 1, picture.size[1]))
    at_least = data.draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
    region = picture.region((left, top, right, bottom), at_least)
    height, width, channels = region.pixels.shape
    assert channels == 3
    assert 0 <= region.box[0] < 1
    assert 0 <= region.box[1] < 1
    assert width - 1 < region.box[2] <= width
    assert height - 1 < region.box[3] <= height
    found_width, found_height = region.box[2] - region.box[0], region.box[3] - region.box[1]
    assert found_width >= min(at_least[0], right - left)
    assert found_height >= min(at_least[1], bottom - top)
    # One reduction for both axes.
    factor = (right - left) / found_width
    assert factor in (1, 2, 4, 8)
    assert (bottom - top) / found_height == factor


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(211, 150), (208, 160), (163, 205)])
def test_a_reduced_region_shows_what_the_full_one_shows(size: tuple[int, int], orientation: int) -> None:
    data = jpeg(drawn(*size), orientation)
    picture, whole = open_picture(data, Reading(3)), DecodedPicture(decode(data, Reading(3)))
    width, height = picture.size
    out = (23, 19)
    # The whole, both corners, and odd boxes.
    boxes = [(0, 0, width, height), (0, 0, 121, 101), (width - 121, height - 101, width, height)]
    boxes += [(x, y, x + 96 + x, y + 88 + y) for x in (3, 8, 13) for y in (5, 16, 17)]
    reduced = 0
    for box in boxes:
        region = picture.region(box, out)
        reduced += region.pixels.size < (box[2] - box[0]) * (box[3] - box[1])
        found = resize(region, out, "bicubic")
        wanted = resize(whole.region(box, out), out, "bicubic")
        # Half a pixel off would be below 30 dB.
        assert psnr(found, wanted) > 38, box
    assert reduced == len(boxes)


def test_a_region_at_full_resolution_is_the_full_decode() -> None:
    for orientation in (1, 6, 7):
        picture = open_picture(jpeg(drawn(93, 61), orientation), Reading(3))
        for box in [(0, 0, *picture.size), (3, 5, 40, 41), (60, 60, 61, 61)]:
            region = picture.region(box, (900, 900))
            assert region.box == (0, 0, box[2] - box[0], box[3] - box[1])
            np.testing.assert_array_equal(region.pixels, pixels_of(picture, box))


def test_a_picture_can_be_asked_again() -> None:
    picture = open_picture(jpeg(drawn(93, 61)), Reading(3))
    box = (0, 0, 88, 56)
    small, full = picture.region(box, (9, 9)), picture.region(box, (88, 56))
    assert small.pixels.shape == (14, 22, 3)
    assert full.pixels.shape == (56, 88, 3)
    np.testing.assert_array_equal(picture.region(box, (9, 9)).pixels, small.pixels)
    np.testing.assert_array_equal(pixels_of(picture, box), full.pixels)


@pytest.mark.parametrize(("mode", "in_chans"), [("L", 3), ("L", 1), ("RGB", 1)])
def test_gray_is_reduced_too(mode: str, in_chans: int) -> None:
    data = jpeg(drawn(161, 97).convert(mode))
    picture = open_picture(data, Reading(in_chans))
    region = picture.region((1, 2, 150, 90), (20, 20))
    assert region.pixels.shape[2] == in_chans
    assert region.pixels.shape[0] < 50
    whole = DecodedPicture(decode(data, Reading(in_chans))).region((1, 2, 150, 90), (20, 20))
    assert psnr(resize(region, (20, 20), "bicubic"), resize(whole, (20, 20), "bicubic")) > 38


def test_what_has_no_reduced_decode_is_decoded_whole() -> None:
    rgb = drawn(80, 60)
    png = io.BytesIO()
    rgb.save(png, "PNG")
    array = io.BytesIO()
    np.save(array, np.asarray(rgb).astype(np.uint16) << 8)
    files = [jpeg(rgb.convert("CMYK")), png.getvalue(), array.getvalue()]
    for data in files:
        picture = open_picture(data, Reading(3))
        assert isinstance(picture, DecodedPicture)
        region = picture.region((1, 2, 70, 60), (5, 5))
        expected = np.asarray(decode(data, Reading(3))[0].crop((1, 2, 70, 60)))
        np.testing.assert_array_equal(region.pixels, expected)
        assert region.box == (0, 0, 69, 58)
    five = np.random.default_rng(0).integers(0, 256, (9, 7, 5), dtype=np.uint8)
    channels = tuple(Image.fromarray(five[:, :, c]) for c in range(5))
    np.testing.assert_array_equal(
        DecodedPicture(channels).region((1, 2, 6, 9), (1, 1)).pixels, five[2:9, 1:6]
    )


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_file_that_breaks_off_is_unreadable_once_it_is_decoded(decoder: Decoder) -> None:
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    data = jpeg(drawn(211, 150))
    picture = open_picture(data[: len(data) // 2], Reading(3))
    for at_least in [(20, 20), (200, 150)]:
        with pytest.raises(UnreadableImage) as error:
            picture.region((0, 0, 200, 150), at_least, decoder)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UnreadableImage):
        picture.channels()
    with pytest.raises(UnreadableImage):
        open_picture(b"\xff\xd8 no more", Reading(3))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_simplejpegs_pixels_are_pillows(subsampling: int, mode: str) -> None:
    pytest.importorskip("simplejpeg")
    for size in [(211, 150), (97, 163), (8, 9), (5, 3)]:
        options = {"subsampling": subsampling} if mode == "RGB" else {}
        for progressive in (False, True):
            data = jpeg(drawn(*size).convert(mode), progressive=progressive, **options)
            for in_chans in (1, 3):
                picture = open_picture(data, Reading(in_chans))
                for parts in (8, 4, 2, 1):
                    at_least = (max(1, size[0] // parts), max(1, size[1] // parts))
                    one = picture.region((0, 0, *size), at_least)
                    other = picture.region((0, 0, *size), at_least, "simplejpeg")
                    assert one.box == other.box
                    np.testing.assert_array_equal(one.pixels, other.pixels)


def test_a_decoder_that_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    TrainView((20, 28), (0.2, 1.0), True, False, 0, "reduced", decoder="pillow")
    with pytest.raises(UserError, match=r"data\.decoder simplejpeg needs simplejpeg, which is not"):
        TrainView((20, 28), (0.2, 1.0), True, False, 0, "reduced", decoder="simplejpeg")


IMAGE_SIZE = (150, 180)
WHOLE_RANGE = (0.2, 1.0)


def view(decode: Any, **changes: Any) -> TrainView:
    settings = {"flip": True, "lanczos": False, "seed": 5, "crop_scale": WHOLE_RANGE}
    return TrainView(IMAGE_SIZE, decode=decode, **{**settings, **changes})


@given(
    bandwidth=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    beyond=st.tuples(st.integers(0, 400), st.integers(0, 400)),
)
def test_the_intermediate_size_is_never_below_four_thirds_of_the_bandwidth(
    bandwidth: tuple[int, int], beyond: tuple[int, int]
) -> None:
    image_size = (bandwidth[0] + beyond[0], bandwidth[1] + beyond[1])
    for found, shown, full in zip(
        intermediate_size(bandwidth, image_size), bandwidth, image_size, strict=True
    ):
        assert shown <= found <= full
        assert found == full or 3 * found >= 4 * shown
        assert found == full or 9 * found < 8 * full


def test_intermediate_sizes_at_known_bandwidths() -> None:
    assert intermediate_size((96, 96), (224, 224)) == (168, 168)
    assert intermediate_size((160, 160), (224, 224)) == (224, 224)
    assert intermediate_size((224, 224), (224, 224)) == (224, 224)
    # CIFAR's images are as small as they can get.
    assert intermediate_size((16, 16), (32, 32)) == (32, 32)
    assert intermediate_size((64, 96), (224, 320)) == (112, 168)


@pytest.mark.parametrize("lanczos", [False, True])
def test_reduced_views_show_what_full_ones_show(lanczos: bool) -> None:
    """At least 35 dB on average after the crop, over the views whose decode was reduced."""
    bandwidth = (60, 72)
    qualities = []
    for position in range(14):
        data = jpeg(drawn(601, 467, position))
        picture = open_picture(data, Reading(3))
        found = view("reduced", lanczos=lanczos)(picture, position, bandwidth)
        assert torch.equal(found, view("reduced", lanczos=lanczos)(picture, position, bandwidth))
        wanted = view("full", lanczos=lanczos)(picture, position, bandwidth)
        assert found.shape == ((3, *bandwidth) if lanczos else (3, 105, 126))
        assert wanted.shape == ((3, *bandwidth) if lanczos else (3, *IMAGE_SIZE))
        box = random_crop_box(picture.size, WHOLE_RANGE, keyed(position))
        if picture.region(box, (126, 105)).pixels.shape[1] < box[2] - box[0]:
            shown = [low_frequency_crop(v.float(), bandwidth) for v in (found, wanted)]
            qualities.append(psnr(*shown))
    assert len(qualities) > 4
    assert np.mean(qualities) > 35


def keyed(position: int) -> random.Random:
    from etpp_ssl.randomness import keyed_random

    return keyed_random(5, "crop", position)


def test_at_full_bandwidth_a_view_differs_by_two_levels_at_most() -> None:
    for position in range(8):
        picture = open_picture(jpeg(drawn(201, 167, position)), Reading(3))
        found, wanted = (view(decode)(picture, position, IMAGE_SIZE) for decode in ("reduced", "full"))
        assert (found.int() - wanted.int()).abs().max() <= 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "box"])
def test_the_interpolation_is_that_of_both_decodes(interpolation: Any) -> None:
    picture = open_picture(jpeg(drawn(201, 167)), Reading(3))
    full = view("full", interpolation=interpolation, flip=False)(picture, 3, IMAGE_SIZE)
    box = random_crop_box(picture.size, WHOLE_RANGE, keyed(3))
    kernel = Image.Resampling[interpolation.upper()]
    plain = picture.channels()[0].crop(box).resize(IMAGE_SIZE[::-1], kernel)
    assert torch.equal(full, to_tensor((plain,)))
    reduced = view("reduced", interpolation=interpolation, flip=False)(picture, 3, IMAGE_SIZE)
    assert (reduced.int() - full.int()).abs().max() <= 2
