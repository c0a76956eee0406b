"""GeoTIFFs: where they lie, their windows and overviews, and photographs that are read in parts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etpp_ssl.data.formats import open_file
from etpp_ssl.data.formats.base import Reading, place_of, reads_parts
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.sources.splits import open_split

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")
rasterio = pytest.importorskip("rasterio")

RANGE = ((0.0, 4000.0),)


@pytest.fixture(autouse=True)
def rasterio_may_warn() -> Iterator[None]:
    """Of files without a place that the tests write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "+proj=laea +lat_0=10 +lon_0=20", None])
@pytest.mark.parametrize("point", [False, True])
def test_where_a_geotiff_lies(crs: str | None, point: bool, tmp_path: Path) -> None:
    for transform in (
        rasterio.Affine(10, 0, 500_000, 0, -10, 5_600_000),
        rasterio.Affine(3, 1, 17.5, 0.5, -2, -3),
    ):
        path = tmp_path / "a.tif"
        layout = {"width": 9, "height": 7, "count": 4, "dtype": "uint16", "crs": crs, "transform": transform}
        with rasterio.open(path, "w", driver="GTiff", **layout) as dataset:
            dataset.write(np.zeros((4, 7, 9), np.uint16))
            if point:
                dataset.update_tags(AREA_OR_POINT="Point")
        found = place_of(open_file(path, Reading(4, range=RANGE)))
        by_gdal = place_of(open_file(path, Reading(4, range=RANGE, reader="rasterio")))
        assert found is not None
        assert by_gdal is not None
        assert found.transform == pytest.approx(transform.to_gdal())
        assert by_gdal.transform == transform.to_gdal()
        # A system without a number has no short name.
        assert found.crs == (crs if crs and crs.startswith("EPSG") else "")
        assert by_gdal.crs.startswith((crs or "")[:5] if found.crs else "")


def test_a_file_without_a_place_has_none(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((7, 9, 4), np.uint16), photometric="minisblack", planarconfig="contig"
    )
    assert place_of(open_file(tmp_path / "a.tif", Reading(4, range=RANGE))) is None
    assert place_of(open_file(tmp_path / "a.tif", Reading(4, range=RANGE, reader="rasterio"))) is None


@pytest.mark.parametrize("photometric", ["rgb", "palette"])
def test_a_photograph_is_read_in_parts_where_it_is_as_it_is_stored(photometric: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    stored, colours = values, None
    if photometric == "palette":
        stored, colours = values[:, :, 0], np.tile(np.arange(256, dtype=np.uint16) * 257, (3, 1))
        values = values[:, :, [0, 0, 0]]
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        tile=(16, 16),
        compression="deflate",
        photometric=photometric,
        colormap=colours,
    )
    picture = open_file(tmp_path / "a.tif", Reading(3, range=((0.0, 255.0),)))
    assert picture.reads_parts == (photometric == "rgb")
    np.testing.assert_array_equal(picture.region((5, 7, 60, 80), (1, 1)).pixels, values[7:80, 5:60])


def test_a_photograph_with_overviews_is_read_in_parts(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (3, 300, 400), dtype=np.uint8)
    layout = {"width": 400, "height": 300, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", tiled=True, compress="deflate", **layout
    ) as scene:
        scene.write(values)
        scene.build_overviews([2], rasterio.enums.Resampling.average)
    picture = open_file(tmp_path / "a.tif", Reading(3, range=((0.0, 255.0),), overviews=True))
    assert reads_parts(picture)
    expected = values.transpose(1, 2, 0)
    np.testing.assert_array_equal(picture.region((5, 7, 60, 80), (50, 50)).pixels, expected[7:80, 5:60])
    assert picture.region((0, 0, 400, 300), (200, 150)).pixels.shape == (150, 200, 3)
    # 8 bits are read as ever.
    assert not open_file(tmp_path / "a.tif", Reading(3)).deep


@pytest.mark.parametrize(("resampling", "serves"), [("average", True), ("cubic", True), ("nearest", False)])
def test_windows_of_a_cog_and_its_overviews(resampling: str, serves: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4000, (4, 700, 900), dtype=np.uint16)
    layout = {"width": 900, "height": 700, "count": 4, "dtype": "uint16", "crs": "EPSG:32633"}
    place = rasterio.Affine(10, 0, 500_000, 0, -10, 5_600_000)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="COG", blocksize=128, compress="deflate",
        overview_resampling=resampling, transform=place, **layout,
    ) as dataset:  # fmt: skip
        dataset.write(values)
    config = FolderConfig(root=str(tmp_path), range=(0, 4000), tile=400, stride=300)
    source: Any = open_split(config, "train", in_chans=4, image_size=(96, 96), seed=0)
    what = "serve small crops" if serves else "are not read: they are no averages of the pixels"
    assert source.describe().endswith(f"; their overviews {what}")
    assert [source.name(index) for index in range(len(source))] == [
        "a.tif#0,0", "a.tif#0,300", "a.tif#0,500", "a.tif#300,0", "a.tif#300,300", "a.tif#300,500",
    ]  # fmt: skip
    for index in range(6):
        _, row, column, _ = source.part(index)
        window = source.open(index)
        part = window.region((0, 0, 400, 400), (400, 400))
        expected = values[:, row : row + 400, column : column + 400].transpose(1, 2, 0)
        np.testing.assert_array_equal(part.pixels, expected)
        small = window.region((0, 0, 400, 400), (200, 200))
        assert small.box[2] - small.box[0] == (200 if serves else 400)
        if resampling == "average":
            means = expected.reshape(200, 2, 200, 2, 4).mean(axis=(1, 3))
            assert np.abs(small.pixels - means).max() <= 0.5
        assert source.place(index).transform == (place * rasterio.Affine.translation(column, row)).to_gdal()
