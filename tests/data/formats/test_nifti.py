"""NIfTI: canonical orientation and scaling as nibabel has them, slices as channels, refusals as sentences."""

from __future__ import annotations

import gzip
import sys
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
from stored import as_floats, damage, deep, opened, refusal, values

from etpp_ssl.data.formats import check_header
from etpp_ssl.data.formats.base import Reading, UnreadableImage

SHAPE = (7, 9, 5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None, *, version: int = 1) -> Path:
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    nibabel.save(kind(array, np.eye(4) if affine is None else affine, dtype=array.dtype), path)
    return path


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "f4", "f8", ">u2", ">i2", ">f4"])
def test_values_are_exact(
    dtype: str,
    name: str,
    version: int,
    tmp_path: Path,
    rng: np.random.Generator,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """x is the width, y the height."""
    volume = (rng.normal(size=SHAPE) * 100).astype("i1").astype(dtype)
    header = (nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header)(
        endianness=">" if dtype[0] == ">" else "<"
    )
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    path = tmp_path / name
    nibabel.save(kind(volume, np.eye(4), header, dtype=volume.dtype.newbyteorder("=")), path)
    assert (nibabel.load(path).header.endianness == ">") == (dtype[0] == ">")
    found = values(path, deep(5, axes="whc"))
    assert found.dtype == volume.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, volume.transpose(1, 0, 2))
    check_header(path.read_bytes())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_orientation_is_the_closest_canonical_one(
    order: tuple[int, ...], tmp_path: Path, rng: np.random.Generator
) -> None:
    """Of all 48, and one that is oblique, as nibabel finds it."""
    volume = rng.integers(0, 1000, SHAPE, "i2")
    tilt = np.eye(4) + 0.1 * rng.normal(size=(4, 4)) * (np.arange(4) < 3)[:, None]
    for signs, oblique in product(product((1, -1), repeat=3), (False, True)):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, list(order)] * signs
        path = write(tmp_path / "scan.nii", volume, tilt @ affine if oblique else affine)
        canonical = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        found = values(path, deep(canonical.shape[2], axes="whc"))
        np.testing.assert_array_equal(found, canonical.transpose(1, 0, 2))


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_scaling_gives_the_values_that_are_meant(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    volume = rng.integers(-1000, 1000, SHAPE, "i2")
    image = nibabel.Nifti1Image(volume, np.eye(4), dtype="i2")
    image.header.set_slope_inter(0.25, -1000)
    nibabel.save(image, tmp_path / name)
    stored = nibabel.load(tmp_path / name)
    assert stored.dataobj.slope == 0.25
    found = values(tmp_path / name, deep(5, axes="whc"))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, stored.get_fdata().transpose(1, 0, 2))


def test_slices_along_each_axis(tmp_path: Path, rng: np.random.Generator) -> None:
    volume = rng.integers(0, 1000, SHAPE, "i2")
    path = write(tmp_path / "scan.nii.gz", volume)
    for axes, order in (("whc", (1, 0, 2)), ("wch", (2, 0, 1)), ("cwh", (2, 1, 0)), ("hwc", (0, 1, 2))):
        expected = volume.transpose(order)
        np.testing.assert_array_equal(values(path, deep(expected.shape[2], axes=axes)), expected)
        one = values(path, deep(axes=axes, channels=(3,)))
        np.testing.assert_array_equal(one, expected[:, :, 3:4])
    pages = values(path, deep(2, axes="pages", channels=(4, 0)))
    np.testing.assert_array_equal(pages, volume.transpose(1, 0, 2)[:, :, [4, 0]])


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 1), (7, 1, 9), (1, 7, 9), (7, 9, 1, 1)])
def test_two_axes_are_an_image(shape: tuple[int, ...], tmp_path: Path, rng: np.random.Generator) -> None:
    image = rng.integers(0, 1000, (7, 9), "i2")
    path = write(tmp_path / "slice.nii", image.reshape(shape))
    np.testing.assert_array_equal(values(path, deep())[:, :, 0], image.T)


