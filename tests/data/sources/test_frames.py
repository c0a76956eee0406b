"""Frames, slices and pages as images of their own: what each shows, their order, and how data is divided."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from etpp_ssl.config import UserError
from etpp_ssl.data.formats import open_picture
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.formats.pictures import FramedPicture
from etpp_ssl.data.given import viewed
from etpp_ssl.data.loader import BatchBuilder, load_batches
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.sources.splits import open_split, read_anew
from etpp_ssl.data.views import EvalView, TrainView

T, Z, C, H, W = 2, 3, 2, 21, 34
SIZE = (8, 12)


def drawn(*shape: int, dtype: str = "uint16") -> np.ndarray:
    most = 255 if dtype == "uint8" else 4095
    return np.random.default_rng(sum(shape)).integers(0, most, shape).astype(dtype)


def opened(folder: Path, in_chans: int = 1, split: str = "train", **keys: Any) -> Any:
    config = FolderConfig(root=str(folder), **{"range": (0, 4095), "frames": "all", **keys})
    return open_split(config, split, in_chans=in_chans, image_size=SIZE, seed=0)


def shown(source: ImageSource) -> list[np.ndarray]:
    """The values of every image of a source, (H, W, C)."""
    pictures = [source.open(index) for index in range(len(source))]
    return [picture.region((0, 0, *picture.size), picture.size).pixels for picture in pictures]


def assert_shows(source: ImageSource, frames: np.ndarray) -> None:
    found = shown(source)
    assert len(found) == len(frames)
    for one, other in zip(found, frames, strict=True):
        np.testing.assert_array_equal(one, other)


# Formats.


def write_npy(path: Path, values: np.ndarray) -> None:
    np.save(path, values)


def write_npz(path: Path, values: np.ndarray) -> None:
    np.savez(path, image=values)


def write_h5(path: Path, values: np.ndarray) -> None:
    with pytest.importorskip("h5py").File(path, "w") as file:
        file["image"] = values


def write_zarr(path: Path, values: np.ndarray) -> None:
    pytest.importorskip("zarr").create_array(path, data=values)


@pytest.mark.parametrize("write", [write_npy, write_npz, write_h5, write_zarr])
def test_axes_that_are_named_count_images(write: Any, tmp_path: Path) -> None:
    extension = f".{write.__name__.removeprefix('write_')}"
    values = drawn(Z, H, W)
    write(tmp_path / f"a{extension}", values)
    source = opened(tmp_path, axes="zhw")
    assert_shows(source, values[..., None])
    assert [source.name(index) for index in range(Z)] == [f"a{extension}#{frame}" for frame in range(Z)]
    assert source.describe().startswith(f"{Z} frames of 1 image in ")
    assert_shows(opened(tmp_path, axes="hzw"), values.transpose(1, 0, 2)[..., None])


def test_several_axes_count_with_the_last_one_fastest(tmp_path: Path) -> None:
    values = drawn(T, C, Z, H, W)
    np.save(tmp_path / "a.npy", values)
    expected = values.transpose(0, 2, 3, 4, 1).reshape(T * Z, H, W, C)
    assert_shows(opened(tmp_path, C, axes="tczhw"), expected)
    assert_shows(opened(tmp_path, 1, axes="tczhw", channels=[1]), expected[..., 1:])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_ngff_with_channels_and_slices(version: str, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    values = drawn(T, C, Z, H, W)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2 if version == "0.4" else 3)
    group.create_array("0", data=values)
    scales = [{"axes": [{"name": axis} for axis in "tczyx"], "datasets": [{"path": "0"}]}]
    group.attrs.update({"multiscales": scales} if version == "0.4" else {"ome": {"multiscales": scales}})
    assert_shows(opened(tmp_path, C), values.transpose(0, 2, 3, 4, 1).reshape(T * Z, H, W, C))
    with pytest.raises(UnreadableImage, match=r"t has 2 entries, each of which data\.frames=all makes"):
        opened(tmp_path, C, frames="one").open(0)


PAGES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("plain", (Z, H, W), {"metadata": None}),
    ("shaped", (Z, H, W), {}),
    ("colours", (Z, H, W, 3), {"photometric": "rgb"}),
    ("planar", (Z, 3, H, W), {"photometric": "rgb", "planarconfig": "separate"}),
    ("ome", (Z, C, H, W), {"ome": True, "metadata": {"axes": "ZCYX", "Channel": {"Name": ["a", "b"]}}}),
    ("ome, channels first", (C, Z, H, W), {"ome": True, "metadata": {"axes": "CZYX"}}),
    ("ome, three axes", (T, C, Z, H, W), {"ome": True, "metadata": {"axes": "TCZYX"}}),
    ("imagej", (T, Z, C, H, W), {"imagej": True, "metadata": {"axes": "TZCYX"}}),
    ("tiles", (Z, H, W), {"tile": (16, 16), "compression": "deflate", "metadata": {"axes": "ZYX"}}),
]


@pytest.mark.parametrize(("shape", "options"), [case[1:] for case in PAGES], ids=[case[0] for case in PAGES])
def test_pages_of_a_tiff(shape: tuple[int, ...], options: dict[str, Any], tmp_path: Path) -> None:
    values = drawn(*shape)
    given = {"photometric": "minisblack", **options}
    pytest.importorskip("tifffile").imwrite(tmp_path / "a.tif", values, **given)
    axes = options.get("metadata") or {}
    axes = axes.get("axes") or {(Z, H, W, 3): "ZYXC", (Z, 3, H, W): "ZCYX"}.get(shape, "ZYX")
    if "C" in axes:
        values = np.moveaxis(values, axes.index("C"), -1)
    expected = values.reshape(-1, H, W, values.shape[-1] if "C" in axes else 1)
    assert_shows(opened(tmp_path, expected.shape[-1]), expected)
    assert_shows(opened(tmp_path, 1, channels=[0]), expected[..., :1])
    if options.get("metadata", {}) and "Channel" in options["metadata"]:
        assert_shows(opened(tmp_path, 1, channels=["b"]), expected[..., 1:])
    # From the bytes, as in a shard.
    picture = open_picture((tmp_path / "a.tif").read_bytes(), Reading(0, range="raw", frames=True))
    assert isinstance(picture, FramedPicture)
    last = picture.frame(picture.num_frames - 1).region((3, 2, 9, 11), (1, 1)).pixels
    np.testing.assert_array_equal(last, expected[-1, 2:11, 3:9])


def test_positions_of_an_ome_tiff_follow_each_other(tmp_path: Path) -> None:
    values = drawn(2, Z, C, H, W)
    with pytest.importorskip("tifffile").TiffWriter(tmp_path / "a.tif", ome=True) as file:
        for position in values:
            channels = {"axes": "ZCYX", "Channel": {"Name": ["a", "b"]}}
            file.write(position, photometric="minisblack", metadata=channels)
    expected = values.reshape(2 * Z, C, H, W).transpose(0, 2, 3, 1)
    assert_shows(opened(tmp_path, C), expected)
    assert_shows(opened(tmp_path, 1, channels=["b"]), expected[..., 1:])
    with pytest.raises(UnreadableImage, match=r"data\.axes is for arrays: leave it out"):
        opened(tmp_path, C, axes="zchw").open(0)
    with pytest.raises(UnreadableImage, match="tells of 6 planes, and it has 12 pages"):
        opened(tmp_path, C, frames="one").open(0)


def test_a_document_of_8_bits_without_a_range(tmp_path: Path) -> None:
    values = drawn(Z, H, W, dtype="uint8")
    pages = [Image.fromarray(page) for page in values]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    source = opened(tmp_path, 1, range=None)
    assert_shows(source, values[..., None])
    assert len(opened(tmp_path, 1, range=None, frames="one")) == 1
    assert [picture.deep for picture in map(source.open, range(Z))] == [False] * Z


def test_pages_that_differ_are_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for nodata in ("0", "7"):
            file.write(drawn(H, W), metadata=None, extratags=[(42113, 2, 0, nodata, True)])
    with pytest.raises(UnreadableImage, match="pages differ in orientation, or in the value"):
        opened(tmp_path).open(0)


def test_slices_of_a_volume_along_each_axis(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    values = drawn(W, H, Z, T, dtype="int16")
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "a.nii")
    axial = values.transpose(2, 3, 1, 0).reshape(Z * T, H, W, 1)
    source = opened(tmp_path)
    assert_shows(source, axial)
    assert len(source._held.pictures) == 1
    assert "read whole" not in source.describe()
    coronal = values.transpose(1, 3, 2, 0).reshape(H * T, Z, W, 1)
    assert_shows(opened(tmp_path, axes="wzht"), coronal)
    (tmp_path / "a.nii").rename(tmp_path / "b.nii")
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii").unlink()
    source = opened(tmp_path)
    assert_shows(source, axial)
    assert "'a.nii.gz' and files like it are read whole for each of their frames" in source.describe()


@pytest.mark.parametrize("extension", [".gif", ".png", ".webp", ".avif"])
@pytest.mark.parametrize("deep", [False, True])
def test_animations(extension: str, deep: bool, tmp_path: Path) -> None:
    # Of one gray each, which no compression changes.
    frames = [Image.new("RGB", (W, H), (level,) * 3) for level in (20, 90, 160)]
    frames[0].save(tmp_path / f"a{extension}", save_all=True, append_images=frames[1:], duration=40)
    source = opened(tmp_path, 3, range=(0, 255) if deep else None)
    found = shown(source)
    assert [image.shape for image in found] == [(H, W, 3)] * 3
    np.testing.assert_allclose([image.mean() for image in found], [20, 90, 160], atol=1)
    assert len(opened(tmp_path, 3, range=None, frames="one")) == 1


def test_an_animation_of_16_bits_is_refused() -> None:
    frames = [Image.new("L", (W, H), level) for level in (20, 90)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    data[24] = 16
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(UnreadableImage, match="an animation of 16 bits"):
        open_picture(bytes(data), Reading(1, range=((0, 1),), frames=True))


# As data.


def volumes(folder: Path, depths: tuple[int, ...] = (3, 5, 1, 4, 2, 6)) -> dict[str, np.ndarray]:
    found = {f"{'sea' if n % 2 else 'land'}/{n}.npy": drawn(depth, H, W) for n, depth in enumerate(depths)}
    for name, values in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, values)
    return found


def test_windows_of_frames(tmp_path: Path) -> None:
    values = drawn(Z, H, W)
    np.save(tmp_path / "a.npy", values)
    source = opened(tmp_path, axes="zhw", tile=16)
    places = [(frame, row, column) for frame in range(Z) for row in (0, 5) for column in (0, 16, 18)]
    assert [source.name(index) for index in range(len(source))] == [
        f"a.npy#{frame},{row},{column}" for frame, row, column in places
    ]
    assert_shows(source, np.stack([values[z, r : r + 16, c : c + 16, None] for z, r, c in places]))
    assert source.describe().startswith("18 windows of 16 pixels, of 3 frames of 1 image in ")


def test_slices_of_a_volume_are_held_out_and_labelled_together(tmp_path: Path) -> None:
    volumes(tmp_path)
    training, evaluation = (opened(tmp_path, split=part, axes="zhw", holdout=2) for part in ("train", "eval"))
    files = [{source.name(n).split("#")[0] for n in range(len(source))} for source in (training, evaluation)]
    assert [len(names) for names in files] == [4, 2]
    assert not files[0] & files[1]
    assert len(training) + len(evaluation) == 21
    assert training.all_labels().tolist() == [
        int(training.name(n).startswith("sea")) for n in range(len(training))
    ]
    few = opened(tmp_path, axes="zhw", labels_per_class=1)
    assert len({few.name(index).split("#")[0] for index in range(len(few))}) == 2


def test_the_fingerprint_knows_the_frames(tmp_path: Path) -> None:
    found = []
    for depths in ((2, 3), (3, 2)):
        volumes(tmp_path, depths)
        found.append(opened(tmp_path, axes="zhw").fingerprint())
    assert found[0] != found[1]


class Plan:
    bandwidth, progress = SIZE, 0.0

    def __init__(self, step: int) -> None:
        self.samples = range(5 * step, 5 * step + 5)


def batches(source: ImageSource, first_step: int = 0, num_workers: int = 0) -> list[Any]:
    order = KeyedOrder(len(source), 3)
    sampler = RequestSampler(order=order, step_plan=Plan, steps=range(first_step, 5))
    view = TrainView(
        image_size=SIZE, crop_scale=(0.2, 1.0), flip=True, lanczos=False, seed=3, decode="reduced", deep=True
    )
    builder = BatchBuilder(source, view, order)
    return list(load_batches(builder, sampler, num_workers=num_workers, prefetch=2, pin_memory=False))


def test_order_workers_and_resume(tmp_path: Path) -> None:
    volumes(tmp_path)
    (tmp_path / "sea" / "1.npy").write_bytes(b"\x93NUMPY broken")
    found = batches(opened(tmp_path, axes="zhw"))
    assert {bad.name for batch in found for bad in batch.bad} == {"sea/1.npy#0"}
    for others in (
        batches(opened(tmp_path, axes="zhw"), num_workers=2),
        batches(opened(tmp_path, axes="zhw"), 2),
    ):
        for one, other in zip(found[-len(others) :], others, strict=True):
            assert one.images.equal(other.images)
            assert one.bad == other.bad


def test_raw_values_of_frames(tmp_path: Path) -> None:
    values = volumes(tmp_path, (3,))["land/0.npy"]
    source = opened(tmp_path, axes="zhw")
    raw = read_anew(source, Reading(1, range="raw", axes="zhw", frames=True))
    picture = raw.open(2)
    np.testing.assert_array_equal(picture.region((0, 0, W, H), (W, H)).pixels[:, :, 0], values[2])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"frames": "some"}, "frames"),
        ({"axes": "pages", "range": (0, 1)}, "axes=pages makes pages channels, and frames=all images"),
        ({"reader": "rasterio", "range": (0, 1)}, "frames=all needs reader=auto"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        FolderConfig(root=".", **{"frames": "all", **keys})


def test_a_volume_smaller_than_a_window_is_named(tmp_path: Path) -> None:
    volumes(tmp_path)
    with pytest.raises(UserError, match=r"data.tile is 64, but 'land/0.npy' has 21 x 34 pixels"):
        opened(tmp_path, axes="zhw", tile=64)


def test_a_model_is_given_one_frame_at_a_time() -> None:
    reading = Reading(2, range=((0.0, 255.0),), axes="tzchw", frames=True, fill=(0.5, 0.5))
    assert (reading.of_one.axes, reading.of_one.frames) == ("chw", False)
    assert Reading.of_settings(reading.settings(), (0.5, 0.5)).axes == "chw"
    assert replace(reading, frames=False).of_one.axes == "tzchw"
    view = EvalView((H, W), 1.0)
    values = drawn(2, H, W, dtype="float32")
    np.testing.assert_array_equal(viewed(values, 0, view, reading)[:, :H], values)
    with pytest.raises(UserError, match=r"its shape is \(3, 2, 21, 34\), but data.axes is chw"):
        viewed(drawn(3, 2, H, W), 0, view, reading)
