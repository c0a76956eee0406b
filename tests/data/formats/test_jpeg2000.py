"""JPEG 2000: values at their own depth and sign, photographs as ever."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from etpp_ssl.data.formats import check_header, decode, jpeg2000, open_picture
from etpp_ssl.data.formats.base import Reading, UnreadableImage, pixels_of
from etpp_ssl.data.formats.pictures import DecodedPicture

imagecodecs = pytest.importorskip("imagecodecs")

RANGE = ((0.0, 1.0),)


def drawn(bits: int, signed: bool, bands: int) -> np.ndarray:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    values = np.random.default_rng(bits).integers(low, high, (37, 50, bands))
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2 if bits <= 16 else 4}")


def written(values: np.ndarray, bits: int, form: str = "jp2") -> bytes:
    data: bytes = imagecodecs.jpeg2k_encode(
        values.squeeze(), level=0, reversible=True, bitspersample=bits, codecformat=form
    )
    return data


def read(data: bytes, in_chans: int, **how: object) -> np.ndarray:
    picture = jpeg2000.FORMAT.open(data, Reading(in_chans, range=RANGE, **how))  # type: ignore[arg-type]
    if isinstance(picture, DecodedPicture):
        return pixels_of(picture.channels())
    return picture.region((0, 0, *picture.size), (1, 1)).pixels


def shown(data: bytes, in_chans: int) -> np.ndarray:
    picture = open_picture(data, Reading(in_chans, range=RANGE))
    return picture.region((0, 0, *picture.size), (1, 1)).pixels


@pytest.mark.parametrize("bits", [5, 8, 10, 12, 15, 16, 20])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bands", [1, 3, 4, 6])
def test_depths_and_signs(bits: int, signed: bool, bands: int, capfd: pytest.CaptureFixture[str]) -> None:
    values = drawn(bits, signed, bands)
    for form in ("jp2", "j2k"):
        data = written(values, bits, form)
        found = read(data, bands)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
        np.testing.assert_array_equal(read(data, 1, channels=(bands - 1,)), values[:, :, -1:])
        check_header(data)
        with pytest.raises(UnreadableImage, match="claims 50 x 37 pixels"):
            check_header(data, 1_000)
        with pytest.raises(UnreadableImage):
            shown(data[: len(data) // 2], bands)
    assert capfd.readouterr() == ("", "")


def test_without_a_range_signs_are_refused_and_the_rest_is_as_before() -> None:
    for bits in (8, 16):
        with pytest.raises(UnreadableImage, match=r"its values have signs.*data\.range reads them"):
            decode(written(drawn(bits, True, 1), bits), Reading(1))
    for bits, bands in ((8, 3), (12, 1), (16, 1), (16, 3)):
        data = written(drawn(bits, False, bands), bits)
        with Image.open(io.BytesIO(data)) as image:
            wanted = np.atleast_3d(np.asarray(image))
        wanted = wanted >> 8 if wanted.dtype != np.uint8 else wanted
        np.testing.assert_array_equal(pixels_of(decode(data, Reading(bands))), wanted)


def test_alpha_is_dropped() -> None:
    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (37, 50, 4), dtype=np.uint8)
    Image.fromarray(values).save(file, "JPEG2000")
    np.testing.assert_array_equal(read(file.getvalue(), 3), values[:, :, :3])
    deep = bytearray(written(drawn(12, False, 4), 12))
    # Pillow writes the box that names alpha.
    start = file.getvalue().index(b"cdef") - 4
    end = start + int.from_bytes(file.getvalue()[start : start + 4], "big")
    header = deep.index(b"jp2h") - 4
    length = int.from_bytes(deep[header : header + 4], "big")
    deep[header + length : header + length] = file.getvalue()[start:end]
    deep[header : header + 4] = (length + end - start).to_bytes(4, "big")
    np.testing.assert_array_equal(read(bytes(deep), 3), drawn(12, False, 4)[:, :, :3])
    np.testing.assert_array_equal(read(bytes(deep), 4), drawn(12, False, 4))


def test_what_openjpeg_loses_is_refused() -> None:
    data = written(drawn(28, False, 1), 28)
    with pytest.raises(UnreadableImage, match="more than 24 bits"):
        read(data, 1)
