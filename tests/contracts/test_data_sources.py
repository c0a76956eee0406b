"""What every data source promises that is addressed by index; a new file in etpp_ssl/data is found by itself.

A new source needs one line here too: how to make a tiny data set of it (`EXAMPLES`).
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Server

import etpp_ssl.data
from etpp_ssl.commands.prepare import PrepareConfig, prepare
from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.loader import Batch, BatchBuilder, load_batches
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import DataConfig, ImageSource
from etpp_ssl.data.sources.folder import FileListConfig, FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.data.sources.splits import AnyIndexedData, Subset, open_split
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.sources.timm_dataset import TimmConfig
from etpp_ssl.data.streams.base import StreamConfig
from etpp_ssl.data.views import TrainView, to_tensor

NUM_IMAGES = 11
SIZE = (16, 24)
SEED = 6


def write_images(root: Path, first: int, count: int, broken: Iterable[int] = ()) -> list[str]:
    """Images of several modes in two class folders; the broken ones end in the middle, or are as given."""
    names = []
    for number in range(first, first + count):
        name = f"{'oak' if number % 2 else 'pine'}/{number:03d}.png"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20 + number % 5, 22, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(["RGB", "L", "P", "RGBA"][number % 4]).save(path)
        if number - first in broken:
            path.write_bytes(broken[number - first] if isinstance(broken, dict) else path.read_bytes()[:60])
        names.append(name)
    return names


def folder(root: Path, broken: Iterable[int]) -> DataConfig:
    write_images(root / "train", 0, NUM_IMAGES, broken)
    write_images(root / "val", 100, 4)
    return FolderConfig(root=str(root))


def file_list(root: Path, broken: Iterable[int]) -> DataConfig:
    for name, first, count, bad in (("train", 0, NUM_IMAGES, broken), ("eval", 100, 4, ())):
        names = write_images(root, first, count, bad)
        (root / f"{name}.txt").write_text("".join(f"{n}\t{n.split('/')[0]}\n" for n in names))
    return FileListConfig(file=str(root / "train.txt"), eval_file=str(root / "eval.txt"))


def timm_folder(root: Path, broken: Iterable[int]) -> DataConfig:
    write_images(root / "train", 0, NUM_IMAGES, broken)
    write_images(root / "validation", 100, 4)
    return TimmConfig(root=str(root))


def torchvision_folder(root: Path, broken: Iterable[int]) -> DataConfig:
    write_images(root / "train", 0, NUM_IMAGES, broken)
    write_images(root / "val", 100, 4)
    return TimmConfig(dataset="torch/image_folder", root=str(root), eval_split="val")


def timm_tar(root: Path, broken: Iterable[int]) -> DataConfig:
    names = write_images(root / "unpacked", 0, NUM_IMAGES, broken)
    with tarfile.open(root / "images.tar", "w") as tar:
        for name in names:
            tar.add(root / "unpacked" / name, name)
    return TimmConfig(root=str(root / "images.tar"))


def synthetic(root: Path, broken: Iterable[int]) -> DataConfig:
    return SyntheticConfig(num_images=NUM_IMAGES, num_eval_images=4, num_classes=3)


def shards(root: Path, broken: Iterable[int]) -> DataConfig:
    folder(root / "files", broken)
    prepare(root / "files", root / "shards", PrepareConfig(), lambda done, total: None)
    return ShardsConfig(root=str(root / "shards"))


def foreign_shards(root: Path, broken: Iterable[int]) -> DataConfig:
    for split, first, count, bad in (("train", 0, NUM_IMAGES, broken), ("val", 100, 4, ())):
        names = write_images(root / "files" / split, first, count, bad)
        (root / "tars" / split).mkdir(parents=True)
        for number, part in enumerate((names[:3], names[3:])):
            with tarfile.open(root / "tars" / split / f"{number}.tar", "w") as tar:
                for name in part:
                    tar.add(root / "files" / split / name, name)
    return ShardsConfig(root=str(root / "tars"))


class Example(NamedTuple):
    """Makes a data set of NUM_IMAGES training images in an empty folder."""

    make: Callable[[Path, Iterable[int]], DataConfig]
    has_files: bool = True
    """Whether images can be broken, those of the numbers given."""
    has_evaluation: bool = True
    """Whether it has evaluation images without `data.holdout`."""


# By the source's `name`.
EXAMPLES: dict[str, list[Example]] = {
    "folder": [Example(folder)],
    "list": [Example(file_list)],
    "timm": [
        Example(timm_folder),
        Example(torchvision_folder),
        Example(timm_tar, has_evaluation=False),
    ],
    "shards": [Example(shards), Example(foreign_shards)],
    "synthetic": [Example(synthetic, has_files=False)],
}


def component_configs(package: Any) -> list[type[DataConfig]]:
    """The indexed data Configs of a package's modules that carry a literal `name`."""
    found = []
    for module_info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            is_config = isinstance(member, type) and issubclass(member, DataConfig)
            # Streams promise less; see test_streams.py.
            if is_config and not issubclass(member, StreamConfig) and member.__module__ == module.__name__:
                field = member.model_fields.get("name")
                if field is not None and get_origin(field.annotation) is Literal:
                    found.append(member)
    return found


