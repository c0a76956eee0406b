"""Arrays in .npy, .npz, HDF5 and Zarr: which one, its axes, exact values, and no more read than asked for."""

from __future__ import annotations

import base64
import json
import multiprocessing
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from stored import as_floats, damage, deep, opened, refusal, values

from etpp_ssl.config import UserError
from etpp_ssl.data.formats import check_header, open_file
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.sources.overviews import overviews_are_averages
from etpp_ssl.data.sources.splits import open_split

SHAPE = (21, 34, 5)
DTYPES = ["?", "u1", "i1", "u2", ">u2", "i2", ">i2", "u4", "i4", "i8", "f2", "f4", ">f4", "f8"]
Writer = Callable[[Path, np.ndarray], Path]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "a.npy", array)
    return folder / "a.npy"


def fortran_npy(folder: Path, array: np.ndarray) -> Path:
    return npy(folder, np.asfortranarray(array))


def npz(folder: Path, array: np.ndarray) -> Path:
    np.savez(folder / "a.npz", image=array, label=np.array([3]), names=np.array(["a", None]))
    return folder / "a.npz"


def packed_npz(folder: Path, array: np.ndarray) -> Path:
    np.savez_compressed(folder / "a.npz", array)
    return folder / "a.npz"


def hdf5(folder: Path, array: np.ndarray) -> Path:
    (folder / "a.h5").unlink(missing_ok=True)
    with h5py.File(folder / "a.h5", "w") as file:
        file["group/image"] = array
        file["label"] = 3
    return folder / "a.h5"


def packed_hdf5(folder: Path, array: np.ndarray) -> Path:
    (folder / "a.hdf5").unlink(missing_ok=True)
    with h5py.File(folder / "a.hdf5", "w") as file:
        file.create_dataset("image", data=array, chunks=True, compression="gzip", shuffle=True)
    return folder / "a.hdf5"


def zarr_2(folder: Path, array: np.ndarray) -> Path:
    written = zarr.create_array(
        folder / "a.zarr", shape=array.shape, dtype=array.dtype, chunks=(8,) * array.ndim, zarr_format=2,
        overwrite=True,
    )  # fmt: skip
    written[...] = array
    return folder / "a.zarr"


def zarr_3(folder: Path, array: np.ndarray) -> Path:
    group = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=3)
    chunks = (8,) * array.ndim
    written = group.create_array("image", shape=array.shape, dtype=array.dtype, chunks=chunks)
    written[...] = array
    return folder / "a.zarr"


def sharded_zarr(folder: Path, array: np.ndarray) -> Path:
    written = zarr.create_array(
        folder / "a.zarr", shape=array.shape, dtype=array.dtype, chunks=(4,) * array.ndim,
        shards=(8,) * array.ndim, overwrite=True,
    )  # fmt: skip
    written[...] = array
    return folder / "a.zarr"


WRITERS = [npy, fortran_npy, npz, packed_npz, hdf5, packed_hdf5, zarr_2, zarr_3, sharded_zarr]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITERS)
def test_values_are_exact(write: Writer, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    array = (rng.normal(size=SHAPE) * 100).astype("i1").astype(dtype)
    path = write(tmp_path, array)
    found = values(path, deep(5))
    assert found.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, array)
    chosen = values(path, deep(3, channels=(4, 1, 4)))
    np.testing.assert_array_equal(chosen, array[:, :, [4, 1, 4]])
    if path.is_file():
        check_header(path.read_bytes())


