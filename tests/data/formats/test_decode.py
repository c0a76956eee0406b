"""Decoding: every format and mode gives the expected channels, and every broken file one reason."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from etpp_ssl.data.formats import EXTENSIONS, check_header, decode
from etpp_ssl.data.formats.base import Channels, Reading, UnreadableImage
from etpp_ssl.data.formats.pillow import FORMATS as PILLOW
from etpp_ssl.data.formats.pillow import from_picture

HEIGHT, WIDTH = 13, 22
ORIENTATION = 0x0112


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def ramp(channels: int) -> np.ndarray:
    """A smooth picture, which lossy formats keep within a few levels."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [40 + 5 * x + (3 + c) * y + 20 * c for c in range(channels)]
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


def encoded(picture: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture.squeeze())
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pixels(channels: Channels) -> np.ndarray:
    """uint8 (H, W, C), having checked what `Channels` promises."""
    if len(channels) == 1:
        assert channels[0].mode in ("L", "RGB")
    else:
        assert {channel.mode for channel in channels} == {"L"}
        assert len({channel.size for channel in channels}) == 1
    arrays = [np.asarray(channel) for channel in channels]
    return np.concatenate([a if a.ndim == 3 else a[:, :, None] for a in arrays], axis=2)


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, as Pillow documents it for mode L."""
    return rgb.astype(np.float64) @ [0.299, 0.587, 0.114]


def refusal(data: bytes, in_chans: int = 3) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(data, Reading(in_chans))
    reason = str(caught.value)
    assert reason.strip()
    assert len(reason.splitlines()) == 1
    return reason


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_are_exact(form: str, rng: np.random.Generator) -> None:
    picture = noise(rng, HEIGHT, WIDTH, 3)
    data = encoded(picture, form, **({"lossless": True} if form == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(decode(data, Reading(3))), picture)
    assert np.abs(pixels(decode(data, Reading(1)))[:, :, 0] - luma(picture)).max() <= 0.51


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_are_close(form: str) -> None:
    picture = ramp(3)
    found = pixels(decode(encoded(picture, form, quality=95), Reading(3))).astype(int)
    assert found.shape == picture.shape
    assert np.abs(found - picture).mean() < 3


def test_gif(rng: np.random.Generator) -> None:
    picture = noise(rng, HEIGHT, WIDTH)
    channels = decode(encoded(picture, "GIF"), Reading(1))
    np.testing.assert_array_equal(pixels(channels)[:, :, 0], picture)


def test_every_extension_that_can_be_read_is_looked_for() -> None:
    """Those of Pillow's that are not are named, with the reason, where the list stands."""
    known = {ext for ext, form in Image.registered_extensions().items() if form in (*PILLOW, "MPO")}
    assert known - EXTENSIONS == {".icb", ".vda", ".vst", ".pfm"}
    others = {".npy", ".npz", ".h5", ".hdf5", ".zarr", ".nii", ".nii.gz", ".dcm", ".btf", ".svs", ".tf8"}
    assert EXTENSIONS - known == others


@pytest.mark.parametrize("form", ["JPEG2000", "PPM", "TGA", "PCX", "DIB"])
def test_less_common_lossless_formats_are_exact(form: str, rng: np.random.Generator) -> None:
    picture = noise(rng, HEIGHT, WIDTH, 3)
    data = encoded(picture, form)
    check_header(data)
    np.testing.assert_array_equal(pixels(decode(data, Reading(3))), picture)


@pytest.mark.parametrize("form", ["AVIF", "MPO"])
def test_less_common_lossy_formats_are_close(form: str) -> None:
    if form not in Image.SAVE:
        pytest.skip("Pillow is built without it")
    data = encoded(ramp(3), form, quality=95)
    check_header(data)
    assert np.abs(pixels(decode(data, Reading(3))).astype(int) - ramp(3)).mean() < 3