CONFIGS = {config.model_fields["name"].default: config for config in component_configs(etpp_ssl.data)}

every_example = pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=example.make.__name__)
        for name, examples in EXAMPLES.items()
        if name in CONFIGS
        for example in examples
    ],
)
every_example_with_files = pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=example.make.__name__)
        for examples in EXAMPLES.values()
        for example in examples
        if example.has_files
    ],
)
every_channel_count = pytest.mark.parametrize("in_chans", [1, 3])


def open_one(config: DataConfig, split: str = "train", in_chans: int = 3) -> ImageSource:
    return config.open(split, in_chans=in_chans, image_size=SIZE, seed=SEED)


@dataclass(frozen=True)
class Plan:
    """Steps of seven images: a run of six of them goes through eleven images almost four times."""

    step: int
    bandwidth: tuple[int, int] = SIZE
    progress: float = 0.5

    @property
    def samples(self) -> range:
        return range(7 * self.step, 7 * self.step + 7)


def train_batches(source: ImageSource, *, first_step: int = 0, num_workers: int = 0) -> list[Batch]:
    order = KeyedOrder(len(source), SEED)
    view = TrainView(image_size=SIZE, crop_scale=(0.3, 1.0), flip=True, lanczos=False, seed=SEED)
    requests = RequestSampler(order, Plan, range(first_step, 6), micro_batch_size=4)
    loader = load_batches(
        BatchBuilder(source, view, order), requests, num_workers=num_workers, prefetch=2, pin_memory=False
    )
    return list(loader)


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.request == other.request
        assert [(bad.index, bad.name) for bad in one.bad] == [(bad.index, bad.name) for bad in other.bad]
        for key in ("images", "labels", "sample_ids"):
            assert torch.equal(getattr(one, key), getattr(other, key))


def test_every_source_in_the_package_has_an_example_here_and_a_name_of_its_own() -> None:
    assert {"folder", "list", "shards", "timm", "synthetic"} <= set(CONFIGS)
    assert len(CONFIGS) == len(component_configs(etpp_ssl.data))
    assert set(CONFIGS.values()) == set(get_args(AnyIndexedData))
    missing = sorted(set(CONFIGS) - set(EXAMPLES))
    assert not missing, f"add to EXAMPLES how to make a tiny data set of: {', '.join(missing)}"


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_makes_the_source_that_it_is_listed_under(name: str, tmp_path: Path) -> None:
    for number, example in enumerate(EXAMPLES.get(name, [])):
        root = tmp_path / str(number)
        root.mkdir()
        assert type(example.make(root, ())) is CONFIGS[name]