@pytest.mark.parametrize("write", WRITERS)
def test_axes(write: Writer, tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 60000, SHAPE, "u2")
    path = write(tmp_path, array.transpose(2, 0, 1))
    np.testing.assert_array_equal(values(path, deep(5, axes="chw")), array)
    np.testing.assert_array_equal(values(path, deep(5, axes="cwh")), array.transpose(1, 0, 2))
    np.testing.assert_array_equal(values(path, deep(2, axes="chw", channels=(3, 0))), array[:, :, [3, 0]])
    assert "data.axes says which axis is which, such as chw" in refusal(path, deep(5))
    assert "it has no pages: give data.axes such as chw" in refusal(path, deep(5, axes="pages"))
    assert "data.axes is hw: give a letter an axis" in refusal(path, deep(1, axes="hw"))
    assert "an image has h, w and c, and z has 5 entries" in refusal(path, deep(1, axes="zhw"))
    assert "it has no channel 5 of data.channels" in refusal(path, deep(1, axes="chw", channels=(5,)))
    path = write(tmp_path, array[None, :, None, :, 2])
    np.testing.assert_array_equal(values(path, deep(axes="hw")), array[:, :, 2:3])
    np.testing.assert_array_equal(values(path, deep(axes="chzw")), array[:, :, 2:3])
    assert "its shape is (1, 21, 1, 34), not (height, width, 1)" in refusal(path, deep())
    path = write(tmp_path, array[:, :0])
    assert "its shape is (21, 0, 5)" in refusal(path, deep(5))
    path = write(tmp_path, array[:, :, 2])
    np.testing.assert_array_equal(values(path, deep()), array[:, :, 2:3])
    assert "its shape is (21, 34), not (height, width, 3)" in refusal(path, deep(3))


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_no_image_is_refused(
    write: Writer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "its values are complex64: integers and floats are read" in refusal(
        write(tmp_path, np.zeros((5, 6), "c8")), deep()
    )
    assert "data.max_pixels 100 allows" in refusal(write(tmp_path, np.zeros((50, 60))), deep(max_pixels=100))
    assert refusal(write(tmp_path, np.full((5, 6), np.nan)), deep()) == "it has no pixel with data"
    assert refusal(write(tmp_path, np.full((5, 6), 7)), deep(nodata=7)) == "it has no pixel with data"
    assert "(5,)" in (reason := refusal(write(tmp_path, np.zeros(5)), deep())) or "two or more" in reason
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("write", [npz, hdf5, zarr_3])
def test_one_of_several_arrays(write: Writer, tmp_path: Path, rng: np.random.Generator) -> None:
    image, mask = rng.integers(0, 60000, (2, 21, 34), "u2")
    path = write(tmp_path, image)
    if write is npz:
        np.savez(path, image=image, mask=mask, label=np.array([3]))
    elif write is hdf5:
        with h5py.File(path, "w") as file:
            file["image"], file["mask"], file["label"] = image, mask, 3
    else:
        zarr.open_group(path, mode="a").create_array("mask", data=mask)
    np.testing.assert_array_equal(values(path, deep(array="mask"))[:, :, 0], mask)
    np.testing.assert_array_equal(values(path, deep(array="/image"))[:, :, 0], image)
    assert refusal(path, deep()).endswith("it has 'image', 'mask': data.array says which is the image")
    assert refusal(path, deep(array="other")).startswith(
        "it has no array 'other' of data.array; it has 'image'"
    )


@pytest.mark.parametrize("write", [hdf5, zarr_2, zarr_3])
def test_attributes_of_the_cf_conventions(write: Writer, tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 4, (21, 34), "i2")
    path = write(tmp_path, array)

    def set_attributes(**attributes: Any) -> None:
        if write is hdf5:
            with h5py.File(path, "a") as file:
                file["group/image"].attrs.update(attributes)
        else:
            node = zarr.open(path, mode="a")
            (node if write is zarr_2 else node["image"]).attrs.update(attributes)

    set_attributes(_FillValue=2)
    found = as_floats(path, deep())[:, :, 0]
    np.testing.assert_array_equal(found, np.where(array == 2, np.nan, array))
    set_attributes(_FillValue=2, scale_factor=0.5, add_offset=-10.0)
    found = as_floats(path, deep())[:, :, 0]
    np.testing.assert_array_equal(found, np.where(array == 2, np.nan, array * 0.5 - 10))
    if write is hdf5:
        set_attributes(_FillValue=np.array([3], "i2"))
    else:
        set_attributes(_FillValue=base64.b64encode(struct.pack("<d", 3.0)).decode())
    found = as_floats(path, deep())[:, :, 0]
    np.testing.assert_array_equal(found, np.where(array == 3, np.nan, array * 0.5 - 10))
    set_attributes(_FillValue="none")
    assert refusal(path, deep()) == "its attribute _FillValue is 'none', not a number"


def test_names_of_axes_count(tmp_path: Path, rng: np.random.Generator) -> None:
    """netCDF's in HDF5, xarray's in Zarr 2, and those of Zarr 3."""
    array = rng.integers(0, 60000, (3, 21, 34), "u2")
    path = hdf5(tmp_path, array)
    with h5py.File(path, "a") as file:
        dataset = file["group/image"]
        for axis, name in enumerate(("band", "lat", "lon")):
            file[name] = np.arange(dataset.shape[axis])
            file[name].make_scale()
            dataset.dims[axis].attach_scale(file[name])
    np.testing.assert_array_equal(values(path, deep(3)), array.transpose(1, 2, 0))
    path = zarr_2(tmp_path, array)
    zarr.open(path, mode="a").attrs["_ARRAY_DIMENSIONS"] = ["time", "y", "x"]
    assert "data.frames=all makes each of the 3 entries of t an image" in refusal(path, deep(3))
    np.testing.assert_array_equal(values(path, deep(3, axes="pages")), array.transpose(1, 2, 0))
    folder = tmp_path / "b.zarr"
    names = ("channel", "x", "y")
    written = zarr.create_array(
        folder, shape=array.shape, dtype="u2", chunks=(1, 8, 8), dimension_names=names
    )
    written[...] = array
    np.testing.assert_array_equal(values(folder, deep(3)), array.transpose(2, 1, 0))


def ome(
    path: Path,
    array: np.ndarray,
    axes: str,
    version: str,
    *,
    names: tuple[str, ...] = (),
    averaged: bool = False,
) -> Path:
    """An OME-NGFF image of two levels."""
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    kinds = {"t": "time", "c": "channel"}
    scales = {
        "axes": [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes],
        "datasets": [{"path": "s0"}, {"path": "s1"}],
        "name": "image",
    }
    attributes: dict[str, Any] = {"multiscales": [scales]}
    if names:
        attributes["omero"] = {"channels": [{"label": name} for name in names]}
    if version == "0.4":
        scales["version"] = version
        group.attrs.update(attributes)
    else:
        group.attrs["ome"] = {"version": version, **attributes}
    height, width = (side // 2 for side in array.shape[-2:])
    blocks = array[..., : 2 * height, : 2 * width].reshape(*array.shape[:-2], height, 2, width, 2)
    half = blocks.mean(axis=(-3, -1)).astype(array.dtype) if averaged else array[..., ::2, ::2]
    for level, pixels in (("s0", array), ("s1", half)):
        written = group.create_array(
            level, shape=pixels.shape, dtype=pixels.dtype, chunks=(1,) * 3 + (16, 16)
        )
        written[...] = pixels
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_ngff(version: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Full resolution, axes and names of channels as the metadata has them; stacks only when asked for."""
    array = rng.integers(0, 60000, (1, 3, 1, 40, 50), "u2")
    path = ome(tmp_path / "a.ome.zarr", array, "tczyx", version, names=("DAPI", "GFP", "RFP"))
    assert json.loads((path / (".zattrs" if version == "0.4" else "zarr.json")).read_text())
    image = array[0, :, 0].transpose(1, 2, 0)
    np.testing.assert_array_equal(values(path, deep(3)), image)
    np.testing.assert_array_equal(values(path, deep(2, channels=("RFP", 0))), image[:, :, [2, 0]])
    assert "it has no channel 'CY5' of data.channels; there are 0 to 2, DAPI, GFP, RFP" in refusal(
        path, deep(channels=("CY5",))
    )
    np.testing.assert_array_equal(values(path, deep(3, array="s1")), image[::2, ::2])

    stack = rng.integers(0, 60000, (1, 1, 4, 40, 50), "u2")
    path = ome(tmp_path / "b.zarr", stack, "tczyx", version)
    assert refusal(path, deep()) == (
        "it is a stack, of shape (1, 1, 4, 40, 50) with axes tczhw: data.frames=all makes each of the 4 "
        "entries of z an image, data.axes=pages makes them channels, of which data.channels chooses"
    )
    np.testing.assert_array_equal(values(path, deep(4, axes="pages")), stack[0, 0].transpose(1, 2, 0))
    np.testing.assert_array_equal(values(path, deep(axes="tzchw", channels=(2,)))[:, :, 0], stack[0, 0, 2])
    both = ome(tmp_path / "c.zarr", rng.integers(0, 9, (1, 2, 4, 40, 50), "u2"), "tczyx", version)
    assert "an image has h, w and c, and z has 4 entries" in refusal(both, deep(2))
    odd = ome(tmp_path / "d.zarr", stack, "tczy", version)
    assert "are not those of OME-NGFF, or not of its 5" in refusal(odd, deep(2))


def test_levels_serve_small_crops_when_asked(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 60000, (1, 3, 1, 141, 250), "u2")
    path = ome(tmp_path / "a.zarr", array, "tczyx", "0.5", averaged=True)
    full, half = array[0, :, 0].transpose(1, 2, 0), zarr.open(path)["s1"][0, :, 0].transpose(1, 2, 0)
    box, small = (10, 20, 111, 121), (50, 40)
    assert opened(path, deep(3)).region(box, small).pixels.shape == (101, 101, 3)
    picture = opened(path, deep(3, overviews=True))
    np.testing.assert_array_equal(picture.region(box, (100, 100)).pixels, full[20:121, 10:111])
    region = picture.region(box, small)
    left, top = region.box[:2]
    # 141 rows are 70 of the copy.
    assert (left, top + 9) == (0, 20 * 70 / 141)
    assert region.box[2:] == (50.5, 121 * 70 / 141 - 9)
    np.testing.assert_array_equal(region.pixels, half[9:61, 5:56])
    reading = deep(3, overviews=True)
    for averaged in (True, False):
        ome(path, array, "tczyx", "0.4", averaged=averaged)
        assert overviews_are_averages(lambda _: open_file(path, reading), 1, seed=0) is averaged
    other = zarr.open_group(path, mode="a")
    del other["s1"]
    other.create_array("s1", data=array[:, :2, :, ::2, ::2])
    assert opened(path, reading).region(box, small).pixels.shape == (101, 101, 3)


def test_a_folder_needs_no_range(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 256, (21, 34), "u1")
    (channel,) = open_file(zarr_3(tmp_path, array), Reading(1)).channels()
    np.testing.assert_array_equal(np.asarray(channel), array)


def test_plates_and_groups_ask_for_a_name(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 60000, (1, 3, 1, 40, 50), "u2")
    ome(tmp_path / "plate.zarr" / "A" / "1" / "0", array, "tczyx", "0.4")
    plate = zarr.open_group(tmp_path / "plate.zarr", mode="a", zarr_format=2)
    plate.require_group("A")
    plate.attrs["plate"] = {"wells": [{"path": "A/1"}]}
    reason = refusal(tmp_path / "plate.zarr", deep(3))
    assert reason == "it is OME's plate of several images: data.array names one, such as A/1/0"
    found = values(tmp_path / "plate.zarr", deep(3, array="A/1/0"))
    np.testing.assert_array_equal(found, array[0, :, 0].transpose(1, 2, 0))
    del plate.attrs["plate"]
    assert "data.array names one of its groups ('A')" in refusal(tmp_path / "plate.zarr", deep(3))


def test_zarr_without_arrays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.zarr").mkdir()
    assert "neither an array nor a group" in refusal(tmp_path / "empty.zarr", deep())
    zarr.open_group(tmp_path / "group.zarr", mode="w")
    assert refusal(tmp_path / "group.zarr", deep()) == (
        "it is a Zarr group; it has no array of two or more axes"
    )
    broken = zarr_3(tmp_path, np.zeros((5, 6)))
    (broken / "zarr.json").write_text("{")
    assert refusal(broken, deep()).startswith("its metadata of Zarr is damaged: ")
    assert capfd.readouterr() == ("", "")


def test_damaged_chunks(tmp_path: Path, rng: np.random.Generator) -> None:
    path = zarr_3(tmp_path, rng.integers(0, 60000, (21, 34), "u2"))
    chunk = next(file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:10])
    assert refusal(path, deep()).startswith("a part of it is damaged: ")
    path = packed_hdf5(tmp_path, rng.integers(0, 60000, (210, 340), "u2"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    path.write_bytes(data)
    assert refusal(path, deep()).startswith("a part of it is damaged: ")


def test_truncated_files(tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]) -> None:
    array = rng.integers(0, 60000, (210, 340), "u2")
    for write in (npy, npz, packed_npz, hdf5, packed_hdf5):
        path = write(tmp_path, array)
        data = path.read_bytes()
        for length in (len(data) - 1000, len(data) // 2, 60):
            path.write_bytes(data[:length])
            assert refusal(path, deep())
    assert capfd.readouterr() == ("", "")


def test_hdf5_that_points_elsewhere(tmp_path: Path, rng: np.random.Generator) -> None:
    """Values of other files would be silently filled where those are missing."""
    hdf5(tmp_path, np.zeros((21, 34), "u2"))
    (tmp_path / "raw").write_bytes(bytes(2 * 21 * 34))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["link"] = h5py.ExternalLink(tmp_path / "a.h5", "group/image")
        layout = h5py.VirtualLayout((21, 34), "u2")
        layout[:] = h5py.VirtualSource(tmp_path / "a.h5", "group/image", shape=(21, 34))
        file.create_virtual_dataset("virtual", layout)
        size = 2 * 21 * 34
        file.create_dataset("outside", (21, 34), "u2", external=[(tmp_path / "raw", 0, size)])
    for name in ("link", "virtual", "outside"):
        assert refusal(tmp_path / "b.h5", deep(array=name)) == (
            f"the values of {name!r} lie in other files: name those"
        )


def test_unknown_compression_of_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset(
            "image", (8, 8), "u2", chunks=(8, 8), compression=32001, allow_unknown_filter=True
        )
        dataset.id.write_direct_chunk((0, 0), bytes(128))
    reason = refusal(tmp_path / "a.h5", deep())
    assert reason.startswith("its values are compressed by the HDF5 filter 32001")
    assert reason.endswith("pip install hdf5plugin")


def test_zip_archives_are_not_all_numpy_s(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("photo.jpg", b"words")
    assert refusal(tmp_path / "a.npz", deep()) == "it is an .npz; it has no array of two or more axes"
    with pytest.raises(UnreadableImage, match="without arrays of numpy"):
        check_header((tmp_path / "a.npz").read_bytes())


def test_claims_are_checked_before_anything_is_unpacked(tmp_path: Path) -> None:
    """A header of 2 GB of zeros, which would take two megabytes."""
    np.savez_compressed(tmp_path / "a.npz", np.zeros((10, 10, 10**6), "u1"))
    assert "it claims 100,000,000 values" in refusal(
        tmp_path / "a.npz", deep(1, channels=(0,), max_pixels=10**6)
    )


@pytest.mark.parametrize("write", [npz, packed_npz, hdf5, packed_hdf5])
def test_damaged_files_are_images_or_sentences(
    write: Writer, tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(write(tmp_path, rng.integers(0, 4000, (33, 46), "u2")))
    assert capfd.readouterr() == ("", "")


def test_python_objects_are_not_read(tmp_path: Path) -> None:
    for write in (npy, npz):
        path = write(tmp_path, np.array([[{"a": 1}]], object))
        assert refusal(path, deep()) == "its values are Python's objects, a pickle, which is not read"


@pytest.mark.parametrize("write", [npy, hdf5, zarr_2])
def test_only_the_region_is_read(write: Writer, tmp_path: Path) -> None:
    """Eight gigabytes of nothing, but for a corner."""
    if write is npy:
        array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", "u2", (40000, 50000, 2))
        array[-1, -1] = 7, 8
        del array
        path = tmp_path / "a.npy"
    elif write is hdf5:
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("image", (40000, 50000, 2), "u2", chunks=(512, 512, 2))[-1, -1] = 7, 8
    else:
        path = tmp_path / "a.zarr"
        shape = (40000, 50000, 2)
        zarr.create_array(path, shape=shape, dtype="u2", chunks=(512, 512, 2), zarr_format=2)[-1, -1] = 7, 8
    picture = opened(path, deep(2, max_pixels=2 * 10**9))
    assert picture.size == (50000, 40000)
    found = picture.region((49998, 39999, 50000, 40000), (1, 1)).pixels
    assert found.tolist() == [[[0, 0], [7, 8]]]
    assert getattr(picture, "reads_parts", False)


@pytest.mark.parametrize("write", [npy, packed_npz, hdf5, packed_hdf5, zarr_2, sharded_zarr])
def test_windows_are_crops(write: Writer, tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 60000, SHAPE, "u2")
    write(tmp_path, array)
    config = FolderConfig(root=str(tmp_path), range=(0, 65535), labels="none", tile=(10, 16), holdout=0)
    source = open_split(config, "train", in_chans=5, image_size=(8, 8), seed=0)
    assert len(source) == 3 * 3
    for number in range(len(source)):
        row, column = (int(part) for part in source.name(number).split("#")[1].split(","))
        found = source.open(number).region((0, 0, 16, 10), (16, 10)).pixels
        np.testing.assert_array_equal(found, array[row : row + 10, column : column + 16])


def test_a_folder_of_zarr_is_one_image(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 60000, (21, 34), "u2")
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        zarr_3(tmp_path / label, array)
        (tmp_path / label / "b.nii.gz").write_bytes(b"")
        (tmp_path / label / "c.json.gz").write_bytes(b"")
    (tmp_path / ".hidden.zarr").mkdir()
    source = FolderConfig(root=str(tmp_path)).open("train", in_chans=1, image_size=(16, 16), seed=0)
    assert source.files == ["cats/a.zarr", "cats/b.nii.gz", "dogs/a.zarr", "dogs/b.nii.gz"]
    assert source.classes == ["cats", "dogs"]
    assert "2 .nii.gz, 2 .zarr; 2 classes" in source.describe()
    assert "left out: 2 .gz, 1 hidden .zarr" in source.describe()


def test_zarr_is_read_in_forked_workers(tmp_path: Path, rng: np.random.Generator) -> None:
    """Zarr has threads of its own, which a fork does not copy."""
    array = rng.integers(0, 60000, (21, 34), "u2")
    path = zarr_3(tmp_path, array)
    values(path, deep())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap_async(values, [(path, deep())] * 4).get(timeout=120)
    for one in found:
        np.testing.assert_array_equal(one[:, :, 0], array)


@pytest.mark.parametrize(("write", "library", "extra", "what"), [
    (hdf5, "h5py", "hdf5", "HDF5"), (zarr_3, "zarr", "zarr", "Zarr"),
])  # fmt: skip
def test_missing_libraries_are_named(
    write: Writer, library: str, extra: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, np.zeros((5, 6)))
    monkeypatch.setitem(sys.modules, library, None)
    assert refusal(path, deep()) == (
        f"reading {what} needs {library}, which is not installed: pip install 'etpp-ssl[{extra}]'"
    )


def test_the_name_reaches_the_format(tmp_path: Path) -> None:
    config = FolderConfig(root=str(tmp_path), array="image")
    assert config.reading(3) == Reading(3, array="image", fill=config.statistics(3)[0])
    with pytest.raises((ValueError, UserError)):
        FolderConfig(root=str(tmp_path), array="")
