"""Windows of large files: what they show, their order, and how the data is divided."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import Decoder, Picture, Place, Region, UnreadableImage, place_of
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.loader import Batch, BatchBuilder, load_batches
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import DataConfig, ImageSource
from etpp_ssl.data.sources.folder import FileListConfig, FileSource, FolderConfig
from etpp_ssl.data.sources.splits import Subset, open_split, read_anew
from etpp_ssl.data.sources.windows import MAX_OPEN, PartSource
from etpp_ssl.data.views import EvalView, TrainView

SIZE = (16, 24)
SHAPES = ((40, 50), (32, 32), (33, 61), (70, 32))


class Arrays:
    """Arrays (H, W, C) as a source of large images."""

    classes = None

    def __init__(self, arrays: list[np.ndarray], **attributes: Any) -> None:
        self.arrays = arrays
        self.attributes = attributes
        self.opened: list[int] = []

    def __len__(self) -> int:
        return len(self.arrays)

    def open(self, index: int) -> Picture:
        self.opened.append(index)
        picture = ArrayPicture(self.arrays[index])
        for key, value in self.attributes.items():
            setattr(picture, key, value)
        return picture

    def label(self, index: int) -> int:
        return -1

    def all_labels(self) -> list[int]:
        return [-1] * len(self)

    def name(self, index: int) -> str:
        return f"scene{index}"

    def fingerprint(self) -> str:
        return "arrays"

    def describe(self) -> str:
        return f"{len(self)} images in memory"


def shapes(*sizes: tuple[int, int], **attributes: Any) -> Arrays:
    rng = np.random.default_rng(0)
    return Arrays([rng.integers(0, 4000, (*size, 2), dtype=np.uint16) for size in sizes], **attributes)


def pixels(picture: Picture) -> np.ndarray:
    return picture.region((0, 0, *picture.size), picture.size).pixels


def plain_places(size: tuple[int, int], tile: tuple[int, int], stride: tuple[int, int]) -> list[Any]:
    """What `PartSource` lists, by walking."""

    def along(axis: int) -> list[int]:
        found, last = [], size[axis] - tile[axis]
        place = 0
        while place < last:
            found.append(place)
            place += stride[axis]
        return [*found, last]

    return [(row, column) for row in along(0) for column in along(1)]


def test_windows_cover_every_pixel_and_have_full_size() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        tile = tuple(rng.integers(1, 20, 2).tolist())
        stride = tuple(int(rng.integers(1, side + 1)) for side in tile)
        large = shapes(*((tile[0] + int(a), tile[1] + int(b)) for a, b in rng.integers(0, 30, (3, 2))))
        source = PartSource(large, tile, stride)
        expected = [
            (file, *place)
            for file, array in enumerate(large.arrays)
            for place in plain_places(array.shape[:2], tile, stride)
        ]
        assert [source.part(index)[:3] for index in range(len(source))] == expected
        assert len(set(expected)) == len(expected)
        seen = [np.zeros(array.shape[:2], bool) for array in large.arrays]
        for index, (file, row, column) in enumerate(expected):
            part = (slice(row, row + tile[0]), slice(column, column + tile[1]))
            seen[file][part] = True
            np.testing.assert_array_equal(pixels(source.open(index)), large.arrays[file][part])
            assert source.open(index).size == tile[::-1]
        assert all(cover.all() for cover in seen)


def test_a_stride_beyond_the_tile_leaves_gaps() -> None:
    source = PartSource(shapes((10, 30)), (10, 4), (10, 13))
    assert [source.part(index).column for index in range(len(source))] == [0, 13, 26]


def test_no_pixel_is_read_for_the_number_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArrayPicture, "region", None)
    source = PartSource(shapes(*SHAPES), (16, 16), (16, 16))
    assert len(source) == 12 + 4 + 12 + 10
    assert [source.num_parts(file) for file in range(4)] == [12, 4, 12, 10]


def test_a_region_of_a_window_is_the_files_at_its_place() -> None:
    large = shapes((40, 50))
    asked: list[Any] = []

    class Spy(ArrayPicture):
        def region(self, box: Any, at_least: Any, decoder: Decoder = "pillow") -> Region:
            asked.append((box, at_least, decoder))
            return super().region(box, at_least, decoder)

    large.open = lambda index: Spy(large.arrays[index])  # type: ignore[method-assign]
    source = PartSource(large, (16, 20), (16, 20))
    window = source.part(5)
    assert (window.row, window.column) == (16, 30)
    part = source.open(5).region((3, 4, 13, 9), (2, 1), "simplejpeg")
    np.testing.assert_array_equal(part.pixels, large.arrays[0][20:25, 33:43])
    assert part.box == (0, 0, 10, 5)
    assert asked == [((33, 20, 43, 25), (2, 1), "simplejpeg")]


def test_names_say_where_a_window_is() -> None:
    source = PartSource(shapes((40, 50), (32, 32)), (32, 32), (32, 32))
    assert [source.name(index) for index in range(len(source))] == [
        "scene0#0,0", "scene0#0,18", "scene0#8,0", "scene0#8,18", "scene1#0,0",
    ]  # fmt: skip
    assert source.describe() == "5 windows of 32 pixels, of 2 images in memory"
    source = PartSource(shapes((40, 50)), (40, 32), (40, 9))
    assert source.describe() == "3 windows of 40x32 pixels, 40x9 apart, of 1 images in memory"
    with pytest.raises(IndexError):
        source.part(3)


def test_a_file_smaller_than_a_window_is_named() -> None:
    with pytest.raises(UserError) as error:
        PartSource(shapes((40, 50), (31, 80), (90, 31)), (32, 32), (32, 32))
    said = "data.tile is 32, but 'scene1' has 31 x 80 pixels (height x width), and 1 more are smaller"
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"tile": 32}, "tile needs range"),
        ({"stride": 32, "range": "dtype"}, "stride needs tile"),
        ({"tile": 0, "range": "dtype"}, "not a size in pixels"),
        ({"tile": (32, 32), "stride": (8, 0), "range": "dtype"}, "not a size in pixels"),
        (
            {"tile": (32, 33), "max_pixels": 1055, "range": "dtype"},
            "1,056 pixels, more than max_pixels 1,055",
        ),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        FolderConfig(root=".", **keys)


# Files.


def write_scenes(root: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(2), {}
    for name, size in sizes.items():
        arrays[name] = rng.integers(0, 4000, (*size, 3), dtype=np.uint16)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, arrays[name])
    return arrays


def scenes(root: Path, num_files: int = 8, **keys: Any) -> FolderConfig:
    write_scenes(
        root, {f"{'sea' if n % 2 else 'land'}/{n}.npy": SHAPES[n % len(SHAPES)] for n in range(num_files)}
    )
    return FolderConfig(root=str(root), **{"range": (0, 4000), "tile": 32, "stride": 16, **keys})


def split_of(config: DataConfig, split: str = "train", seed: int = 0) -> Any:
    return open_split(config, split, in_chans=3, image_size=SIZE, seed=seed)


def files_of(source: ImageSource) -> set[str]:
    return {source.name(index).split("#")[0] for index in range(len(source))}


def test_windows_of_files_have_the_labels_and_the_values_of_their_files(tmp_path: Path) -> None:
    source = split_of(scenes(tmp_path))
    assert source.classes == ["land", "sea"]
    labels = [source.label(index) for index in range(len(source))]
    assert source.all_labels().tolist() == labels
    assert [source.classes[label] for label in labels] == [
        source.name(index).split("/")[0] for index in range(len(source))
    ]
    for index in range(len(source)):
        name, place = source.name(index).split("#")
        row, column = map(int, place.split(","))
        expected = np.load(tmp_path / name)[row : row + 32, column : column + 32]
        np.testing.assert_array_equal(pixels(source.open(index)), expected)


def test_a_list_of_files_has_windows_too(tmp_path: Path) -> None:
    write_scenes(tmp_path, {"a.npy": (32, 70), "b.npy": (40, 32)})
    (tmp_path / "list.txt").write_text("b.npy\tb\na.npy\ta\n")
    config = FileListConfig(file=str(tmp_path / "list.txt"), range=(0, 4000), tile=32)
    source = split_of(config)
    assert [source.name(index) for index in range(len(source))] == [
        "b.npy#0,0", "b.npy#8,0", "a.npy#0,0", "a.npy#0,32", "a.npy#0,38",
    ]  # fmt: skip
    assert source.all_labels().tolist() == [1, 1, 0, 0, 0]


def write_as(extension: str, path: Path, values: np.ndarray) -> None:
    if extension == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file.create_dataset("image", data=values, chunks=(16, 16, 3), compression="gzip")
    elif extension == ".zarr":
        zarr = pytest.importorskip("zarr")
        zarr.create_array(path, data=values, chunks=(16, 16, 3))
    else:
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(path, values, tile=(16, 16), compression="deflate", photometric="rgb")


@pytest.mark.parametrize("extension", [".h5", ".zarr", ".tif"])
def test_files_of_all_formats_that_are_read_in_parts(extension: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4000, (50 + n, 70, 3), dtype=np.uint16) for n in range(3)]
    for number, values in enumerate(arrays):
        write_as(extension, tmp_path / f"{number}{extension}", values)
    # Less than a file has, and all of a window.
    source = split_of(FolderConfig(root=str(tmp_path), range=(0, 4000), tile=32, stride=20, max_pixels=1024))
    assert len(source) == 3 * 6
    for index in range(len(source)):
        file, row, column, _ = source.part(index)
        expected = arrays[file][row : row + 32, column : column + 32]
        np.testing.assert_array_equal(pixels(source.open(index)), expected)
    assert len(source._held.pictures) == 3
    assert_same(train_batches(source, num_workers=2), train_batches(source))


def test_raw_values_of_windows(tmp_path: Path) -> None:
    arrays = write_scenes(tmp_path, {"a.npy": (40, 50)})
    Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(tmp_path / "b.png")
    source = split_of(FolderConfig(root=str(tmp_path), range=(0, 4000), tile=32))
    source.open(0)
    raw = read_anew(source, replace(source.source.reading, range="raw"))
    window = raw.open(3)
    assert (window.deep, pixels(window).dtype) == (True, np.uint16)
    np.testing.assert_array_equal(pixels(window), arrays["a.npy"][8:, 18:])
    shallow = raw.open(4)
    assert (shallow.deep, shallow.size) == (False, (32, 32))
    assert np.asarray(shallow.channels()[0]).shape == (32, 32, 3)
    assert pixels(source.open(3)).dtype == np.float32


def test_a_file_that_is_read_whole_has_windows_too(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65535, (40, 50), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    config = FolderConfig(root=str(tmp_path), range=(0, 65535), tile=32, stride=9)
    source = open_split(config, "train", in_chans=1, image_size=SIZE, seed=0)
    assert len(source) == 6
    np.testing.assert_array_equal(pixels(source.open(5))[:, :, 0], values[8:, 18:])


def test_images_of_a_file_are_held_out_together(tmp_path: Path) -> None:
    config = scenes(tmp_path, holdout=3)
    training, evaluation = split_of(config), split_of(config, "eval")
    assert len(files_of(evaluation)) == 3
    assert not files_of(evaluation) & files_of(training)
    assert files_of(evaluation) | files_of(training) == files_of(split_of(scenes(tmp_path)))
    assert len(evaluation) + len(training) == len(split_of(scenes(tmp_path)))
    with pytest.raises(UserError, match=r"data\.holdout 8 leaves nothing"):
        split_of(scenes(tmp_path, holdout=8))


@pytest.mark.parametrize("keys", [{"label_share": 0.5}, {"labels_per_class": 2}])
def test_a_draw_of_each_class_is_of_files(keys: dict[str, Any], tmp_path: Path) -> None:
    whole, part = split_of(scenes(tmp_path)), split_of(scenes(tmp_path, **keys))
    assert len(files_of(part)) == 4
    assert len({name for name in files_of(part) if name.startswith("sea")}) == 2
    for index in range(len(part)):
        assert part.name(index) in {whole.name(other) for other in range(len(whole))}
    assert split_of(scenes(tmp_path, **keys), seed=5).fingerprint() != part.fingerprint()


def test_the_fingerprint_knows_the_windows(tmp_path: Path) -> None:
    found = split_of(scenes(tmp_path)).fingerprint()
    assert split_of(scenes(tmp_path)).fingerprint() == found
    others = [
        split_of(scenes(tmp_path, **keys)) for keys in ({"tile": 31}, {"stride": 15}, {"stride": (16, 15)})
    ]
    # Of the same number of windows.
    write_scenes(tmp_path, {"sea/1.npy": (33, 32), "sea/5.npy": (33, 33)})
    others.append(split_of(FolderConfig(root=str(tmp_path), range=(0, 4000), tile=32, stride=16)))
    write_scenes(tmp_path, {"sea/1.npy": (33, 33), "sea/5.npy": (33, 32)})
    others.append(split_of(FolderConfig(root=str(tmp_path), range=(0, 4000), tile=32, stride=16)))
    assert len({found, *(other.fingerprint() for other in others)}) == 6


def test_headers_are_read_once_while_the_files_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    opened = FileSource.open
    monkeypatch.setattr(FileSource, "open", lambda self, index: (read.append(index), opened(self, index))[1])
    config = scenes(tmp_path, overviews="never")
    first, again = split_of(config), split_of(config)
    assert len(read) == 8
    assert again.fingerprint() == first.fingerprint()
    # Another part, other windows of the same, another file of the same name.
    evaluation = split_of(config.model_copy(update={"holdout": 3}), "eval")
    assert len(read) == 8 + 3
    split_of(config.model_copy(update={"tile": 20}))
    assert len(read) == 8 + 3
    write_scenes(tmp_path, {"sea/1.npy": (90, 90)})
    assert len(split_of(config)) == len(first) + 25 - 1
    assert len(read) == 8 + 3 + 8
    assert len(files_of(evaluation)) == 3
    (tmp_path / "sea" / "3.npy").write_bytes(b"broken")
    assert "1 cannot be read" in split_of(config).describe()
    before = len(read)
    split_of(config)
    assert len(read) == before + 8


def train_batches(source: ImageSource, first_step: int = 0, num_workers: int = 0) -> list[Batch]:
    sampler = RequestSampler(
        order=KeyedOrder(len(source), 3), step_plan=lambda step: Plan(step), steps=range(first_step, 6)
    )
    view = TrainView(
        image_size=SIZE, crop_scale=(0.2, 1.0), flip=True, lanczos=False, seed=3, decode="reduced", deep=True
    )
    builder = BatchBuilder(source, view, KeyedOrder(len(source), 3))
    return list(load_batches(builder, sampler, num_workers=num_workers, prefetch=2, pin_memory=False))


class Plan:
    bandwidth = SIZE
    progress = 0.0

    def __init__(self, step: int) -> None:
        self.samples = range(8 * step, 8 * step + 8)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert one.bad == other.bad


def test_order_workers_and_resume(tmp_path: Path) -> None:
    config = scenes(tmp_path)
    (tmp_path / "sea" / "1.npy").write_bytes(b"\x93NUMPY broken")
    source = split_of(config)
    found = train_batches(source)
    order = KeyedOrder(len(source), 3)
    assert [index for batch in found for index in batch.request.indices] == [
        order.index(g) for g in range(48)
    ]
    assert_same(train_batches(source, num_workers=2), found)
    for first in (1, 4):
        assert_same(train_batches(split_of(config), first_step=first), found[first:])
    met = {bad.name: bad.reason for batch in found for bad in batch.bad}
    assert set(met) == {"sea/1.npy#0,0"}
    assert "1 cannot be read, as 'sea/1.npy': " in source.describe()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    assert_same(train_batches(copy), found)


def test_values_outside_the_range_are_told_window_by_window(tmp_path: Path) -> None:
    values = np.zeros((32, 96, 3), np.uint16)
    values[3, 50] = 5000
    np.save(tmp_path / "a.npy", values)
    source = split_of(FolderConfig(root=str(tmp_path), range=(0, 4000), tile=32))
    windows = [source.open(index) for index in (0, 1, 2)]
    for window in windows:
        pixels(window)
    assert [window.outside for window in windows] == [False, True, False]


def test_files_are_kept_open_but_not_many() -> None:
    large = shapes(*[(40, 40)] * (MAX_OPEN + 4), reads_parts=True)
    source = PartSource(large, (32, 32), (8, 8))
    large.opened.clear()
    for index in range(8):
        source.open(index)
    assert large.opened == [0, 1]
    for file in range(len(large)):
        source.open(4 * file)
    assert len(large.opened) == len(large)
    for file in reversed(range(len(large))):
        source.open(4 * file + 1)
    assert large.opened[len(large) :] == [3, 2, 1, 0]
    # What is decoded whole would fill the memory.
    large = shapes((40, 40))
    source = PartSource(large, (32, 32), (8, 8))
    source.open(0), source.open(1)
    assert large.opened == [0, 0, 0]


class OwnProcess(ArrayPicture):
    """Must be read where it was opened, as a library's open file must."""

    reads_parts = True

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values)
        self.process = os.getpid()

    def region(self, box: Any, at_least: Any, decoder: Decoder = "pillow") -> Region:
        assert self.process == os.getpid()
        return super().region(box, at_least, decoder)


