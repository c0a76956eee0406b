"""DICOM: values as the modality means them, whatever the encoding; every refusal is a sentence."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from stored import as_floats, damage, deep, opened, refusal, values, whole

from etpp_ssl.data.formats import check_header, open_file, open_picture
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.formats.pictures import frames_of

HEIGHT, WIDTH = 33, 46
JPEGS = {
    uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    uid.JPEGLosslessSV1: imagecodecs.ljpeg_encode,
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def write(
    path: Path,
    pixels: np.ndarray,
    syntax: uid.UID = uid.ExplicitVRLittleEndian,
    *,
    bits: int | None = None,
    photometric: str = "MONOCHROME2",
    **elements: Any,
) -> Path:
    """A file of (H, W), (H, W, 3) for colours, or (frames, H, W)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.SecondaryCaptureImageStorage, uid.generate_uid()
    samples = 3 if pixels.shape[-1] == 3 else 1
    frames = 1 if pixels.ndim == 2 + (samples == 3) else len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[1 if frames > 1 else 0 :][:2]
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.SamplesPerPixel = samples
    if samples == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = 8 * pixels.itemsize
    if pixels.dtype.kind == "f":
        dataset.FloatPixelData = pixels.tobytes()
    else:
        dataset.BitsStored = bits or 8 * pixels.itemsize
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        big = syntax == uid.ExplicitVRBigEndian
        dataset.PixelData = (pixels.astype(pixels.dtype.newbyteorder(">")) if big else pixels).tobytes()
        dataset["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax in JPEGS:
        dataset.PixelData = encapsulate([JPEGS[syntax](pixels)])
    elif syntax.is_compressed:
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        dataset.compress(syntax)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "image.dcm"


SYNTAXES = [
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
    uid.JPEG2000Lossless,
    *JPEGS,
]


def cells() -> list[tuple[uid.UID, str]]:
    """What each encoding can hold."""
    native, compressed = SYNTAXES[:3], (uid.RLELossless, uid.JPEG2000Lossless)
    return [
        *((syntax, dtype) for syntax in native for dtype in ("u1", "i1", "u2", "i2", "u4", "i4")),
        *((syntax, dtype) for syntax in compressed for dtype in ("u1", "i1", "u2", "i2")),
        *((syntax, dtype) for syntax in JPEGS for dtype in ("u1", "u2")),
    ]


@pytest.mark.parametrize(("syntax", "dtype"), cells(), ids=str)
def test_values_are_exact(
    syntax: uid.UID, dtype: str, file: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    info = np.iinfo(dtype)
    pixels = rng.integers(info.min, info.max, (HEIGHT, WIDTH), dtype, endpoint=True)
    found = values(write(file, pixels, syntax), deep())
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found[:, :, 0], pixels)
    check_header(file.read_bytes())
    assert capfd.readouterr() == ("", "")


def test_rescale_gives_the_modality_s_values(file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 4096, (HEIGHT, WIDTH), "u2")
    write(file, pixels, bits=12, RescaleSlope="1.5", RescaleIntercept="-1024.25")
    found = values(file, deep())
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, :, 0], pixels * 1.5 - 1024.25)
    hounsfield = as_floats(file, Reading(1, range=((-1024.25, 5118.25),)))
    np.testing.assert_array_equal(hounsfield[:, :, 0], (pixels * 1.5 - 1024.25).astype("f4"))


def test_enhanced_files_rescale_by_frame(file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 4096, (3, HEIGHT, WIDTH), "u2")

    def group(slope: float) -> Dataset:
        transformation, group = Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, 10
        group.PixelValueTransformationSequence = [transformation]
        return group

    write(file, pixels, SharedFunctionalGroupsSequence=[group(2)])
    expected = 2.0 * pixels.transpose(1, 2, 0) + 10
    np.testing.assert_array_equal(values(file, deep(3, axes="pages")), expected)
    write(file, pixels, PerFrameFunctionalGroupsSequence=[group(slope) for slope in (1.5, 2, 3)])
    expected = pixels.transpose(1, 2, 0) * [1.5, 2, 3] + 10
    np.testing.assert_array_equal(values(file, deep(3, axes="pages")), expected)