def test_a_stack_is_refused_with_the_remedy(tmp_path: Path, rng: np.random.Generator) -> None:
    path = write(tmp_path / "scan.nii", rng.integers(0, 1000, SHAPE, "i2"))
    assert refusal(path, deep()) == (
        "it is a stack, of shape (7, 9, 5) with axes whz: data.frames=all makes each of the 5 entries of "
        "z an image, data.axes=pages makes them channels, of which data.channels chooses"
    )
    assert "it has 5 channels, but in_chans is 1" in refusal(path, deep(axes="whc"))
    assert "it has no channel 5 of data.channels" in refusal(path, deep(axes="whc", channels=(5,)))
    path = write(tmp_path / "film.nii", rng.integers(0, 1000, (*SHAPE, 3), "i2"))
    assert "axes whzt: an image has h, w and c, and z has 5 entries" in refusal(path, deep(5, axes="pages"))


def test_colours(tmp_path: Path, rng: np.random.Generator) -> None:
    colours = rng.integers(0, 256, (7, 9, 1, 3), "u1")
    stored = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    path = tmp_path / "colours.nii"
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([-1, 1, 1, 1])), path)
    np.testing.assert_array_equal(values(path, deep(3)), colours[::-1, :, 0].transpose(1, 0, 2))


def test_nan_is_no_data(tmp_path: Path, rng: np.random.Generator) -> None:
    image = rng.normal(size=(7, 9)).astype("f4")
    image[2, 3] = np.nan
    path = write(tmp_path / "slice.nii", image)
    np.testing.assert_array_equal(as_floats(path, deep())[:, :, 0], image.T)
    assert refusal(write(path, np.full((7, 9), np.nan, "f4")), deep()) == "it has no pixel with data"


def test_only_the_region_is_read(tmp_path: Path) -> None:
    """A file of four gigabytes with a hole in it opens and gives its ends."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype("i2")
    header.set_data_shape((20000, 20000, 5))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "large.nii"
    with open(path, "wb") as file:
        file.write(header.binaryblock + bytes(4))
        file.truncate(352 + 2 * 20000 * 20000 * 5)
        file.seek(-2, 2)
        file.write(b"\x39\x05")
    picture = opened(path, deep(axes="whc", channels=(4,), max_pixels=10**9))
    # Without an orientation, x runs from right to left.
    assert picture.region((0, 19999, 2, 20000), (1, 1)).pixels.ravel().tolist() == [1337, 0]


def test_broken_files(tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "scan.nii", rng.integers(0, 1000, SHAPE, "i2")).read_bytes()
    packed = gzip.compress(data)
    for name, content in (("scan.nii", data), ("scan.nii.gz", packed)):
        for length in (len(content) - 3, len(content) // 2, 30):
            (tmp_path / name).write_bytes(content[:length])
            assert refusal(tmp_path / name, deep(5, axes="whc"))
    spoilt = packed[:-6] + b"\0" + packed[-5:]
    (tmp_path / "scan.nii.gz").write_bytes(spoilt)
    assert "damaged" in refusal(tmp_path / "scan.nii.gz", deep(5, axes="whc"))
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(b"words"))
    assert refusal(tmp_path / "scan.nii.gz", deep()) == "it is compressed, but not a NIfTI file"
    pair = nibabel.Nifti1Pair(np.zeros(SHAPE, "i2"), np.eye(4), dtype="i2").header.binaryblock
    (tmp_path / "scan.nii").write_bytes(pair)
    assert "a NIfTI header without its values" in refusal(tmp_path / "scan.nii", deep())
    write(tmp_path / "complex.nii", np.zeros((7, 9), "c8"))
    assert "its values are complex64" in refusal(tmp_path / "complex.nii", deep())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_damaged_files_are_images_or_sentences(
    name: str, tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(write(tmp_path / name, rng.integers(0, 4000, (33, 46), "i2")))
    assert capfd.readouterr() == ("", "")


def test_claims_are_checked_before_anything_is_unpacked(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 3000))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(2 << 20)))
    assert "it claims 2,700,000,000,000 values" in refusal(path, deep(axes="whc", channels=(0,)))
    with pytest.raises(UnreadableImage, match=r"data\.max_pixels"):
        check_header(path.read_bytes())


def test_eight_bits_are_read_without_a_range(tmp_path: Path, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (7, 9), "u1")
    path = write(tmp_path / "slice.nii", image)
    np.testing.assert_array_equal(values(path, Reading(1))[:, :, 0], image.T)
    assert "data.range reads them" in refusal(write(path, image.astype("i2")), Reading(1))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "slice.nii", np.zeros((7, 9), "u1"))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert refusal(path, deep()) == (
        "reading NIfTI needs nibabel, which is not installed: pip install 'etpp-ssl[nifti]'"
    )
