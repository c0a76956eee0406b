"""What timm and torchvision open: folders, tars and their own data sets."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.loader import BatchBuilder, evaluation_requests, load_batches
from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.data.sources.timm_dataset import TimmConfig, TimmSource
from etpp_ssl.data.views import TrainView, to_tensor

CLASSES = ("cat", "dog", "emu")


def encoded(number: int, broken: bool = False) -> bytes:
    """A PNG of its own content; a broken one ends in the middle."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (30, 20 + number, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()[: 200 if broken else None]


def write_folder(root: Path, num_images: int = 12, broken: Iterable[int] = ()) -> Path:
    for number in range(num_images):
        path = root / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number, number in broken))
    return root


def write_tar(path: Path, num_images: int = 12, broken: Iterable[int] = (), *, classes: bool = True) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            folder = f"{CLASSES[number % 3]}/" if classes else ""
            member = tarfile.TarInfo(f"{folder}{number:02d}.png")
            data = encoded(number, number in broken)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR10's own layout, with six training and three test images."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, count in (("data_batch_1", 6), ("test_batch", 3)):
        data = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 3 for i in range(count)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    lists = {"train_list": [["data_batch_1", None]], "test_list": [["test_batch", None]], "meta": meta}
    for name, value in lists.items():
        monkeypatch.setattr(CIFAR10, name, value)
    return root


def open_timm(root: Path | None = None, split: str = "train", **settings: Any) -> TimmSource:
    config = TimmConfig(root=None if root is None else str(root), **settings)
    return config.open(split, in_chans=3, image_size=(8, 8), seed=0)


