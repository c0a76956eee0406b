"""TIFF: every type, layout and compression gives the exact values, or a refusal with reason and remedy."""

from __future__ import annotations

import io
import itertools
import struct
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from etpp_ssl.data.formats import decode, open_picture, tiff
from etpp_ssl.data.formats.base import Picture, Reading, Region, UnreadableImage, pixels_of
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.formats.tiff import by_tifffile
from etpp_ssl.data.formats.tiff_values import TiffPicture

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")

HEIGHT, WIDTH = 37, 50
RANGE = ((0.0, 1.0),)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> Any:
    """Whatever a file holds, no library writes to the screen."""
    yield
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not [w for w in recwarn.list if "rasterio" not in w.filename]


def drawn(
    dtype: str | np.dtype, num_channels: int = 1, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """(H, W, channels) all over the type's range."""
    rng, dtype = np.random.default_rng(num_channels), np.dtype(dtype)
    shape = (height, width, num_channels)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def written(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def by_gdal(values: np.ndarray, mask: np.ndarray | None = None, **options: Any) -> bytes:
    """A GeoTIFF of (H, W, channels)."""
    rasterio = pytest.importorskip("rasterio")
    settings = {"driver": "GTiff", "height": len(values), "width": values.shape[1], "count": values.shape[2]}
    tags = {key: options.pop(key) for key in ("scales", "offsets", "descriptions") if key in options}
    with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.MemoryFile() as file:
        warnings.simplefilter("ignore")
        with file.open(**settings, dtype=values.dtype, **options) as dataset:
            dataset.write(values.transpose(2, 0, 1))
            for key, value in tags.items():
                setattr(dataset, key, value)
            if mask is not None:
                dataset.write_mask(mask)
        found: bytes = file.read()
        return found


def opened(data: bytes, in_chans: int, **how: Any) -> Picture:
    return tiff.FORMAT.open(data, Reading(in_chans, **{"range": RANGE, **how}))


def whole(picture: Picture) -> Region:
    return picture.region((0, 0, *picture.size), picture.size)


def read(data: bytes, in_chans: int, **how: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The values of the whole, and where they are valid."""
    picture = opened(data, in_chans, **how)
    if not picture.deep:
        return pixels_of(picture.channels()), None
    region = whole(picture)
    assert region.pixels.dtype.isnative
    return region.pixels, region.valid


def same(data: bytes, wanted: np.ndarray, in_chans: int | None = None, **how: Any) -> None:
    found, valid = read(data, wanted.shape[2] if in_chans is None else in_chans, **how)
    assert valid is None
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def refusal(data: bytes, in_chans: int, **how: Any) -> str:
    with pytest.raises(UnreadableImage) as caught:
        whole(open_picture(data, Reading(in_chans, **{"range": RANGE, **how})))
    reason = str(caught.value)
    assert len(reason.splitlines()) == 1
    return reason


def outcome(data: bytes, wanted: np.ndarray) -> str:
    """What becomes of a cell of the matrix; both a region and the whole are looked at."""
    try:
        found, valid = read(data, wanted.shape[2])
    except UnreadableImage as error:
        return str(error)
    np.testing.assert_array_equal(found, wanted)
    assert (found.dtype, valid) == (wanted.dtype, None)
    picture = opened(data, wanted.shape[2])
    part = picture.region((17, 9, 43, 36), (1, 1)).pixels
    np.testing.assert_array_equal(part, wanted[9:36, 17:43])
    return "exact, by tifffile" if picture.deep else "exact, by Pillow"


SHAPES = [(1, "contig"), *itertools.product((2, 3, 4, 5), ("contig", "separate"))]
TYPES = ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64"]
INEXACT = (
    "it is JPEG 2000 of more than 24 bits, which OpenJPEG does not decode exactly: write it with deflate"
)


@pytest.mark.parametrize("dtype", TYPES)
def test_matrix_of_tifffile(dtype: str) -> None:
    floats = np.dtype(dtype).kind == "f"
    compressions: list[dict[str, Any]] = [
        {}, {"compression": "lzw"}, {"compression": "zlib"}, {"compression": "zstd"},
        {"compression": "packbits"}, {"compression": "zlib", "predictor": 3 if floats else 2},
    ]  # fmt: skip
    if dtype != "float16":
        compressions.append({"compression": "lerc"})
    if not floats:
        compressions.append({"compression": "jpeg2000"})
    outcomes: Counter[str] = Counter()
    for (bands, planes), tile, order in itertools.product(SHAPES, (None, (16, 32)), "<>"):
        wanted = drawn(dtype, bands)
        stored = wanted.transpose(2, 0, 1) if planes == "separate" else wanted.squeeze()
        colours = 3 if bands in (3, 4) else 1
        for options in compressions if bands in (1, 3, 5) else (compressions[0], compressions[5]):
            if options.get("compression") in ("jpeg2000", "lerc") and order == ">":
                continue  # tifffile hands the codecs swapped bytes.
            data = written(
                stored,
                byteorder=order,
                tile=tile,
                rowsperstrip=None if tile else 8,
                planarconfig=planes if bands > 1 else None,
                photometric="rgb" if colours == 3 else "minisblack",
                extrasamples=("unspecified",) * (bands - colours),
                bigtiff=bool(tile) and bands == 5,
                **options,
            )
            outcomes[outcome(data, wanted)] += 1
    assert outcomes.pop("exact, by tifffile") > 90
    assert outcomes.pop("exact, by Pillow", 0) == (72 if dtype == "uint8" else 0)
    # One of two byte orders, of ten layouts.
    assert outcomes == ({INEXACT: 10} if dtype in ("uint32", "int32") else {})


@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype != "float16"])
def test_matrix_of_gdal(dtype: str) -> None:
    floats = np.dtype(dtype).kind == "f"
    outcomes: Counter[str] = Counter()
    compressions = ["NONE", "LZW", "DEFLATE", "ZSTD", "PACKBITS", "LERC", "PREDICTOR"]
    for (bands, planes), tiled, order in itertools.product(SHAPES, (False, True), ("LITTLE", "BIG")):
        wanted = drawn(dtype, bands)
        tiles = {"TILED": True, "BLOCKXSIZE": 32, "BLOCKYSIZE": 16} if tiled else {}
        for name in compressions if bands in (1, 3, 5) else ("NONE", "PREDICTOR"):
            if name == "LERC" and floats and order == "BIG":
                continue  # GDAL 3.10 does not get its own values back.
            options: dict[str, Any] = {"COMPRESS": name}
            if name == "PREDICTOR":
                options = {"COMPRESS": "LZW", "PREDICTOR": 3 if floats else 2}
            big = "YES" if tiled else "NO"
            interleave = "PIXEL" if planes == "contig" else "BAND"
            options |= {"INTERLEAVE": interleave, "ENDIANNESS": order, "BIGTIFF": big}
            outcomes[outcome(by_gdal(wanted, **tiles, **options), wanted)] += 1
    assert outcomes.pop("exact, by tifffile") > 80
    assert outcomes.pop("exact, by Pillow", 0) == (0 if dtype != "uint8" else 54)
    assert not outcomes


@pytest.mark.parametrize("bits", [2, 4, 9, 10, 12, 14])
@pytest.mark.parametrize("bands", [1, 3])
def test_depths_in_between(bits: int, bands: int, rng: np.random.Generator) -> None:
    dtype = np.uint8 if bits < 8 else np.uint16
    # Rows of packed values end on bytes.
    values = rng.integers(0, 2**bits, (HEIGHT, 48, bands)).astype(dtype)
    colours = "rgb" if bands == 3 else "minisblack"
    same(written(values.squeeze(), bitspersample=bits, photometric=colours), values)


@pytest.mark.parametrize("precision", [8, 12])
def test_jpeg_within_a_tiff(precision: int) -> None:
    y, x = np.mgrid[:64, :96]
    smooth = np.stack([x + 2 * y, 200 - x, 3 * y], axis=2) % 256 * 2 ** (precision - 8)
    smooth = smooth.astype(np.uint8 if precision == 8 else np.uint16)[:, :, :1]
    options: dict[str, Any] = {"compression": "jpeg", "compressionargs": {"level": 100}, "tile": (32, 32)}
    if precision == 12:
        options["bitspersample"] = 12
    data = written(smooth.squeeze(), **options)
    found, _ = read(data, 1)
    assert found.dtype == smooth.dtype
    assert np.abs(found.astype(int) - smooth).max() <= 3 * 2 ** (precision - 8)


def test_sixteen_bits_in_separate_planes() -> None:
    """Pillow 13 takes two bytes for two pixels."""
    values = drawn("uint16", 3)
    data = written(values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    same(data, values)
    # Without a range the high byte, of the right pixels.
    found = pixels_of(decode(data, Reading(3)))
    np.testing.assert_array_equal(found, values >> 8)


def test_pages_are_channels_where_nothing_else_can_be_meant() -> None:
    for dtype in ("uint8", "uint16", "float32"):
        values = drawn(dtype, 3)
        planes = values.transpose(2, 0, 1)
        for options in (
            {"metadata": None}, {"metadata": {}}, {"imagej": True},
            {"ome": True, "metadata": {"axes": "CYX"}},
        ):  # fmt: skip
            data = written(planes, photometric="minisblack", **options)
            same(data, values)
            same(data, values[:, :, [2, 0]], channels=(2, 0), axes="pages")
            same(data, values[:, :, [1, 1, 1]], channels=(1, 1, 1), axes="pages")
            if dtype != "uint8" or options != {"metadata": None}:
                assert "data.axes=pages" in refusal(data, 1) or "data.channels" in refusal(data, 1)
                assert "data.channels chooses" in refusal(data, 4)


def test_a_document_of_eight_bits_is_its_first_page_as_before() -> None:
    values = drawn("uint8", 5)
    data = written(values.transpose(2, 0, 1), photometric="minisblack", metadata=None)
    same(data, values[:, :, :1], in_chans=1)
    same(data, values[:, :, [0, 0, 0]], in_chans=3)
    same(data, values)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}, {}])
def test_stacks_are_a_question(dtype: str, options: dict[str, Any]) -> None:
    values = drawn(dtype, 6)
    stack = values.transpose(2, 0, 1).reshape(2, 3, HEIGHT, WIDTH)
    data = written(stack, photometric="minisblack", **options, metadata={"axes": "ZCYX"})
    for in_chans in (1, 3, 6):
        if not options and in_chans != 6:
            continue
        reason = refusal(data, in_chans)
        assert "stack of 6 pages (Z 2, C 3)" in reason
        assert "data.axes=pages makes them channels, of which data.channels chooses" in reason
    same(data, values, axes="pages")
    same(data, values[:, :, 3:], axes="pages", channels=(3, 4, 5))
    assert "data.axes is hwc" in refusal(data, 6, axes="hwc")


def test_ome_channels_have_names() -> None:
    values = drawn("uint16", 3)
    names = {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP", "Cy5"]}}
    data = written(values.transpose(2, 0, 1), photometric="minisblack", ome=True, metadata=names)
    same(data, values[:, :, [2, 0]], channels=("Cy5", "DAPI"))
    assert "there are 0 to 2, DAPI, GFP, Cy5" in refusal(data, 1, channels=("RFP",))


def test_a_page_of_an_imagej_stack_without_its_other_pages() -> None:
    data = written(
        drawn("uint16", 4).transpose(2, 0, 1), imagej=True, metadata={"axes": "ZYX"}, truncate=True
    )
    assert "tells of 4 planes, and it has 1 page" in refusal(data, 1)


def test_channels_last_that_were_written_as_pages() -> None:
    for dtype in ("uint8", "uint16"):
        for metadata in (None, {}):
            data = written(drawn(dtype, 5, 64, 96), photometric="minisblack", metadata=metadata)
            for in_chans in (1, 3, 5):
                reason = refusal(data, in_chans)
                assert "64 pages of 96 x 5 values" in reason
                assert "planarconfig='contig'" in reason


def test_two_bands_are_not_one() -> None:
    for dtype in ("uint8", "uint16"):
        values = drawn(dtype, 2)
        options = {"planarconfig": "contig", "photometric": "minisblack", "extrasamples": ["unspecified"]}
        data = written(values, **options)
        assert "it has 2 channels, but in_chans is 1; data.channels chooses" in refusal(data, 1)
        same(data, values[:, :, 1:], channels=(1,))
        same(data, values)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16"])
def test_white_is_zero_is_inverted_at_every_depth(dtype: str) -> None:
    values = drawn(dtype)
    info = np.iinfo(dtype)
    wanted = (-1 - values.astype(np.int64)) if info.min < 0 else info.max - values.astype(np.int64)
    for options in ({}, {"compression": "zlib"}, {"tile": (16, 16)}):
        data = written(values.squeeze(), photometric="miniswhite", **options)
        same(data, wanted.astype(dtype))
    same(by_gdal(values, PHOTOMETRIC="MINISWHITE"), wanted.astype(dtype))


def test_white_is_zero_at_other_depths(rng: np.random.Generator) -> None:
    values = rng.integers(0, 4096, (HEIGHT, 48, 1)).astype(np.uint16)
    same(written(values.squeeze(), bitspersample=12, photometric="miniswhite"), 4095 - values)
    data = written(drawn("float32").squeeze(), photometric="miniswhite")
    assert "floats of which white is 0" in refusal(data, 1)
    bits = rng.random((HEIGHT, 48, 2)) < 0.5
    for photometric, wanted in (("miniswhite", ~bits), ("minisblack", bits)):
        one = written(bits[:, :, 0], photometric=photometric)
        same(one, wanted[:, :, :1] * np.uint8(255))
        # The same by tifffile.
        same(one, wanted[:, :, :1] * np.uint8(255), channels=(0,))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("interleave", ["PIXEL", "BAND"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_what_a_sparse_file_leaves_out_is_no_data(dtype: str, interleave: str, tiled: bool) -> None:
    """Pillow shows the file's own header there."""
    rasterio = pytest.importorskip("rasterio")
    values, there = drawn(dtype, 3, 64, 64), np.zeros((64, 64), bool)
    shape = {"TILED": True, "BLOCKXSIZE": 16, "BLOCKYSIZE": 16} if tiled else {"BLOCKYSIZE": 16}
    there[16:32, slice(32, 48) if tiled else slice(None)] = True
    settings = {"driver": "GTiff", "height": 64, "width": 64, "count": 3, "dtype": dtype, "SPARSE_OK": True}
    with warnings.catch_warnings(), rasterio.MemoryFile() as file:
        warnings.simplefilter("ignore")
        with file.open(**settings, INTERLEAVE=interleave, **shape) as dataset:
            window = rasterio.windows.Window.from_slices((16, 32), (32, 48) if tiled else (0, 64))
            dataset.write(values.transpose(2, 0, 1)[(slice(None), *window.toslices())], window=window)
        data = file.read()
    found, valid = read(data, 3)
    np.testing.assert_array_equal(valid, there)
    np.testing.assert_array_equal(found[there], values[there])
    with pytest.raises(UnreadableImage, match="pixels without data, which 8 bits cannot tell: give data"):
        decode(data, Reading(3))


def test_bands_beside_associated_alpha_are_not_divided() -> None:
    for dtype in ("uint8", "uint16"):
        values = drawn(dtype, 4)
        data = written(values, photometric="rgb", extrasamples=["assocalpha"])
        same(data, values)
        same(data, values[:, :, [0, 3]], channels=(0, 3))
    # As a photograph it is divided, as ever.
    with Image.open(
        io.BytesIO(written(drawn("uint8", 4), photometric="rgb", extrasamples=["assocalpha"]))
    ) as i:
        wanted = np.asarray(i.convert("RGB"))
    same(written(drawn("uint8", 4), photometric="rgb", extrasamples=["assocalpha"]), wanted)


def test_alpha_tells_where_there_is_no_data() -> None:
    for dtype in ("uint8", "uint16"):
        values = drawn(dtype, 4)
        values[:9, :, 3] = 0
        values[9:, :, 3] |= 1
        data = written(values, photometric="rgb", extrasamples=["unassalpha"])
        found, valid = read(data, 3)
        np.testing.assert_array_equal(found, values[:, :, :3])
        assert valid is not None
        np.testing.assert_array_equal(valid, values[:, :, 3] > 0)
        same(data, values)
        # Without a range it is dropped, as that of a photograph.
        shown = pixels_of(decode(data, Reading(3)))
        np.testing.assert_array_equal(shown, values[:, :, :3] >> (8 * (values.itemsize - 1)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_thumbnail_comes_first(dtype: str) -> None:
    values = drawn(dtype, 3, 64, 96)
    small = np.ascontiguousarray(values[::4, ::4])
    for kind in (1, 0):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as tif:
            tif.write(small, photometric="rgb", subfiletype=kind, metadata=None)
            tif.write(values, photometric="rgb", metadata=None)
        same(file.getvalue(), values)
        assert opened(file.getvalue(), 3).size == (96, 64)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tif:
        tif.write(small, photometric="rgb", subfiletype=1, metadata=None, subifds=1)
        tif.write(values, photometric="rgb", metadata=None)
    same(file.getvalue(), values)


def test_pages_of_other_sizes() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tif:
        for size in ((30, 40), (50, 20)):
            tif.write(drawn("uint16", 1, *size).squeeze(), metadata=None)
    reason = refusal(file.getvalue(), 1)
    assert "its pages differ in size (40 x 30, 20 x 50), and no tag says which one is the image" in reason


def test_palettes_are_colours_only_for_colours() -> None:
    for dtype, bits in (("uint8", 8), ("uint16", 16)):
        values = drawn(dtype)
        colours = np.random.default_rng(1).integers(0, 65536, (3, 2**bits)).astype(np.uint16)
        data = written(values.squeeze(), photometric="palette", colormap=colours)
        shown = colours.T[values[:, :, 0]]
        same(data, (shown >> 8).astype(np.uint8) if bits == 8 else shown, in_chans=3)
        same(data, values, in_chans=1)
        same(data, values, channels=(0,))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_gdals_nodata_and_masks(dtype: str) -> None:
    values = drawn(dtype, 2)
    values[4:9, 5:7, 1] = 0
    there = np.ones((HEIGHT, WIDTH), bool)
    there[4:9, 5:7] = False
    there[(values == 0).any(axis=2)] = False
    found, valid = read(by_gdal(values, nodata=0), 2)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(valid, there)
    mask = np.random.default_rng(3).random((HEIGHT, WIDTH)) < 0.5
    found, valid = read(by_gdal(values, mask), 2)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(valid, mask)
    same(by_gdal(values, mask | True), values)


def test_nodata_of_all_kinds() -> None:
    values = drawn("float32")
    values[3, 4], values[5, 6] = np.nan, -3.4028234663852886e38
    for nodata, gaps in ((np.nan, [(3, 4)]), (-3.4028234663852886e38, [(3, 4), (5, 6)])):
        region = open_picture(by_gdal(values, nodata=nodata), Reading(1, range=RANGE)).region(
            (0, 0, WIDTH, HEIGHT), (1, 1)
        )
        assert region.valid is not None
        assert list(zip(*np.nonzero(~region.valid), strict=True)) == gaps
    values = drawn("uint16")
    values[2, 3] = 65535
    assert read(by_gdal(values, nodata=65535), 1)[1] is not None
    data = written(values.squeeze(), extratags=[(42113, 2, 0, "-9999", True)])
    same(data, values)


def test_gdals_scale_and_offset() -> None:
    values = drawn("int16", 3)
    data = by_gdal(values, scales=(0.5, 1.0, 2.0), offsets=(0.0, 7.0, -1000.0))
    wanted = (values * [0.5, 1.0, 2.0] + [0.0, 7.0, -1000.0]).astype(np.float32)
    same(data, wanted)
    same(data, wanted[:, :, [2, 0]], channels=(2, 0))
    data = by_gdal(drawn("uint8", 3), scales=(0.5, 1.0, 2.0), photometric="rgb")
    same(data, (drawn("uint8", 3) * [0.5, 1.0, 2.0]).astype(np.float32))
    # As a photograph it is what it was.
    np.testing.assert_array_equal(pixels_of(decode(data, Reading(3))), drawn("uint8", 3))


def test_bands_have_gdals_descriptions() -> None:
    values = drawn("uint16", 3)
    data = by_gdal(values, descriptions=("B02", None, "B08"))
    same(data, values[:, :, [2, 0]], channels=("B08", "B02"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    values = drawn("uint16", 3)
    turned = {
        2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.swapaxes(0, 1),
        6: values[::-1].swapaxes(0, 1), 7: values[::-1, ::-1].swapaxes(0, 1),
        8: values[:, ::-1].swapaxes(0, 1),
    }.get(orientation, values)  # fmt: skip
    data = written(values, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    assert opened(data, 3).size == turned.shape[1::-1]
    same(data, turned)
    part = opened(data, 3).region((3, 4, 30, 35), (1, 1)).pixels
    np.testing.assert_array_equal(part, turned[4:35, 3:30])


class Counted(io.BytesIO):
    """Counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.num_bytes = 0

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        found = super().read(size)
        self.num_bytes += len(found)
        return found


@pytest.mark.parametrize("options", [{"tile": (32, 32)}, {"tile": (32, 32), "compression": "zlib"}, {}])
def test_a_region_reads_what_it_touches(options: dict[str, Any]) -> None:
    values = drawn("uint16", 4, 512, 512)
    data = written(values, photometric="minisblack", planarconfig="contig", **options)
    files: list[Counted] = []

    def again() -> BinaryIO:
        files.append(Counted(data))
        return files[-1]

    picture = by_tifffile(again, Reading(4, range=RANGE))
    assert files.pop().num_bytes < 20_000
    for box in ((200, 100, 232, 132), (0, 0, 1, 1), (511, 511, 512, 512)):
        part = picture.region(box, (1, 1)).pixels
        np.testing.assert_array_equal(part, values[box[1] : box[3], box[0] : box[2]])
        assert files.pop().num_bytes <= (4 * 32 * 32 * 8 * 1.1 if "tile" in options else 32 * 512 * 8)


def test_files_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    assert tiff.FORMAT.open_path is not None
    for values, options in (
        (drawn("uint16", 5), {"tile": (16, 16), "compression": "lzw"}),
        (drawn("float32"), {"compression": "zlib", "predictor": 3}),
        (drawn("uint8", 3), {"photometric": "rgb"}),
        (drawn("uint8"), {"compression": "packbits"}),
        (drawn("uint8"), {"photometric": "miniswhite"}),
        (drawn("uint8", 3), {"photometric": "rgb", "compression": "jpeg", "tile": (16, 16)}),
        (drawn("uint8", 3), {"photometric": "rgb", "compression": "jpeg", "subsampling": (2, 2)}),
    ):  # fmt: skip
        colours = {"photometric": "minisblack", "planarconfig": "contig" if values.shape[2] > 1 else None}
        path.write_bytes(written(values.squeeze(), **{**colours, **options}))
        picture = tiff.FORMAT.open_path(path, Reading(values.shape[2], range=RANGE))
        assert picture.size == (WIDTH, HEIGHT)
        assert picture.deep == (options.get("photometric") != "miniswhite")
        # The same as of bytes, which Pillow decodes where it can.
        wanted, _ = read(path.read_bytes(), values.shape[2])
        found = picture.region((3, 4, 33, 30), (1, 1)).pixels
        np.testing.assert_array_equal(found, wanted[4:30, 3:33])


@pytest.mark.parametrize("size", [(128, 192), (101, 67)])
def test_overviews(size: tuple[int, int], tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = drawn("float32", 2, *size)
    path = tmp_path / "a.tif"
    path.write_bytes(by_gdal(values, TILED=True, BLOCKXSIZE=32, BLOCKYSIZE=32))
    with warnings.catch_warnings(), rasterio.open(path, "r+") as dataset:
        warnings.simplefilter("ignore")
        dataset.build_overviews([2, 4], rasterio.enums.Resampling.average)
    data = path.read_bytes()
    box = (8, 16, 64, 96)
    plain = tiff.FORMAT.open(data, Reading(2, range=RANGE)).region(box, (3, 3))
    assert plain.pixels.shape == (80, 56, 2)
    picture = by_tifffile(lambda: io.BytesIO(data), Reading(2, range=RANGE, overviews=True))
    for factor, at_least in ((1, (29, 40)), (2, (28, 40)), (2, (14, 21)), (4, (13, 19))):
        region = picture.region(box, at_least)
        height, width = (-(-side // factor) for side in size)
        x, y = width / size[1], height / size[0]
        left, top = int(8 * x), int(16 * y)
        np.testing.assert_allclose(region.box, (8 * x - left, 16 * y - top, 64 * x - left, 96 * y - top))
        if size == (128, 192):
            mean = values.reshape(128 // factor, factor, 192 // factor, factor, 2).mean(axis=(1, 3))
            wanted = mean[top : 96 // factor, left : 64 // factor]
            np.testing.assert_allclose(region.pixels, wanted, atol=1e-6)
    # Of a pyramid in SubIFDs, as OME-TIFFs have them.
    file = io.BytesIO()
    with tifffile.TiffWriter(file, ome=True) as tif:
        planes = drawn("uint16", 3, *size).transpose(2, 0, 1)
        tif.write(planes, subifds=1, photometric="minisblack", metadata={"axes": "CYX"})
        tif.write(planes[:, ::2, ::2], subfiletype=1, photometric="minisblack")
    picture = by_tifffile(lambda: io.BytesIO(file.getvalue()), Reading(3, range=RANGE, overviews=True))
    region = picture.region((0, 0, 64, 96), (10, 10))
    half = planes[:, ::2, ::2].transpose(1, 2, 0)
    np.testing.assert_array_equal(region.pixels, half[: region.pixels.shape[0], : region.pixels.shape[1]])


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16), "compression": "jpeg"}])
def test_files_that_break_off(options: dict[str, Any]) -> None:
    dtype = "uint8" if options.get("compression") == "jpeg" else "uint16"
    data = written(drawn(dtype).squeeze(), metadata=None, **options)
    last = tifffile.TiffFile(io.BytesIO(data)).pages[0].dataoffsets[-1]
    for end in (last + 1, len(data) - 3):
        reason = refusal(data[:end], 1, channels=(0,))
        assert "breaks off" in reason or "Error" in reason


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"photometric": "cielab", "values": drawn("uint16", 3)}, "CIELAB"),
        ({"photometric": "cfa", "values": drawn("uint16").squeeze()}, "CFA"),
        ({"values": drawn("float32").squeeze().astype(np.complex64)}, "neither integers nor floats"),
        (
            {"values": drawn("uint16", 6).reshape(2, HEIGHT, WIDTH, 3), "photometric": "rgb"},
            "2 pages of 3 ch",
        ),
    ],
)
def test_what_is_not_read_is_said(options: dict[str, Any], word: str) -> None:
    assert word in refusal(written(options.pop("values"), **options), 3)


def test_without_tifffile_photographs_are_read_and_the_rest_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photograph = written(drawn("uint8", 3), photometric="rgb")
    deep = written(drawn("uint16", 3), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    same(photograph, drawn("uint8", 3))
    assert isinstance(opened(photograph, 3), DecodedPicture)
    sentence = (
        r"reading this kind of TIFF needs tifffile, which is not installed: pip install 'etpp-ssl\[tiff\]'"
    )
    for reading in (Reading(3), Reading(3, range=RANGE)):
        with pytest.raises(UnreadableImage, match=sentence):
            open_picture(deep, reading)


def test_more_pixels_than_allowed() -> None:
    data = written(drawn("uint16").squeeze())
    with pytest.raises(UnreadableImage, match=r"claims 50 x 37 pixels, more than data\.max_pixels 1,849"):
        open_picture(data, Reading(1, max_pixels=HEIGHT * WIDTH - 1))
    # One strip of a few bytes that would fill any memory.
    file = bytearray(
        written(drawn("uint16").squeeze(), compression="zlib", metadata=None, rowsperstrip=HEIGHT)
    )
    page = tifffile.TiffFile(io.BytesIO(bytes(file))).pages[0]
    for tag in (256, 257, 278):
        struct.pack_into(
            "<H" if page.tags[tag].dtype == 3 else "<I", file, page.tags[tag].valueoffset, 60_000
        )
    with pytest.raises(UnreadableImage, match="60,000 x 60,000 pixels"):
        open_picture(bytes(file), Reading(1, range=RANGE))
    with pytest.raises(UnreadableImage, match="too many to decode at once: write it in tiles"):
        open_picture(bytes(file), Reading(1, range=RANGE, max_pixels=1 << 40))


def test_a_picture_of_tifffile_can_be_asked_again() -> None:
    values = drawn("uint16", 2)
    picture = opened(written(values.transpose(2, 0, 1), photometric="minisblack"), 2)
    assert isinstance(picture, TiffPicture)
    for _ in range(2):
        np.testing.assert_array_equal(picture.region((1, 2, 9, 8), (1, 1)).pixels, values[2:8, 1:9])


def test_a_description_that_does_not_fit_says_nothing() -> None:
    values = drawn("uint16")
    data = written(values.squeeze()).replace(b'"shape": [37, 50]', b'"shape": [99, 50]')
    assert b"[99, 50]" in data
    same(data, values)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "lerc"])
def test_a_tile_cannot_claim_more_than_its_place(compression: str) -> None:
    dtype = "uint8" if compression == "jpeg" else "uint16"
    data = bytearray(written(drawn(dtype).squeeze(), compression=compression, metadata=None))
    start = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0].dataoffsets[0]
    if compression == "jpeg":
        place, size = data.index(b"\xff\xc0", start) + 5, struct.pack(">HH", 60_000, 60_000)
    elif compression == "jpeg2000":
        place, size = data.index(b"\xff\x4f\xff\x51", start) + 8, struct.pack(">II", 60_000, 60_000)
    else:
        place, size = data.index(b"Lerc2 ", start) + 14, struct.pack("<ii", 60_000, 60_000)
    data[place : place + len(size)] = size
    assert "claims 60,000 x 60,000 pixels" in refusal(bytes(data), 1, channels=(0,))


def test_all_channels_of_a_file() -> None:
    """As `etpp inspect` and `data.channel_sampling` ask for them."""
    for dtype in ("uint8", "uint16"):
        for bands in (1, 2, 3, 5):
            colours = "rgb" if bands == 3 else "minisblack"
            extra = ["unspecified"] * (bands - 1) if bands in (2, 5) else None
            values = drawn(dtype, bands)
            data = written(
                values.squeeze(), photometric=colours, planarconfig=extra and "contig", extrasamples=extra
            )
            assert whole(open_picture(data, Reading(0, range="raw"))).pixels.shape == values.shape
        values = drawn(dtype, 4)
        values[:, :, 3] |= 1
        data = written(values, photometric="rgb", extrasamples=["unassalpha"])
        np.testing.assert_array_equal(whole(opened(data, 0)).pixels, values[:, :, :3])
    data = written(drawn("uint16", 5).transpose(2, 0, 1), photometric="minisblack", metadata=None)
    assert "it has 1 channel and 5 pages: data.frames=all" in refusal(data, 0)
    same(data, drawn("uint16", 5), in_chans=0, axes="pages")


def test_a_number_of_channels_that_no_file_has_is_refused_before_anything_is_made_for_each() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 5, 3), np.uint16), photometric="rgb")
    data = bytearray(file.getvalue())
    # The entry of SamplesPerPixel: its tag, type SHORT, one value; as a LONG it can claim anything.
    place = data.index(struct.pack("<HHI", 277, 3, 1))
    data[place : place + 12] = struct.pack("<HHII", 277, 4, 1, 2_000_000_000)
    with pytest.raises(UnreadableImage, match="it claims 2,000,000,000 channels, more than 65,535"):
        open_picture(bytes(data), Reading(4, range="dtype"))