@pytest.mark.parametrize(("dtype", "bits"), [("u2", 12), ("u2", 16), ("u1", 8), ("i2", 12), ("i2", 16)])
def test_white_is_least_is_inverted_in_the_stored_range(
    dtype: str, bits: int, file: Path, rng: np.random.Generator
) -> None:
    """Not in the picture's own, which here is a small part of it."""
    low = -(2 ** (bits - 1)) if dtype[0] == "i" else 0
    high = low + 2**bits - 1
    pixels = rng.integers(low + 3, low + 90, (HEIGHT, WIDTH), dtype)
    found = values(write(file, pixels, bits=bits, photometric="MONOCHROME1"), deep())
    np.testing.assert_array_equal(found[:, :, 0], low + high - pixels.astype(int))
    write(file, pixels, bits=bits, photometric="MONOCHROME1", RescaleSlope=2, RescaleIntercept=5)
    np.testing.assert_array_equal(values(file, deep())[:, :, 0], 2.0 * (low + high - pixels.astype(int)) + 5)


@pytest.mark.parametrize("dtype", ["u2", "i2"])
def test_bits_beyond_those_stored_are_cleared(dtype: str, file: Path, rng: np.random.Generator) -> None:
    low = -2048 if dtype == "i2" else 0
    pixels = rng.integers(low, low + 4096, (HEIGHT, WIDTH), dtype)
    overlay = rng.integers(0, 16, (HEIGHT, WIDTH), "u2") << 12
    dirty = ((pixels.view("u2") & 0xFFF) | overlay).view(dtype)
    np.testing.assert_array_equal(values(write(file, dirty, bits=12), deep())[:, :, 0], pixels)


@pytest.mark.parametrize(
    ("syntax", "vr"),
    [
        (uid.ImplicitVRLittleEndian, "SS"),
        (uid.ExplicitVRLittleEndian, "SS"),
        (uid.ExplicitVRLittleEndian, "US"),
    ],
)
@pytest.mark.parametrize("limit", [None, -1990, -2010])
def test_padding_is_no_data(
    limit: int | None, syntax: uid.UID, vr: str, file: Path, rng: np.random.Generator
) -> None:
    """-2000, also where the file has it as unsigned; with a limit, all values from one to the other."""
    pixels = rng.integers(-2020, -1980, (HEIGHT, WIDTH), "i2")
    dataset = pydicom.dcmread(write(file, pixels, syntax, RescaleSlope=2, RescaleIntercept=0))
    for keyword, value in (("PixelPaddingValue", -2000), ("PixelPaddingRangeLimit", limit)):
        if value is not None:
            dataset.add_new(keyword, vr, value % 65536 if vr == "US" else value)
    dataset.save_as(file)
    found, valid = whole(opened(file, deep()))
    first, last = sorted((-2000, -2000 if limit is None else limit))
    assert valid is not None
    np.testing.assert_array_equal(valid, (pixels < first) | (pixels > last))
    np.testing.assert_array_equal(found[valid][:, 0], 2.0 * pixels[valid])


def test_padding_of_inverted_pictures_is_no_data(file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 3, (HEIGHT, WIDTH), "u2")
    write(file, pixels, bits=12, photometric="MONOCHROME1", PixelPaddingValue=0)
    _, valid = whole(opened(file, deep()))
    np.testing.assert_array_equal(valid, pixels != 0)


def test_a_picture_of_padding_is_refused(file: Path) -> None:
    write(file, np.full((HEIGHT, WIDTH), 5, "u2"), PixelPaddingValue=5)
    assert refusal(file, deep()) == "it has no pixel with data"


def test_floats(file: Path, rng: np.random.Generator) -> None:
    pixels = rng.normal(size=(HEIGHT, WIDTH)).astype("f4")
    pixels[3, 4] = -1.5
    write(file, pixels, FloatPixelPaddingValue=-1.5)
    found, valid = whole(opened(file, deep()))
    np.testing.assert_array_equal(found[:, :, 0], pixels)
    np.testing.assert_array_equal(valid, pixels != -1.5)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless])