def test_a_worker_opens_its_own_files() -> None:
    large = shapes(*SHAPES)
    large.arrays = [array.astype(np.float32) for array in large.arrays]
    large.open = lambda index: OwnProcess(large.arrays[index])  # type: ignore[method-assign]
    source = PartSource(large, (32, 32), (3, 3))
    # This process has files open when the workers are forked.
    found = train_batches(source)
    assert_same(train_batches(source, num_workers=2), found)


def test_a_file_of_another_size_than_at_the_start_is_unreadable(tmp_path: Path) -> None:
    source = split_of(scenes(tmp_path))
    write_scenes(tmp_path, {"land/0.npy": (50, 40)})
    with pytest.raises(UnreadableImage, match="size is not what it was"):
        source.open(0)


def test_what_is_kept_grows_with_the_files_alone() -> None:
    large = shapes((40, 50))
    large.arrays *= 1000
    source = PartSource(large, (8, 8), (1, 1))
    assert len(source) == 1000 * 33 * 43
    source.source = shapes()
    assert len(pickle.dumps(source)) < 150 * 1000


# Places on the earth.

UTM = Place((500_000.0, 10.0, 0.0, 5_600_000.0, 0.0, -10.0), "EPSG:32633")


def test_a_window_lies_where_its_file_says() -> None:
    source = PartSource(shapes((40, 50), place=UTM), (32, 32), (32, 32))
    place = source.place(3)
    assert place == Place((500_180.0, 10.0, 0.0, 5_599_920.0, 0.0, -10.0), "EPSG:32633")
    assert place_of(source.open(3)) == place
    turned = Place((3.0, 0.5, 0.25, 7.0, -0.25, 0.5), "")
    assert PartSource(shapes((40, 50), place=turned), (32, 32), (32, 32)).place(3) == Place(
        (3 + 18 * 0.5 + 8 * 0.25, 0.5, 0.25, 7 - 18 * 0.25 + 8 * 0.5, -0.25, 0.5), ""
    )
    assert PartSource(shapes((40, 50)), (32, 32), (32, 32)).place(3) is None


def test_a_window_is_evaluated_whole() -> None:
    large = shapes((40, 50))
    large.arrays[0] = large.arrays[0].astype(np.float32)
    source = PartSource(large, (32, 32), (32, 32))
    view = EvalView((32, 32), 1.0)(source.open(3), 0, (32, 32))
    np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), large.arrays[0][8:, 18:])


def test_a_subset_of_windows_is_one_of_images() -> None:
    source = PartSource(shapes(*SHAPES), (32, 32), (8, 8))
    part = Subset(source, [5, 2])
    assert part.name(0) == source.name(5)
    assert part.describe().startswith("2 of ")
