"""What every stream promises; a new file in etpp_ssl/data is found by itself.

A new stream needs one line in tests/stream_sources.py: how to make a tiny one (`EXAMPLES`).
"""

from __future__ import annotations

import importlib
import io
import pickle
import pkgutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from stream_sources import EXAMPLES, NUM_IMAGES, png

import etpp_ssl.data
from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.loader import Batch, load_batches
from etpp_ssl.data.sampler import RequestSampler
from etpp_ssl.data.streams.base import Stream, StreamConfig
from etpp_ssl.data.streams.loader import StreamPlace
from etpp_ssl.data.streams.mix import MixedStream
from etpp_ssl.data.streams.webdataset import WebDatasetConfig
from etpp_ssl.data.training import open_training
from etpp_ssl.data.views import TrainView
from etpp_ssl.recipe_base import AnyStream

SIZE = (16, 24)
SEED = 6
NUM_STEPS = 12


def stream_configs() -> list[type[StreamConfig]]:
    """The stream Configs of the package's modules that carry a literal `name`."""
    found = []
    for module_info in pkgutil.walk_packages(etpp_ssl.data.__path__, "etpp_ssl.data."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            is_stream = isinstance(member, type) and issubclass(member, StreamConfig)
            if is_stream and member.__module__ == module.__name__:
                field = member.model_fields.get("name")
                if field is not None and get_origin(field.annotation) is Literal:
                    found.append(member)
    return found


CONFIGS = {config.model_fields["name"].default: config for config in stream_configs()}


@pytest.fixture(scope="module", params=sorted(EXAMPLES))
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StreamConfig:
    return EXAMPLES[request.param](tmp_path_factory.mktemp(request.param))


@dataclass(frozen=True)
class Plan:
    """Steps of seven images, in micro-batches of three at most."""

    step: int
    bandwidth: tuple[int, int] = SIZE
    progress: float = 0.5

    @property
    def samples(self) -> range:
        return range(7 * self.step, 7 * self.step + 7)


@dataclass
class Read:
    """What one process has read, and where it stood after each batch."""

    batches: list[Batch]
    places: list[StreamPlace]

    @property
    def numbers(self) -> list[int]:
        """The images, by their labels."""
        return [label for batch in self.batches for label in batch.labels.tolist()]


def read(
    config: StreamConfig,
    *,
    num_workers: int = 0,
    rank: int = 0,
    num_processes: int = 1,
    seed: int = SEED,
    first_step: int = 0,
    place: StreamPlace | None = None,
    num_classes: int | None = None,
) -> Read:
    place = place or StreamPlace.beginning(num_workers)
    view = TrainView(image_size=SIZE, crop_scale=(0.3, 1.0), flip=True, lanczos=False, seed=seed)
    sampler = RequestSampler(
        None,
        step_plan=Plan,
        steps=range(first_step, NUM_STEPS),
        rank=rank,
        num_processes=num_processes,
        micro_batch_size=3,
    )
    images = open_training(config, in_chans=3, image_size=SIZE, seed=seed)
    builder, requests = images.loading(sampler, view, num_classes, place)
    loader = load_batches(builder, requests, num_workers=num_workers, prefetch=2, pin_memory=False)
    found = Read([], [])
    for batch in loader:
        place = place.after(batch)
        found.batches.append(batch)
        found.places.append(StreamPlace.from_json(place.to_json()))
    return found


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert (one.request, one.bad, one.cursor) == (other.request, other.bad, other.cursor)
        for key in ("images", "labels", "sample_ids"):
            assert torch.equal(getattr(one, key), getattr(other, key))


def shard_streams(stream: Stream) -> list[Stream]:
    """The stream, or those that it mixes."""
    return [*stream.streams] if isinstance(stream, MixedStream) else [stream]


def epochs_of(stream: Stream, worker: int, num_workers: int) -> Iterator[list[int]]:
    """What a worker reads, epoch after epoch."""
    reader, epoch, found = stream.worker_shard(worker, num_workers, None), 0, []
    while True:
        item = reader.take()
        if reader.cursor()["epoch"] != epoch:
            yield found
            epoch, found = epoch + 1, []
        found.append(item.label)


def test_every_stream_has_an_example_a_name_of_its_own_and_is_known_to_recipes() -> None:
    assert {"webdataset", "huggingface", "mix"} <= set(CONFIGS)
    assert len(CONFIGS) == len(stream_configs())
    assert set(CONFIGS.values()) == set(get_args(AnyStream))
    missing = sorted(set(CONFIGS) - set(EXAMPLES))
    assert not missing, f"add to EXAMPLES how to make a tiny stream of: {', '.join(missing)}"


def test_an_example_makes_the_stream_that_it_is_listed_under(config: StreamConfig) -> None:
    assert type(config) is CONFIGS[config.name]


@pytest.mark.parametrize("num_workers", [1, 3, 7])
def test_each_epoch_has_each_sample_once_over_all_workers_in_a_new_order(
    config: StreamConfig, num_workers: int
) -> None:
    for stream in shard_streams(config.open_stream(SEED)):
        parts_of = [epochs_of(stream, worker, num_workers) for worker in range(num_workers)]
        orders = []
        for _ in range(3):
            parts = [next(worker) for worker in parts_of]
            numbers = [number for part in parts for number in part]
            first = min(numbers)
            assert sorted(numbers) == list(range(first, first + NUM_IMAGES))
            assert all(parts), "a worker had nothing to read"
            orders.append(parts)
        assert orders[0] != orders[1] != orders[2] != orders[0]
        # The workers change shards, too: otherwise a worker would show the same images for ever.
        assert num_workers == 1 or {*orders[0][0]} != {*orders[1][0]} or {*orders[1][0]} != {*orders[2][0]}


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_order_is_a_function_of_the_seed(config: StreamConfig, num_workers: int) -> None:
    found = read(config, num_workers=num_workers)
    assert_same(found.batches, read(config, num_workers=num_workers).batches)
    positions = [position for batch in found.batches for position in batch.sample_ids.tolist()]
    assert positions == list(range(7 * NUM_STEPS))
    if not num_workers:
        # One worker reads the one worker shard that a process without workers reads itself.
        assert_same(found.batches, read(config, num_workers=1).batches)
        assert found.numbers != read(config, seed=SEED + 1).numbers


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_run_resumed_after_any_step_goes_on_as_if_it_had_not_stopped(
    config: StreamConfig, num_workers: int
) -> None:
    whole = read(config, num_workers=num_workers)
    # Processes are dear: with workers, after one step within an epoch and a block, and one behind them.
    for first_step in range(1, NUM_STEPS) if not num_workers else (2, 9):
        before = sum(batch.request.step < first_step for batch in whole.batches)
        tail = read(config, num_workers=num_workers, first_step=first_step, place=whole.places[before - 1])
        assert_same(tail.batches, whole.batches[before:])
        assert tail.places == whole.places[before:]


# After five steps with two data workers: the place, and the images of the next micro-batches.
PLACES_OF_0_5_1 = {
    "webdataset": (
        {
            "num_batches": 15,
            "lanes": [
                {
                    "num_samples": 18,
                    "cursor": {"epoch": 0, "place": 3, "offset": 2, "block": 4, "used": 2},
                },
                {
                    "num_samples": 17,
                    "cursor": {"epoch": 1, "place": 0, "offset": 4, "block": 4, "used": 2},
                },
            ],
        },
        [0, 22, 3, 12, 13, 8, 4],
    ),
    "mix": (
        {
            "num_batches": 15,
            "lanes": [
                {
                    "num_samples": 18,
                    "cursor": {
                        "number": 18,
                        "sources": [
                            {"epoch": 0, "place": 3, "offset": 0, "block": 3, "used": 2},
                            {"epoch": 0, "place": 0, "offset": 3, "block": 1, "used": 1},
                        ],
                    },
                },
                {
                    "num_samples": 17,
                    "cursor": {
                        "number": 17,
                        "sources": [
                            {"epoch": 0, "place": 1, "offset": 4, "block": 2, "used": 2},
                            {"epoch": 0, "place": 1, "offset": 1, "block": 2, "used": 1},
                        ],
                    },
                },
            ],
        },
        [25, 24, 26, 7, 6, 30, 27],
    ),
}


@pytest.mark.parametrize("name", PLACES_OF_0_5_1)
def test_a_place_in_a_checkpoint_of_0_5_1_is_resumed(name: str, tmp_path: Path) -> None:
    values, following = PLACES_OF_0_5_1[name]
    place = StreamPlace.from_json(values)
    assert place.to_json() == values
    tail = read(EXAMPLES[name](tmp_path), num_workers=2, first_step=5, place=place)
    assert tail.numbers[:7] == following


def test_processes_share_the_samples_of_an_epoch(config: StreamConfig) -> None:
    parts = [read(config, rank=rank, num_processes=2) for rank in range(2)]
    positions = [sorted(p for b in part.batches for p in b.sample_ids.tolist()) for part in parts]
    assert sorted(positions[0] + positions[1]) == list(range(7 * NUM_STEPS))
    # A quarter of what each reads is of its first epoch for sure.
    first, second = ({*part.numbers[: NUM_IMAGES // 4]} for part in parts)
    assert not first & second
    for rank, part in enumerate(parts):
        place = part.places[5]
        step = part.batches[6].request.step
        tail = read(config, rank=rank, num_processes=2, first_step=step, place=place)
        assert_same(tail.batches, part.batches[6:])


def test_broken_samples_are_named_and_the_next_ones_take_their_places(tmp_path: Path) -> None:
    for name, make in EXAMPLES.items():
        whole = read(make(tmp_path / name / "whole"))
        config = make(tmp_path / name / "broken", (3, 17))
        broken = read(config)
        expected = [number for number in whole.numbers if number not in (3, 17, 103, 117)]
        assert broken.numbers[: len(expected)] == expected
        assert len(broken.numbers) == len(whole.numbers)
        bad = [bad for batch in broken.batches for bad in batch.bad]
        shards = {bad.name.split(" :: ")[0].rsplit("/", 1)[1].split(".")[0] for bad in bad}
        assert shards == {"0", "3"}, "they lie in the first and in the fourth shard"
        assert len({bad.index for bad in bad}) == len({bad.name for bad in bad})
        assert len({bad.name for bad in bad}) == (4 if name == "mix" else 2)
        assert all(bad.reason and "\n" not in bad.reason for bad in bad)
        tail = read(config, first_step=3, place=broken.places[8])
        assert_same(tail.batches, broken.batches[9:])


def named_labels(folder: Path, **settings: Any) -> StreamConfig:
    """Images 0 to 5 with the labels oak and pine in turn."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(6):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.cls", NAMES[number % 2])):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return WebDatasetConfig(urls=str(folder), num_images=6, shuffle_buffer=1, **settings)


NAMES = (b"oak\n", b"pine")


def test_labels_that_are_names_become_the_indices_of_the_recipes_classes(tmp_path: Path) -> None:
    """They were "no label" in 0.5."""
    named = named_labels(tmp_path, classes=("pine", "oak"))
    assert read(named, num_classes=2).numbers[:6] == [1, 0, 1, 0, 1, 0]
    assert read(named).numbers[:6] == [1, 0, 1, 0, 1, 0]
    assert set(read(named_labels(tmp_path)).numbers) == {-1}
    for classes, words in ((("pine", "elm"), "has pine, elm"), (None, "is not given")):
        with pytest.raises(UserError) as error:
            read(named_labels(tmp_path, classes=classes), num_classes=2)
        assert str(error.value) == (
            f"data: image '{tmp_path}/0.tar :: 0' has label 'oak', but data.classes {words}"
        )


def test_a_line_says_what_the_stream_consists_of(config: StreamConfig) -> None:
    said = open_training(config, in_chans=3, image_size=SIZE, seed=SEED).describe()
    assert said.startswith(f"{NUM_IMAGES} images an epoch, by data.num_images, of 7 shards (0.")
    assert "\n" not in said


def test_images_of_more_pixels_than_allowed_are_unreadable(config: StreamConfig) -> None:
    with pytest.raises(UserError, match=r"more than data\.max_pixels 7 allows"):
        read(config.model_copy(update={"max_pixels": 7}))


def test_a_stream_of_broken_samples_is_one_sentence(tmp_path: Path) -> None:
    for name, make in EXAMPLES.items():
        config = make(tmp_path / name, range(NUM_IMAGES))
        for num_workers in (0, 1):
            with pytest.raises(UserError, match=r"^data: 100 images in a row cannot be read") as error:
                read(config, num_workers=num_workers)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_cannot_be_read_is_a_fault_of_the_run(num_workers: int) -> None:
    config = WebDatasetConfig(urls="pipe:exit 3", num_images=NUM_IMAGES, retries=0)
    with pytest.raises(RunFault, match=r"^data: shard 'pipe:exit 3' cannot be read after 1 try") as error:
        read(config, num_workers=num_workers)
    assert "\n" not in str(error.value)


def test_too_few_shards_are_one_sentence_with_both_numbers(config: StreamConfig) -> None:
    stream = config.open_stream(SEED)
    stream.check_workers(7)
    with pytest.raises(UserError, match=r"7 shards .* the 8 data workers") as error:
        stream.check_workers(8)
    assert "\n" not in str(error.value)


def test_a_stream_is_small_to_pickle_and_its_copy_reads_the_same(config: StreamConfig) -> None:
    stream = config.open_stream(SEED)
    items = stream.worker_shard(0, 2, None)
    text = pickle.dumps(stream)
    assert len(text) < 20_000
    copy = pickle.loads(text)
    assert copy.fingerprint() == stream.fingerprint()
    other = copy.worker_shard(0, 2, None)
    assert [items.take() for _ in range(20)] == [other.take() for _ in range(20)]


def test_the_settings_of_indexed_data_that_a_stream_cannot_have_are_refused(config: StreamConfig) -> None:
    values = config.model_dump(mode="json")
    for change, words in (
        ({"num_images": None}, "num_images is missing"),
        ({"holdout": 3}, "holdout is 3"),
        ({"label_share": 0.5}, "label_share is 0.5"),
        ({"labels_per_class": 2}, "labels_per_class is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            type(config).model_validate({**values, **change})


def test_images_by_index_come_from_the_evaluation_data(config: StreamConfig) -> None:
    for split in ("train", "eval"):
        with pytest.raises(UserError, match=r"data\.eval is missing: a stream has no") as error:
            config.open(split, in_chans=3, image_size=SIZE, seed=SEED)
        assert "\n" not in str(error.value)
    values = config.model_dump(mode="json")
    values["eval"] = {"name": "synthetic", "num_images": 9, "num_eval_images": 5}
    given = type(config).model_validate(values)
    lengths = [len(given.open(split, in_chans=3, image_size=SIZE, seed=SEED)) for split in ("train", "eval")]
    assert lengths == [9, 5]