def test_colours(syntax: uid.UID, file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), "u1")
    write(file, pixels, syntax, photometric="RGB")
    np.testing.assert_array_equal(values(file, deep(3)), pixels)
    np.testing.assert_array_equal(values(file, deep(2, channels=(2, 0))), pixels[:, :, [2, 0]])
    assert "it has 3 channels, but in_chans is 1" in refusal(file, deep(1))


def test_planes_of_colours(file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), "u1")
    planes = pixels.transpose(2, 0, 1).tobytes()
    write(file, pixels, photometric="RGB", PlanarConfiguration=1, PixelData=planes)
    np.testing.assert_array_equal(values(file, deep(3)), pixels)


def test_luma_and_chroma_become_colours(file: Path) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.stack([60 + 3 * x, 80 + 2 * y, 90 + x + y], axis=2).clip(0, 255).astype("u1")
    luma = np.asarray(Image.fromarray(picture).convert("YCbCr"))
    found = values(write(file, luma, photometric="YBR_FULL"), deep(3))
    assert np.abs(found.astype(int) - picture).max() <= 3
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=95)
    dataset = pydicom.dcmread(write(file, picture, photometric="YBR_FULL_422"))
    dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset.save_as(file)
    assert np.abs(values(file, deep(3)).astype(int) - picture).mean() < 3


def test_palettes_become_colours(file: Path, rng: np.random.Generator) -> None:
    tables = rng.integers(0, 65536, (3, 256), "u2")
    elements = {}
    for table, colour in zip(tables, ("Red", "Green", "Blue"), strict=True):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH), "u1")
    write(file, pixels, photometric="PALETTE COLOR", **elements)
    np.testing.assert_array_equal(values(file, deep(3)), tables[:, pixels].transpose(1, 2, 0))


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_frames_are_channels_when_asked(syntax: uid.UID, file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 4096, (5, HEIGHT, WIDTH), "u2")
    write(file, pixels, syntax, bits=12)
    np.testing.assert_array_equal(values(file, deep(5, axes="pages")), pixels.transpose(1, 2, 0))
    chosen = values(file, deep(3, axes="pages", channels=(4, 1, 4)))
    np.testing.assert_array_equal(chosen, pixels[[4, 1, 4]].transpose(1, 2, 0))
    assert refusal(file, deep(1)).startswith("it has 5 frames: data.frames=all makes each an image")
    assert refusal(file, deep(5)).startswith("it has 5 frames: data.frames=all makes each an image")
    assert "it has 5 channels, but in_chans is 3" in refusal(file, deep(3, axes="pages"))


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "RGB"])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_frames_are_images_when_asked(
    syntax: uid.UID, photometric: str, file: Path, rng: np.random.Generator
) -> None:
    colours = [3] if photometric == "RGB" else []
    pixels = rng.integers(0, 256, (5, HEIGHT, WIDTH, *colours), "u1")
    write(file, pixels, syntax, photometric=photometric)
    for reading in (deep(sum(colours) or 1, frames=True), Reading(sum(colours) or 1, frames=True)):
        picture = open_file(file, reading)
        assert frames_of(picture) == 5
        for number, frame in enumerate(pixels):
            one = picture.frame(number)  # type: ignore[attr-defined]
            np.testing.assert_array_equal(
                one.region((3, 2, 9, 7), (1, 1)).pixels, np.atleast_3d(frame)[2:7, 3:9]
            )
    if colours:
        said = "it has 5 frames of colours: data.frames=all makes each an image"
        assert refusal(file, deep(3, axes="pages")) == said
        assert frames_of(open_file(file, deep(1, frames=True, channels=(2,)))) == 5


def test_one_gray_channel_is_not_taken_for_three(file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 4096, (HEIGHT, WIDTH), "u2")
    write(file, pixels, bits=12)
    assert "it has 1 channel, but in_chans is 3" in refusal(file, deep(3))
    np.testing.assert_array_equal(values(file, deep(3, channels=(0, 0, 0))), np.dstack([pixels] * 3))


def test_eight_bits_are_read_without_a_range(file: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH), "u1")
    (channel,) = open_picture(write(file, pixels).read_bytes(), Reading(1)).channels()
    np.testing.assert_array_equal(np.asarray(channel), pixels)
    write(file, pixels, RescaleSlope=2, RescaleIntercept=0)
    assert "data.range reads them" in refusal(file, Reading(1))