def sentence(root: Path | None = None, split: str = "train", **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        open_timm(root, split, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels(number: int) -> torch.Tensor:
    with Image.open(io.BytesIO(encoded(number))) as image:
        return to_tensor((image.convert("RGB"),))


@pytest.fixture(params=["folder", "tar", "torch/image_folder"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Opens twelve images as a folder, a tar or torchvision's folder, some of them broken."""

    def open_one(broken: Iterable[int] = ()) -> TimmSource:
        if request.param == "tar":
            return open_timm(write_tar(tmp_path / "images.tar", broken=broken))
        name = "" if request.param == "folder" else request.param
        return open_timm(write_folder(tmp_path / "images", broken=broken), dataset=name)

    return open_one


def test_pictures_labels_and_classes_belong_together(written: Any) -> None:
    source = written()
    assert len(source) == 12
    assert source.classes == list(CLASSES)
    seen = set()
    for index in range(12):
        (picture,) = source.open(index).channels()
        number = picture.width - 20
        assert torch.equal(to_tensor((picture,)), pixels(number))
        assert source.label(index) == number % 3
        seen.add(number)
    assert seen == set(range(12))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_are_the_readers_file_names(tmp_path: Path, kind: str) -> None:
    source = open_timm(write_folder(tmp_path / "a") if kind == "folder" else write_tar(tmp_path / "a.tar"))
    for index in range(12):
        number = source.open(index).channels()[0].width - 20
        assert source.name(index) == f"{CLASSES[number % 3]}/{number:02d}.png"


def test_a_broken_image_is_reported_and_not_replaced_by_its_neighbour(written: Any) -> None:
    source = written(broken={1, 5})
    # By class and number: images 1 and 5 are the first of class 1 and the second of class 2.
    for index in (4, 9):
        with pytest.raises(UnreadableImage) as error:
            source.open(index).channels()
        assert str(error.value)
        assert "\n" not in str(error.value)
    readable = [source.open(index).channels()[0].width - 20 for index in range(12) if index not in (4, 9)]
    assert sorted(readable) == [number for number in range(12) if number not in (1, 5)]


def test_a_file_that_has_gone_is_an_unreadable_image(tmp_path: Path) -> None:
    folder, tar = write_folder(tmp_path / "images"), write_tar(tmp_path / "images.tar")
    sources = [open_timm(folder), open_timm(tar), open_timm(folder, dataset="torch/image_folder")]
    tar.unlink()
    for file in folder.rglob("*.png"):
        file.unlink()
    for source in sources:
        with pytest.raises(UnreadableImage, match="No such file"):
            source.open(3).channels()


def test_a_tar_is_read_the_same_by_several_workers_after_this_process_has_read_it(tmp_path: Path) -> None:
    source = open_timm(write_tar(tmp_path / "images.tar", num_images=60))
    # Had the open file been kept, the workers would share its place in it.
    before = [to_tensor(source.open(index).channels()) for index in range(60)]
    view = TrainView(image_size=(16, 16), crop_scale=(0.5, 1.0), flip=True, lanczos=False, seed=0)

    def read(num_workers: int) -> list[torch.Tensor]:
        builder = BatchBuilder(source, view, KeyedOrder(60, 0))
        requests = evaluation_requests(range(60), size=(16, 16), batch_size=4)
        loader = load_batches(builder, requests, num_workers=num_workers, prefetch=4, pin_memory=False)
        found = list(loader)
        assert not any(batch.bad for batch in found)
        return [batch.images for batch in found]

    alone = read(0)
    assert len(alone) == 15
    for _ in range(3):
        for one, other in zip(read(2), alone, strict=True):
            assert torch.equal(one, other)
    for index in range(60):
        assert torch.equal(to_tensor(source.open(index).channels()), before[index])


def test_a_source_that_has_been_read_can_be_pickled(written: Any) -> None:
    source = written()
    expected = to_tensor(source.open(4).channels())
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(to_tensor(copy.open(4).channels()), expected)
    assert copy.label(4) == source.label(4)
    assert copy.fingerprint() == source.fingerprint()


def test_reading_leaves_no_file_beside_a_tar(tmp_path: Path) -> None:
    open_timm(write_tar(tmp_path / "images.tar")).open(0).channels()
    assert [path.name for path in tmp_path.iterdir()] == ["images.tar"]


def test_labels_are_told_without_reading_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tar = write_folder(tmp_path / "images"), write_tar(tmp_path / "images.tar")
    sources = [open_timm(folder), open_timm(tar), open_timm(folder, dataset="torch/image_folder")]
    cifar = open_timm(write_cifar10(tmp_path / "cifar", monkeypatch), dataset="torch/cifar10")
    tar.unlink()
    for file in folder.rglob("*.png"):
        file.unlink()
    monkeypatch.setattr(CIFAR10, "__getitem__", lambda data, index: pytest.fail("it was read"))
    for source in sources:
        assert sorted(source.label(index) for index in range(12)) == [0] * 4 + [1] * 4 + [2] * 4
    assert [cifar.label(index) for index in range(6)] == [0, 1, 2, 0, 1, 2]


def test_cifar10_of_torchvision_has_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cifar10(tmp_path, monkeypatch)
    train = open_timm(root, dataset="torch/cifar10")
    evaluation = open_timm(root, "eval", dataset="torch/cifar10")
    assert (len(train), len(evaluation)) == (6, 3)
    assert train.classes == evaluation.classes == list(CLASSES)
    assert train.name(2) == "torch/cifar10/train[2]"
    assert train.fingerprint() != evaluation.fingerprint()
    stored = pickle.loads((root / CIFAR10.base_folder / "data_batch_1").read_bytes())["data"]
    for index in range(6):
        expected = torch.from_numpy(stored[index].reshape(3, 32, 32))
        assert torch.equal(to_tensor(train.open(index).channels()), expected)
    gray = TimmConfig(dataset="torch/cifar10", root=str(root)).open(
        "train", in_chans=1, image_size=(8, 8), seed=0
    )
    assert gray.open(0).channels()[0].mode == "L"


def test_a_folder_or_tar_without_class_folders_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(3):
        (tmp_path / "flat" / f"{number}.png").write_bytes(encoded(number))
    for root in (tmp_path / "flat", write_tar(tmp_path / "flat.tar", classes=False)):
        source = open_timm(root)
        assert source.classes is None
        assert source.label(0) == -1


def test_the_evaluation_split_is_a_sub_folder_and_never_the_training_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "both" / "train", 12)
    write_folder(tmp_path / "both" / "validation", 6)
    assert len(open_timm(tmp_path / "both")) == 12
    assert len(open_timm(tmp_path / "both", "eval")) == 6
    write_folder(tmp_path / "one" / "train", 12)
    tar = write_tar(tmp_path / "images.tar")
    for root, dataset in ((tmp_path / "one", ""), (tmp_path / "one", "torch/image_folder"), (tar, "")):
        message = sentence(root, "eval", dataset=dataset)
        assert "data.eval_split 'validation'" in message
        assert repr(str(root)) in message
        assert "data.holdout" in message
    write_folder(tmp_path / "one" / "strange", 3)
    assert len(open_timm(tmp_path / "one", "eval", eval_split="strange")) == 3


@pytest.mark.parametrize("dataset", ["wds/some", "hfids/some", "tfds/some", "WDS/some"])
def test_a_stream_is_one_sentence_whether_or_not_its_library_is_there(tmp_path: Path, dataset: str) -> None:
    message = sentence(tmp_path, dataset=dataset)
    assert f"data.dataset {dataset!r} is a stream" in message
    assert "hfds/" in message


@pytest.mark.parametrize("dataset", ["cifar10", "torch", "trch/cifar10", "hfds"])
def test_a_wrong_name_is_refused_and_not_taken_for_a_folder(tmp_path: Path, dataset: str) -> None:
    message = sentence(write_folder(tmp_path), dataset=dataset)
    assert f"data.dataset {dataset!r}" in message
    assert "torch/cifar10" in message


def test_a_name_that_torchvision_lacks_or_whose_files_are_missing_is_one_sentence(tmp_path: Path) -> None:
    message = sentence(tmp_path, dataset="torch/no-such-set")
    assert "data.dataset 'torch/no-such-set'" in message
    message = sentence(tmp_path, dataset="torch/cifar10")
    assert "data.dataset 'torch/cifar10'" in message
    assert repr(str(tmp_path)) in message
    assert "not found" in message
    assert "data.dataset 'torch/cifar10'" in sentence(None, dataset="torch/cifar10")


def test_a_missing_optional_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    message = sentence(tmp_path, dataset="hfds/some/set")
    assert "'hfds/some/set'" in message
    assert "(import of datasets halted" in message
    assert "pip install 'etpp-ssl[hub]'" in message


def test_a_missing_or_empty_root_is_one_sentence(tmp_path: Path) -> None:
    assert "data.root is missing" in sentence(None)
    assert f"data.root {str(tmp_path / 'gone')!r} does not exist" in sentence(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert repr(str(tmp_path / "empty")) in sentence(tmp_path / "empty")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert repr(str(tmp_path / "empty.tar")) in sentence(tmp_path / "empty.tar")


def test_the_root_may_use_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "images", 3)
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    assert len(open_timm(Path("$SOMEWHERE/images"))) == 3


def test_a_reader_without_a_list_of_samples_is_asked_for_each_label() -> None:
    """As timm's reader of Hugging Face data sets, which hands over encoded bytes."""

    class Reader:
        class_to_idx = {"one": 1, "zero": 0}  # noqa: RUF012

        def __getitem__(self, index: int) -> tuple[io.BytesIO, int | None]:
            return io.BytesIO(encoded(index)), None if index == 2 else index % 2

        def filename(self, index: int) -> str | None:
            return f"{index}\udcff.png" if index else None

    source = TimmSource(SimpleNamespace(reader=Reader()), "hfds/x/train", Reading(3))
    assert source.classes == ["zero", "one"]
    assert [source.label(index) for index in (0, 1, 2, 3)] == [0, 1, -1, 1]
    assert torch.equal(to_tensor(source.open(3).channels()), pixels(3))
    assert source.name(1) == "1\\xff.png"
    assert source.name(0) == "hfds/x/train[0]"
