"""`data.reader=rasterio`: what GDAL reads, with its masks, scales and palettes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etpp_ssl.data.formats import check_header, decode, open_picture
from etpp_ssl.data.formats import rasterio as gdal
from etpp_ssl.data.formats.base import Picture, Reading, UnreadableImage, pixels_of
from etpp_ssl.data.sources.folder import FolderConfig

rasterio = pytest.importorskip("rasterio")

RANGE = ((0.0, 1.0),)


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Any:
    yield
    assert capfd.readouterr() == ("", "")


def drawn(dtype: str, bands: int = 1) -> np.ndarray:
    rng = np.random.default_rng(bands)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal((37, 50, bands)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, (37, 50, bands), dtype, endpoint=True)


def written(
    path: Path, values: np.ndarray, driver: str = "GTiff", mask: np.ndarray | None = None, **options: Any
) -> bytes:
    tags = {key: options.pop(key) for key in ("scales", "offsets", "descriptions") if key in options}
    colours = options.pop("colours", None)
    size = {"height": values.shape[0], "width": values.shape[1], "count": values.shape[2]}
    with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver=driver, dtype=values.dtype, **size, **options) as dataset:
            dataset.write(values.transpose(2, 0, 1))
            for key, value in tags.items():
                setattr(dataset, key, value)
            if colours is not None:
                dataset.write_colormap(1, colours)
            if mask is not None:
                dataset.write_mask(mask)
    return path.read_bytes()


def opened(path: Path, in_chans: int, **how: Any) -> list[Picture]:
    """By its bytes, and by its path."""
    reading = Reading(in_chans, **{"range": RANGE, "reader": "rasterio", **how})
    assert gdal.FORMAT.open_path is not None
    return [gdal.FORMAT.open(path.read_bytes(), reading), gdal.FORMAT.open_path(path, reading)]


def same(path: Path, wanted: np.ndarray, valid: np.ndarray | None = None, **how: Any) -> None:
    in_chans = how.pop("in_chans", wanted.shape[2])
    for picture in opened(path, in_chans, **how):
        assert picture.size == wanted.shape[1::-1]
        for left, top, right, bottom in ((0, 0, *picture.size), (7, 3, 41, 30)):
            region = picture.region((left, top, right, bottom), (1, 1))
            assert region.pixels.dtype == wanted.dtype
            np.testing.assert_array_equal(region.pixels, wanted[top:bottom, left:right])
            if valid is None:
                assert region.valid is None
            else:
                np.testing.assert_array_equal(region.valid, valid[top:bottom, left:right])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("bands", [1, 3, 5])
def test_values_are_exact(dtype: str, bands: int, tmp_path: Path) -> None:
    written(tmp_path / "a.tif", drawn(dtype, bands), COMPRESS="DEFLATE")
    same(tmp_path / "a.tif", drawn(dtype, bands))
    same(tmp_path / "a.tif", drawn(dtype, bands)[:, :, [bands - 1, 0]], channels=(bands - 1, 0))


@pytest.mark.parametrize("driver", ["HFA", "ENVI", "PNG", "ERS", "RST"])
def test_other_formats(driver: str, tmp_path: Path) -> None:
    path = tmp_path / {"HFA": "a.img", "PNG": "a.png", "ERS": "a.ers", "RST": "a.rst"}.get(driver, "a.bil")
    values = drawn("uint8" if driver == "RST" else "uint16")
    written(path, values, driver)
    reading = Reading(1, range=RANGE, reader="rasterio")
    assert gdal.FORMAT.open_path is not None
    region = gdal.FORMAT.open_path(path, reading).region((0, 0, 50, 37), (1, 1))
    np.testing.assert_array_equal(region.pixels, values)


def test_masks_and_nodata(tmp_path: Path) -> None:
    path, values = tmp_path / "a.tif", drawn("int16", 2)
    there = np.random.default_rng(0).random((37, 50)) < 0.5
    written(path, values, mask=there)
    same(path, values, there)
    values[~there, 1] = -9999
    written(path, values, nodata=-9999)
    same(path, values, there & (values[:, :, 0] != -9999))
    with pytest.raises(UnreadableImage, match=r"32-bit|not uint8|without data"):
        decode(path.read_bytes(), Reading(2, reader="rasterio"))


def test_alpha(tmp_path: Path) -> None:
    path, values = tmp_path / "a.tif", drawn("uint16", 4)
    values[:9, :, 3], values[9:, :, 3] = 0, 9
    written(path, values, photometric="RGB", ALPHA="YES")
    same(path, values[:, :, :3], values[:, :, 3] > 0)
    same(path, values)
    found = pixels_of(decode(path.read_bytes(), Reading(3, reader="rasterio")))
    np.testing.assert_array_equal(found, values[:, :, :3] >> 8)


def test_scales_names_and_white(tmp_path: Path) -> None:
    path, values = tmp_path / "a.tif", drawn("int16", 3)
    written(path, values, scales=(0.5, 1, 2), offsets=(0, 7, -1), descriptions=("B02", None, "B08"))
    scaled = (values * [0.5, 1, 2] + [0, 7, -1]).astype(np.float32)
    same(path, scaled)
    same(path, scaled[:, :, [2, 0]], channels=("B08", "B02"))
    for dtype in ("uint8", "uint16"):
        values = drawn(dtype)
        written(path, values, PHOTOMETRIC="MINISWHITE")
        same(path, np.iinfo(dtype).max - values)


def test_palettes(tmp_path: Path) -> None:
    path, values = tmp_path / "a.tif", drawn("uint8")
    colours = {n: (n, 255 - n, n // 2, 255) for n in range(256)}
    written(path, values, photometric="palette", colours=colours)
    same(path, np.array([colours[int(n)][:3] for n in values.flat], np.uint8).reshape(37, 50, 3))
    same(path, values)


def test_a_virtual_dataset_is_read_from_a_folder_and_not_from_bytes(tmp_path: Path) -> None:
    values = drawn("uint16")
    written(tmp_path / "a.tif", values)
    vrt = tmp_path / "b.vrt"
    vrt.write_text(
        '<VRTDataset rasterXSize="50" rasterYSize="37"><VRTRasterBand dataType="UInt16" band="1">'
        f"<SimpleSource><SourceFilename>{tmp_path / 'a.tif'}</SourceFilename></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    )
    reading = Reading(1, range=RANGE, reader="rasterio")
    assert gdal.FORMAT.open_path is not None
    np.testing.assert_array_equal(
        gdal.FORMAT.open_path(vrt, reading).region((0, 0, 50, 37), (1, 1)).pixels, values
    )
    with pytest.raises(UnreadableImage, match="describes other files"):
        open_picture(vrt.read_bytes(), reading)


@pytest.mark.parametrize("data", [b"", b"not a picture\n" * 40, b"II*\0\x08\0\0\0"])
def test_what_gdal_does_not_read(data: bytes) -> None:
    with pytest.raises(UnreadableImage) as caught:
        open_picture(data, Reading(1, range=RANGE, reader="rasterio"))
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_bands_and_sizes_are_sentences(tmp_path: Path) -> None:
    data = written(tmp_path / "a.tif", drawn("uint16", 2))
    for reading, sentence in (
        (Reading(1, range=RANGE, reader="rasterio"), "it has 2 channels, but in_chans is 1; data.channels"),
        (Reading(2, reader="rasterio", max_pixels=1000), "claims 50 x 37 pixels"),
    ):
        with pytest.raises(UnreadableImage, match=sentence):
            open_picture(data, reading)
    with pytest.raises(UnreadableImage, match="claims 50 x 37 pixels"):
        check_header(data, 1000, "rasterio")
    check_header(data, reader="rasterio")


def test_a_folder_of_gdals_formats(tmp_path: Path) -> None:
    for number in range(3):
        written(tmp_path / f"{number}.img", drawn("float32", number + 1)[:, :, :1], "HFA")
    how = {"root": str(tmp_path), "labels": "none", "range": (0.0, 1.0)}
    source = FolderConfig(**how, reader="rasterio").open("train", in_chans=1, image_size=(32, 32), seed=0)
    assert len(source) == 3
    region = source.open(1).region((0, 0, 50, 37), (1, 1))
    np.testing.assert_array_equal(region.pixels, drawn("float32", 2)[:, :, :1])


def test_without_rasterio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(UnreadableImage, match=r"not installed: pip install 'etpp-ssl\[rasterio\]'"):
        open_picture(b"II*\0", Reading(1, reader="rasterio"))