@every_example
def test_it_offers_everything_of_an_image_source(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    for name, member in inspect.getmembers(ImageSource, inspect.isfunction):
        if not name.startswith("_") or name == "__len__":
            own = getattr(source, name, None)
            assert callable(own), f"{name} is missing"
            expected = list(inspect.signature(member).parameters)[1:]
            assert list(inspect.signature(own).parameters) == expected
    assert len(source) == NUM_IMAGES
    names = [source.name(index) for index in range(len(source))]
    assert len(set(names)) == NUM_IMAGES
    for name in names:
        assert name.encode("utf-8")


@every_example
def test_a_line_says_what_was_found(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    said = source.describe()
    assert said.startswith(f"{NUM_IMAGES} images ")
    assert "\n" not in said
    part = Subset(source, [4, 1, 0])
    assert part.describe() == f"3 of {said}"


@every_example
def test_all_labels_are_the_labels(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    labels = [source.label(index) for index in range(len(source))]
    assert source.all_labels().tolist() == labels
    assert Subset(source, [4, 1, 0]).all_labels().tolist() == [labels[4], labels[1], labels[0]]


@every_example
@every_channel_count
def test_images_are_channels_of_the_right_mode_and_size(
    example: Example, in_chans: int, tmp_path: Path
) -> None:
    source = open_one(example.make(tmp_path, ()), in_chans=in_chans)
    for index in range(len(source)):
        image = source.open(index).channels()
        assert isinstance(image, tuple)
        (picture,) = image
        assert picture.mode == ("L" if in_chans == 1 else "RGB")
        assert min(picture.size) > 0
        tensor = to_tensor(image)
        assert tensor.shape == (in_chans, picture.height, picture.width)
        assert tensor.dtype == torch.uint8
        assert torch.equal(tensor, to_tensor(source.open(index).channels())), "loading twice gave two images"


@every_example
@every_channel_count
def test_an_opened_image_is_the_loaded_one(example: Example, in_chans: int, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()), in_chans=in_chans)
    for index in range(len(source)):
        loaded, picture = source.open(index).channels(), source.open(index)
        assert picture.size == loaded[0].size
        width, height = picture.size
        region = picture.region((1, 2, width, height), (width, height))
        assert region.box == (0, 0, width - 1, height - 2)
        assert torch.equal(torch.from_numpy(region.pixels).permute(2, 0, 1), to_tensor(loaded)[:, 2:, 1:])
        assert torch.equal(to_tensor(picture.channels()), to_tensor(loaded))


@every_example
def test_images_differ(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    assert (
        len({to_tensor(source.open(index).channels()).numpy().tobytes() for index in range(NUM_IMAGES)})
        == NUM_IMAGES
    )


@every_example
def test_labels_are_indices_of_classes(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    labels = [source.label(index) for index in range(len(source))]
    assert all(type(label) is int for label in labels)
    if source.classes is None:
        assert set(labels) == {-1}
    else:
        assert all(isinstance(name, str) for name in source.classes)
        assert len(set(source.classes)) == len(source.classes)
        assert set(labels) == set(range(len(source.classes)))


@every_example
def test_a_pickled_copy_gives_the_same(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    source.open(0).channels()
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    assert copy.classes == source.classes
    assert copy.fingerprint() == source.fingerprint()
    for index in range(len(source)):
        assert copy.name(index) == source.name(index)
        assert copy.label(index) == source.label(index)
        assert torch.equal(to_tensor(copy.open(index).channels()), to_tensor(source.open(index).channels()))


@every_example
def test_evaluation_images_are_not_training_images(example: Example, tmp_path: Path) -> None:
    config = example.make(tmp_path, ())

    def contents(config: DataConfig, split: str) -> set[bytes]:
        source = open_split(config, split, in_chans=3, image_size=SIZE, seed=SEED)
        return {to_tensor(source.open(index).channels()).numpy().tobytes() for index in range(len(source))}

    if example.has_evaluation:
        assert not contents(config, "eval") & contents(config, "train")
        assert open_one(config, "eval").classes == open_one(config).classes
    else:
        with pytest.raises(UserError, match=r"data\.holdout"):
            open_one(config, "eval")
    held_out = config.model_copy(update={"holdout": 3})
    evaluation = contents(held_out, "eval")
    assert len(evaluation) == 3
    assert not evaluation & contents(held_out, "train")


def test_fingerprints_are_the_same_in_another_process(tmp_path: Path, ranks: Server) -> None:
    configs = []
    for number, example in enumerate(e for examples in EXAMPLES.values() for e in examples):
        root = tmp_path / str(number)
        root.mkdir()
        configs.append(example.make(root, ()))
    here = [open_one(config).fingerprint() for config in configs]
    assert here == [open_one(config).fingerprint() for config in configs]
    assert all(isinstance(fingerprint, str) and fingerprint for fingerprint in here)
    (tmp_path / "configs").write_bytes(pickle.dumps(configs))
    program = f"""
import pickle
for config in pickle.load(open({str(tmp_path / "configs")!r}, "rb")):
    print(config.open("train", in_chans=3, image_size={SIZE}, seed={SEED}).fingerprint())
"""
    # The ranks' server also salts Python's hashes anew.
    (there,) = ranks.run(None, 1, before=program)
    assert there.split() == here


@every_example
def test_each_epoch_shows_each_image_once_in_a_keyed_order(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    shown = [index for batch in train_batches(source) for index in batch.request.indices]
    order = KeyedOrder(NUM_IMAGES, SEED)
    assert shown == [order.index(position) for position in range(42)]
    for epoch in range(3):
        assert sorted(shown[11 * epoch : 11 * epoch + 11]) == list(range(11))
    labels = [label for batch in train_batches(source) for label in batch.labels.tolist()]
    assert labels == [source.label(index) for index in shown]


@every_example
def test_the_number_of_workers_changes_nothing(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, ()))
    assert_same(train_batches(source, num_workers=2), train_batches(source))


@every_example
def test_a_run_resumed_in_the_middle_goes_on_as_if_it_had_not_stopped(
    example: Example, tmp_path: Path
) -> None:
    config = example.make(tmp_path, ())
    whole = train_batches(open_one(config))
    for first_step in (1, 4):
        tail = [batch for batch in whole if batch.request.step >= first_step]
        assert_same(train_batches(open_one(config), first_step=first_step), tail)


@every_example_with_files
def test_bad_images_are_reported_replaced_by_a_rule_and_named(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, (2, 7)))
    assert len(source) == NUM_IMAGES
    broken = set()
    for index in range(NUM_IMAGES):
        try:
            source.open(index).channels()
        except UnreadableImage:
            broken.add(index)
    assert len(broken) == 2
    found = train_batches(source)
    met = {(bad.index, bad.name) for batch in found for bad in batch.bad}
    assert met == {(index, source.name(index)) for index in broken}
    assert all(bad.reason and "\n" not in bad.reason for batch in found for bad in batch.bad)
    assert [position for batch in found for position in batch.sample_ids.tolist()] == list(range(42))
    assert_same(train_batches(source, num_workers=2), found)
    tail = [batch for batch in found if batch.request.step >= 3]
    assert_same(train_batches(source, first_step=3), tail)


@every_example_with_files
def test_a_data_set_of_broken_images_is_one_sentence(example: Example, tmp_path: Path) -> None:
    source = open_one(example.make(tmp_path, range(NUM_IMAGES)))
    with pytest.raises(UserError) as error:
        train_batches(source)
    assert str(error.value).startswith("data: ")
    assert "\n" not in str(error.value)


@every_example_with_files
def test_a_pointer_of_git_lfs_is_named_as_what_it_is(example: Example, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    source = open_one(example.make(tmp_path, dict.fromkeys((2, 7), pointer)))
    reasons = []
    for index in range(NUM_IMAGES):
        try:
            source.open(index).channels()
        except UnreadableImage as error:
            reasons.append(str(error))
    assert reasons == ["it is a pointer of Git LFS: `git lfs pull` fetches the image"] * 2


# An empty evaluation part of each source with files, and what its sentence says.
EMPTY: dict[str, tuple[Callable[[Path], DataConfig], str]] = {
    "folder": (lambda root: FolderConfig(root=str(root)), "no image below"),
    "list": (
        lambda root: FileListConfig(file=str(root / "list.txt"), eval_file=str(root / "empty.txt")),
        "names no image",
    ),
    "timm": (lambda root: TimmConfig(root=str(root), eval_split="val"), "Found 0 images"),
    "shards": (lambda root: ShardsConfig(root=str(root)), "no .tar in"),
}


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"synthetic"}))
def test_an_empty_split_is_a_sentence(name: str, tmp_path: Path) -> None:
    files = write_images(tmp_path / "train", 0, 4)
    (tmp_path / "list.txt").write_text("".join(f"train/{file}\tclass\n" for file in files))
    (tmp_path / "empty.txt").write_text("# nobody\n\n")
    (tmp_path / "val" / "oak").mkdir(parents=True)
    make, sentence = EMPTY[name]
    with pytest.raises(UserError) as error:
        open_split(make(tmp_path), "eval", in_chans=3, image_size=SIZE, seed=SEED)
    message = str(error.value)
    assert message.startswith("data.")
    assert sentence in message
    assert "\n" not in message


class Nothing:
    """A source without images, as a new one might be."""

    classes = None

    def __len__(self) -> int:
        return 0


class NothingConfig(SyntheticConfig):
    """Its settings."""

    def open(self, split: str, **others: Any) -> Any:
        return Nothing()


@pytest.mark.parametrize(
    ("split", "holdout", "part"),
    [("train", 0, "training"), ("eval", 0, "evaluation"), ("eval", 3, "training")],
)
def test_a_source_that_does_not_notice_that_it_is_empty_is_found_out(
    split: str, holdout: int, part: str
) -> None:
    with pytest.raises(UserError, match=f"the {part} split has no images"):
        open_split(NothingConfig(holdout=holdout), split, in_chans=3, image_size=SIZE, seed=SEED)