def test_sixteen_bits_of_a_pgm_keep_their_high_byte() -> None:
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 229
    header = f"P5 {WIDTH} {HEIGHT} 65535\n".encode()
    np.testing.assert_array_equal(
        pixels(decode(header + values.astype(">u2").tobytes(), Reading(1)))[:, :, 0], values >> 8
    )


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS: `git lfs pull`",
        ),
        (b"/annex/objects/SHA256E-s1--0.jpg\n", "a pointer of git-annex"),
        (b"../../.git/annex/objects/x", "a pointer of git-annex"),
        (b"\n<!DOCTYPE html><html>404", "a page of HTML"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a page of HTML or XML"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "it is HEIC, which is not read: convert it"),
        (b"\0\0\0\x20ftypavif\0\0\0\0mif1", "it is AVIF that cannot be read"),
        (b"anything else", "it is in no known image format"),
    ],
)
def test_what_is_no_image_is_said_to_be_what_it_is(data: bytes, words: str, in_chans: int) -> None:
    assert words in refusal(data, in_chans)
    with pytest.raises(UnreadableImage, match=words.split(":")[0]):
        check_header(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
def test_gray_fills_all_three_channels(form: str) -> None:
    data = encoded(ramp(1), form)
    gray, colour = pixels(decode(data, Reading(1))), pixels(decode(data, Reading(3)))
    assert gray.shape == (HEIGHT, WIDTH, 1)
    np.testing.assert_array_equal(colour, np.repeat(gray, 3, axis=2))
    if form != "JPEG":
        np.testing.assert_array_equal(gray, ramp(1))


def test_black_and_white_spans_the_range(rng: np.random.Generator) -> None:
    dots = rng.random((HEIGHT, WIDTH)) < 0.5
    data = encoded(Image.fromarray(dots), "PNG")
    np.testing.assert_array_equal(pixels(decode(data, Reading(1)))[:, :, 0], dots * 255)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 16))])
def test_palette_gives_its_colours_whatever_is_transparent(
    transparency: int | bytes | None, rng: np.random.Generator
) -> None:
    index, colours = rng.integers(0, 16, (HEIGHT, WIDTH), dtype=np.uint8), noise(rng, 16, 3)
    picture = Image.fromarray(index, "P")
    picture.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    data = encoded(picture, "PNG", **options)
    np.testing.assert_array_equal(pixels(decode(data, Reading(3))), colours[index])
    assert np.abs(pixels(decode(data, Reading(1)))[:, :, 0] - luma(colours[index])).max() <= 0.51


def test_alpha_is_dropped_or_a_channel(rng: np.random.Generator) -> None:
    picture = noise(rng, HEIGHT, WIDTH, 4)
    data = encoded(picture, "PNG")
    np.testing.assert_array_equal(pixels(decode(data, Reading(3))), picture[:, :, :3])
    np.testing.assert_array_equal(pixels(decode(data, Reading(4))), picture)
    assert pixels(decode(data, Reading(1))).shape == (HEIGHT, WIDTH, 1)


def test_gray_with_alpha_is_two_channels(rng: np.random.Generator) -> None:
    picture = noise(rng, HEIGHT, WIDTH, 2)
    data = encoded(Image.fromarray(picture, "LA"), "PNG")
    np.testing.assert_array_equal(pixels(decode(data, Reading(2))), picture)
    np.testing.assert_array_equal(pixels(decode(data, Reading(1))), picture[:, :, :1])


def test_cmyk_jpeg() -> None:
    ink = ramp(4)
    data = encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100, subsampling=0)
    expected = (255 - ink[:, :, :3].astype(float)) * (255 - ink[:, :, 3:]) / 255
    assert np.abs(pixels(decode(data, Reading(3))) - expected).max() < 6
    assert np.abs(pixels(decode(data, Reading(1)))[:, :, 0] - luma(expected)).max() < 6
    assert np.abs(pixels(decode(data, Reading(4))).astype(int) - ink).max() < 6


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("brightest", [65535, 200])
def test_sixteen_bits_keep_the_high_byte(form: str, brightest: int) -> None:
    values = np.linspace(0, brightest, 64 * 48).astype(np.uint16).reshape(64, 48)
    data = encoded(values, form)
    for in_chans in (1, 3):
        found = pixels(decode(data, Reading(in_chans)))
        np.testing.assert_array_equal(found, np.repeat((values >> 8)[:, :, None], in_chans, axis=2))


def test_every_sixteen_bit_value_keeps_its_high_byte() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for data in (encoded(values, "PNG"), encoded(values, "TIFF"), npy(values)):
        np.testing.assert_array_equal(pixels(decode(data, Reading(1)))[:, :, 0], values >> 8)


def test_big_endian_tiff() -> None:
    values = np.arange(0, 65536, 4, dtype=np.uint16).reshape(128, 128)
    data = encoded(Image.frombytes("I;16B", (128, 128), values.astype(">u2").tobytes()), "TIFF")
    assert data.startswith(b"MM")
    np.testing.assert_array_equal(pixels(decode(data, Reading(1)))[:, :, 0], values >> 8)