def test_unknown_transfer_syntaxes_are_named(file: Path) -> None:
    write(file, np.zeros((HEIGHT, WIDTH), "u1"))
    data = file.read_bytes()
    for syntax, word in ((uid.MPEG2MPML, "MPEG2"), (uid.UID("1.2.3.4.5.6.7.8"), "1.2.3.4.5.6.7.8")):
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([b"none"])
        dataset["PixelData"].VR = "OB"
        dataset.save_as(file, implicit_vr=False, little_endian=True)
        reason = refusal(file, deep())
        assert reason.startswith("its transfer syntax is ")
        assert word in reason


def test_deflated_files_are_refused_before_they_grow(file: Path) -> None:
    write(file, np.zeros((HEIGHT, WIDTH), "u1"), uid.DeflatedExplicitVRLittleEndian)
    assert "Deflated" in refusal(file, deep())


def test_encrypted_files_and_others_without_pixels(file: Path) -> None:
    dataset = pydicom.dcmread(write(file, np.zeros((HEIGHT, WIDTH), "u1")))
    del dataset.PixelData
    dataset.save_as(file)
    assert refusal(file, deep()) == "it has no pixels, or is incomplete"
    item = Dataset()
    item.EncryptedContentTransferSyntaxUID, item.EncryptedContent = uid.ExplicitVRLittleEndian, b"1234"
    dataset.EncryptedAttributesSequence = [item]
    dataset.save_as(file)
    assert refusal(file, deep()) == "it has no pixels: they are encrypted"


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_truncated_files(
    syntax: uid.UID, file: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(file, rng.integers(0, 256, (HEIGHT, WIDTH), "u1"), syntax).read_bytes()
    for length in (len(data) - 400, len(data) // 3, 140):
        file.write_bytes(data[:length])
        assert refusal(file, deep())
    if syntax.is_compressed:
        dataset = pydicom.dcmread(io.BytesIO(data))
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        dataset.PixelData = encapsulate([frame[: len(frame) * 9 // 10]])
        dataset.save_as(file)
        assert refusal(file, deep()).startswith("its pixels ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_damaged_files_are_images_or_sentences(
    syntax: uid.UID, file: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    """pylibjpeg's decoder of RLE would end the process on some of them."""
    damage(write(file, rng.integers(0, 4000, (HEIGHT, WIDTH), "u2"), syntax))
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_right_is_refused(file: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH), "u2")
    write(file, pixels, bits=12, HighBit=15)
    assert refusal(file, deep()) == ("it stores 12 of 16 bits up to bit 15: the highest has to be bit 11")
    write(file, pixels, ModalityLUTSequence=[Dataset()])
    assert "Modality LUT" in refusal(file, deep())
    write(file, pixels, photometric="RGB")
    assert refusal(file, deep()) == "it has 1 samples a pixel, but is RGB"
    write(file, pixels, photometric="ARGB")
    assert refusal(file, deep()).startswith("its photometric interpretation is 'ARGB'")
    write(file, pixels, RescaleSlope=0, RescaleIntercept=0)
    assert "rescale slope is 0" in refusal(file, deep())
    write(file, pixels)
    assert "data.max_pixels 100 allows" in refusal(file, deep(max_pixels=100))
    with pytest.raises(UnreadableImage, match=r"data\.max_pixels"):
        check_header(file.read_bytes(), 100)
    dataset = pydicom.dcmread(file)
    del dataset.Rows
    dataset.save_as(file)
    assert refusal(file, deep()) == "it does not say its Rows"


def test_a_missing_library_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, np.zeros((HEIGHT, WIDTH), "u1"))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert refusal(file, deep()) == (
        "reading DICOM needs pydicom, which is not installed: pip install 'etpp-ssl[dicom]'"
    )


def test_a_missing_decoder_is_named(
    file: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(file, rng.integers(0, 256, (HEIGHT, WIDTH), "u1"), uid.JPEG2000Lossless)
    monkeypatch.setattr(pydicom.pixels.get_decoder(uid.JPEG2000Lossless), "_available", {})
    reason = refusal(file, deep())
    assert "JPEG 2000" in reason
    assert reason.endswith("whose decoder is not installed: pip install 'etpp-ssl[dicom]'")
