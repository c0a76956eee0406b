"""The same values train the same run, whatever the format of their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import zarr
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain

LOW, HIGH, NONE = -2048, 2047, -2000


def dicom(path: Path, frames: np.ndarray) -> None:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.SecondaryCaptureImageStorage, uid.generate_uid()
    # Its values are twice those stored, less a thousand.
    dataset.set_pixel_data(((frames.astype("i4") + 1000) // 2).astype("i2"), "MONOCHROME2", 16)
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
    dataset.PixelPaddingValue = (NONE + 1000) // 2
    dataset.compress(uid.RLELossless)
    dataset.save_as(path, enforce_file_format=True)


def nifti(path: Path, frames: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(frames.transpose(2, 1, 0), np.eye(4), dtype="i2"), path)


def hdf5(path: Path, frames: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["image"] = frames
        file["image"].attrs["_FillValue"] = NONE


def zarr_3(path: Path, frames: np.ndarray) -> None:
    zarr.create_array(path, data=frames, chunks=(1, 16, 16)).attrs["_FillValue"] = NONE


WRITERS: dict[str, tuple[Callable[[Path, np.ndarray], object], str]] = {
    ".npz": (lambda path, frames: np.savez(path, frames), "data.axes=chw data.nodata=-2000"),
    ".dcm": (dicom, "data.axes=pages"),
    ".nii": (nifti, "data.axes=whc data.nodata=-2000"),
    ".nii.gz": (nifti, "data.axes=pages data.nodata=-2000"),
    ".h5": (hdf5, "data.axes=chw"),
    ".zarr": (zarr_3, "data.axes=chw"),
}


@pytest.mark.parametrize("extension", WRITERS)
def test_a_run_does_not_depend_on_the_format(
    extension: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    write, settings = WRITERS[extension]
    draw = np.random.default_rng(0)
    for folder in ("arrays", "files"):
        (tmp_path / folder).mkdir()
    for number in range(16):
        frames = draw.integers(LOW // 2, HIGH // 2, (5, 21, 30), dtype=np.int16) * 2
        frames[:, :3, : number % 7] = NONE
        np.save(tmp_path / "arrays" / f"{number:02}.npy", frames)
        write(tmp_path / "files" / f"{number:02}{extension}", frames)

    def losses(folder: str, *overrides: str) -> list[float]:
        common = [f"data.root={tmp_path / folder}", f"data.range=[{LOW},{HIGH}]", "in_chans=5", "probe=none"]
        rest = [
            "data.num_images=null",
            "data.labels=none",
            "budget_epochs=2",
            f"output={tmp_path / 'of' / folder}",
        ]
        pretrain(tiny_recipe("data=folder", *common, *rest, *overrides))
        return [row["loss"] for row in RunFolder(tmp_path / "of" / folder).metrics() if "loss" in row]

    expected = losses("arrays", "data.axes=chw", "data.nodata=-2000")
    assert len(expected) > 2
    assert losses("files", "data.num_workers=2", *settings.split()) == expected