@pytest.mark.parametrize(("dtype", "word"), [(np.int32, "integers"), (np.float32, "floats")])
def test_ranges_that_nobody_agreed_on_are_refused(dtype: type, word: str) -> None:
    data = encoded(Image.fromarray(ramp(1)[:, :, 0].astype(dtype)), "TIFF")
    for in_chans in (1, 3, 5):
        assert word in refusal(data, in_chans)


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}
"""What a viewer shows of the stored rows. EXIF says where row 0 and column 0 belong, for instance 6:
row 0 is the right side and column 0 the top, so turn clockwise."""


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("in_chans", [3, 4])
def test_exif_orientation(form: str, in_chans: int, orientation: int, rng: np.random.Generator) -> None:
    stored = noise(rng, HEIGHT, WIDTH, in_chans)
    # WebP drops the colour of what cannot be seen.
    stored[:, :, 3:] |= 128
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    data = encoded(stored, form, exif=exif, **options)
    np.testing.assert_array_equal(pixels(decode(data, Reading(in_chans))), TURNED[orientation](stored))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_orientation_of_a_jpeg(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = pixels(decode(encoded(ramp(3), "JPEG", quality=98, exif=exif), Reading(3)))
    expected = TURNED[orientation](ramp(3))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_unknown_orientation_leaves_the_picture_as_it_lies(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    np.testing.assert_array_equal(
        pixels(decode(encoded(ramp(3), "PNG", exif=exif), Reading(3))),
        ramp(3),
    )


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        # One entry whose type does not exist, then nothing.
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\xee\xee\x01\0\0\0\x06\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x09",
    ],
)
def test_broken_exif_does_not_spoil_the_picture(exif: bytes) -> None:
    for form in ("JPEG", "PNG"):
        assert pixels(decode(encoded(ramp(3), form, exif=exif), Reading(3))).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animation_shows_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as check:
        assert check.n_frames == 3  # type: ignore[attr-defined]
    found = pixels(decode(data, Reading(3)))
    np.testing.assert_array_equal(found, np.broadcast_to([255, 0, 0], found.shape))


def test_frames_of_an_animation_are_not_channels(rng: np.random.Generator) -> None:
    frames = [Image.fromarray(noise(rng, HEIGHT, WIDTH)) for _ in range(5)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert "1 channel," in refusal(data, 5)


def tiff_pages(pages: list[Image.Image], **options: Any) -> bytes:
    return encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], **options)


def test_pages_of_a_tiff_are_channels(rng: np.random.Generator) -> None:
    planes = noise(rng, 5, HEIGHT, WIDTH)
    data = tiff_pages([Image.fromarray(plane) for plane in planes])
    np.testing.assert_array_equal(pixels(decode(data, Reading(5))), planes.transpose(1, 2, 0))
    # As a picture it is its first page.
    np.testing.assert_array_equal(pixels(decode(data, Reading(1))), planes[0, :, :, None])
    assert "1 channel and 5 pages, but in_chans is 4" in refusal(data, 4)


def test_pages_of_sixteen_bits(rng: np.random.Generator) -> None:
    planes = rng.integers(0, 65536, (2, HEIGHT, WIDTH), dtype=np.uint16)
    planes[1] //= 300
    data = tiff_pages([Image.fromarray(plane) for plane in planes])
    np.testing.assert_array_equal(pixels(decode(data, Reading(2))), (planes >> 8).transpose(1, 2, 0))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_orientation_of_pages(compression: str | None, rng: np.random.Generator) -> None:
    planes = noise(rng, 2, HEIGHT, WIDTH)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[ORIENTATION] = 6
    pages = [Image.fromarray(plane) for plane in planes]
    for page in pages:
        page.encoderinfo = {"tiffinfo": tags}  # type: ignore[attr-defined]
    data = tiff_pages(pages, tiffinfo=tags, compression=compression)
    found = pixels(decode(data, Reading(2)))
    np.testing.assert_array_equal(found, TURNED[6](planes.transpose(1, 2, 0)))


def test_pages_of_different_sizes_are_refused(rng: np.random.Generator) -> None:
    pages = [Image.fromarray(noise(rng, HEIGHT + i, WIDTH)) for i in range(2)]
    assert "pages differ in size" in refusal(tiff_pages(pages), 2)


def test_pages_of_floats_are_refused(rng: np.random.Generator) -> None:
    pages = [Image.fromarray(rng.random((HEIGHT, WIDTH), dtype=np.float32)) for _ in range(2)]
    assert "floats" in refusal(tiff_pages(pages), 2)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
def test_numpy_arrays(in_chans: int, dtype: str, rng: np.random.Generator) -> None:
    top = np.iinfo(dtype).max
    array = rng.integers(0, top, (HEIGHT, WIDTH, in_chans), endpoint=True).astype(dtype)
    expected = array >> 8 if array.itemsize == 2 else array
    for layout in (array, np.asfortranarray(array)):
        np.testing.assert_array_equal(pixels(decode(npy(layout), Reading(in_chans))), expected)


def test_flat_numpy_array_is_one_channel() -> None:
    np.testing.assert_array_equal(pixels(decode(npy(ramp(1)[:, :, 0]), Reading(1))), ramp(1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int64, np.bool_, np.uint32])
def test_numpy_values_other_than_bytes_and_words_are_refused(dtype: type) -> None:
    assert np.dtype(dtype).name in refusal(npy(np.zeros((4, 5, 3), dtype)))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (3, 4, 5), (4, 5, 3, 1), (0, 5, 3), ()])
def test_numpy_arrays_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    assert "not (height, width, 3)" in refusal(npy(np.zeros(shape, np.uint8)))


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload would work"
    mark.unlink()
    array = np.empty((2, 2), dtype=object)
    array[:] = Payload(mark)
    assert "pickle" in refusal(npy(array)).lower()
    refusal(pickle.dumps(Payload(mark)))
    assert not mark.exists()


@pytest.mark.parametrize("cut", [20, 200])
def test_truncated_numpy_array(cut: int) -> None:
    refusal(npy(np.zeros((HEIGHT, WIDTH, 3), np.uint8))[:cut])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_truncated_file(form: str, share: float, rng: np.random.Generator) -> None:
    data = encoded(noise(rng, 61, 47, 3), form)
    refusal(data[: int(share * len(data))])


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\xff\xd8\xff", b"not a picture\n" * 40, b"\x93NUMPY", b"P6 0 0 255\n"]
)
def test_what_is_no_picture(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_one_pixel(form: str) -> None:
    assert pixels(decode(encoded(Image.new("RGB", (1, 1), "gray"), form), Reading(3))).shape == (1, 1, 3)


@pytest.mark.parametrize("make", [lambda: encoded(ramp(3), "PNG"), lambda: npy(ramp(3))])
def test_more_pixels_than_allowed_are_refused(make: Callable[[], bytes]) -> None:
    assert pixels(decode(make(), Reading(3, max_pixels=HEIGHT * WIDTH))).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(UnreadableImage, match=r"claims 22 x 13 pixels, more than .* 285"):
        decode(make(), Reading(3, max_pixels=HEIGHT * WIDTH - 1))


def test_pillows_own_limit_gives_way_and_nothing_warns(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    np.testing.assert_array_equal(pixels(decode(encoded(ramp(3), "PNG"), Reading(3))), ramp(3))
    assert not recwarn.list


@pytest.mark.parametrize("error", [SyntaxError("two\nlines\r\n\tand a half"), AssertionError()])
def test_reasons_are_one_line_whatever_the_decoder_says(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    assert refusal(b"anything").startswith(type(error).__name__)


def test_wrong_number_of_channels_names_both_numbers() -> None:
    assert "3 channels, but in_chans is 5" in refusal(encoded(ramp(3), "PNG"), 5)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_an_opened_picture_gives_what_its_file_gives(in_chans: int) -> None:
    data = encoded(ramp(4), "PNG")
    with Image.open(io.BytesIO(data)) as picture:
        found = pixels(from_picture(picture, Reading(in_chans)))
    np.testing.assert_array_equal(found, pixels(decode(data, Reading(in_chans))))


def test_an_opened_picture_that_breaks_while_it_is_read() -> None:
    data = bytearray(encoded(noise(np.random.default_rng(0), 61, 47, 3), "PNG"))
    data[90:120] = bytes(30)
    with Image.open(io.BytesIO(data)) as picture, pytest.raises(UnreadableImage) as caught:
        from_picture(picture, Reading(3))
    assert len(str(caught.value).splitlines()) == 1
