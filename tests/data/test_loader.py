"""Batches: the same for any number of workers, in order, and with bad images replaced by a rule."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from PIL import Image

from etpp_ssl.config import UserError
from etpp_ssl.data.loader import (
    MAX_ATTEMPTS,
    BadImage,
    Batch,
    BatchBuilder,
    evaluation_requests,
    load_batches,
)
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder, RequestSampler
from etpp_ssl.data.sources.folder import FileSource, FolderConfig
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.views import EvalView, TrainView

# More workers than cores are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = (16, 24)
BANDWIDTHS = [(8, 12), (10, 16), SIZE]
BATCH_SIZE = 6
SEED = 4


@dataclass(frozen=True)
class Plan:
    """Two steps at each bandwidth."""

    step: int

    @property
    def bandwidth(self) -> tuple[int, int]:
        return BANDWIDTHS[self.step // 2]

    @property
    def progress(self) -> float:
        return self.step / 6

    @property
    def samples(self) -> range:
        return range(self.step * BATCH_SIZE, (self.step + 1) * BATCH_SIZE)


def train_view(lanczos: bool = False) -> TrainView:
    return TrainView(image_size=SIZE, crop_scale=(0.3, 1.0), flip=True, lanczos=lanczos, seed=SEED)


def folder_of(root: Path, num_images: int, broken: Iterable[int] = ()) -> FileSource:
    """Images in two classes; the broken ones hold text."""
    for number in range(num_images):
        path = root / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number in broken:
            path.write_text("no image")
        else:
            noise = torch.randint(0, 256, (20, 20 + number, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(path)
    return FolderConfig(root=str(root)).open("train", in_chans=3, image_size=SIZE, seed=SEED)


def train_batches(source: FileSource, num_workers: int, *, lanczos: bool = False) -> list[Batch]:
    order = KeyedOrder(len(source), SEED)
    builder = BatchBuilder(source, train_view(lanczos), order)
    requests = RequestSampler(order, Plan, range(6), micro_batch_size=4)
    loader = load_batches(builder, requests, num_workers=num_workers, prefetch=2, pin_memory=False)
    return list(loader)


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.request == other.request
        assert [(bad.index, bad.name) for bad in one.bad] == [(bad.index, bad.name) for bad in other.bad]
        for key in ("images", "labels", "sample_ids"):
            assert torch.equal(getattr(one, key), getattr(other, key))


def test_a_batch_holds_the_view_of_each_sample(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 9)
    found = train_batches(source, num_workers=0)
    assert [len(batch.sample_ids) for batch in found] == [4, 2] * 6
    for batch in found:
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == batch.sample_ids.dtype == torch.int64
        assert batch.sample_ids.tolist() == list(batch.request.sample_ids)
        assert batch.bad == ()
        for row, (position, index) in enumerate(
            zip(batch.request.sample_ids, batch.request.indices, strict=True)
        ):
            assert batch.labels[row] == source.label(index)
            view = train_view()(source.open(index), position, SIZE)
            assert torch.equal(batch.images[row], view)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, num_workers: int) -> None:
    source = folder_of(tmp_path, 9)
    assert_same(train_batches(source, num_workers), train_batches(source, 0))


BIG = (112, 168)


def jpegs_of(root: Path, num_images: int, broken: Iterable[int]) -> FileSource:
    """JPEGs of which crops can be decoded at half the resolution; the broken ones end in the middle."""
    for number in range(num_images):
        pixels = torch.randint(0, 256, (14, 20 + number, 3), dtype=torch.uint8, generator=seeded(number))
        path = root / f"{number:02d}.jpg"
        Image.fromarray(pixels.numpy()).resize((440 + 7 * number, 333)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:-3000])
    return FolderConfig(root=str(root)).open("train", in_chans=3, image_size=BIG, seed=SEED)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("lanczos", [False, True])
def test_reduced_views_are_one_size_per_stage_and_bad_images_show_while_they_are_made(
    tmp_path: Path, lanczos: bool
) -> None:
    source = jpegs_of(tmp_path, 6, broken={1, 4})
    order = KeyedOrder(len(source), SEED)
    view = TrainView(BIG, (0.3, 1.0), True, lanczos, SEED, "reduced")
    requests = [
        BatchRequest(step, tuple(range(6)), tuple(range(6)), bandwidth, 0.5, 1.0, True)
        for step, bandwidth in enumerate([(32, 48), BIG])
    ]

    def run(num_workers: int) -> list[Batch]:
        builder = BatchBuilder(source, view, order)
        return list(load_batches(builder, requests, num_workers=num_workers, prefetch=2, pin_memory=False))

    found = run(0)
    small = (32, 48) if lanczos else (96, 96)
    assert [tuple(batch.images.shape) for batch in found] == [(6, 3, *small), (6, 3, *BIG)]
    for batch in found:
        assert {bad.index for bad in batch.bad} == {1, 4}
        assert all(bad.reason and "\n" not in bad.reason for bad in batch.bad)
        assert torch.equal(batch.images[0], view(source.open(0), 0, batch.request.bandwidth))
    assert_same(run(2), found)


def test_batches_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 9)
    found = [batch.request for batch in train_batches(source, num_workers=3)]
    assert found == list(RequestSampler(KeyedOrder(9, SEED), Plan, range(6), micro_batch_size=4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_batch_has_the_bandwidth_of_its_own_stage_where_workers_crop(
    tmp_path: Path, num_workers: int
) -> None:
    source = folder_of(tmp_path, 9)
    found = train_batches(source, num_workers, lanczos=True)
    assert [tuple(batch.images.shape[2:]) for batch in found] == [b for b in BANDWIDTHS for _ in range(4)]
    for batch in found:
        view = train_view(lanczos=True)(
            source.open(batch.request.indices[0]), batch.request.sample_ids[0], batch.request.bandwidth
        )
        assert torch.equal(batch.images[0], view)


def test_every_batch_has_the_full_size_where_the_device_crops(tmp_path: Path) -> None:
    found = train_batches(folder_of(tmp_path, 9), num_workers=0)
    assert {tuple(batch.images.shape[1:]) for batch in found} == {(3, *SIZE)}
    assert {batch.request.bandwidth for batch in found} == set(BANDWIDTHS)


def test_bad_images_are_replaced_by_the_next_readable_draw_and_named(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 9, broken={0, 3, 4, 7})
    order = KeyedOrder(9, SEED)
    broken = {index for index in range(9) if (source.folder / source.files[index]).stat().st_size == 8}
    assert len(broken) == 4
    met, chains = set(), 0
    for batch in train_batches(source, num_workers=0):
        expected = []
        for row, position in enumerate(batch.request.sample_ids):
            index, attempt = batch.request.indices[row], 0
            while index in broken:
                expected.append(index)
                attempt += 1
                index = order.replacement(position, attempt)
            chains += attempt > 1
            # The view is that of the sample's position, whichever image fills it.
            assert torch.equal(batch.images[row], train_view()(source.open(index), position, SIZE))
            assert batch.labels[row] == source.label(index)
        assert [image.index for image in batch.bad] == expected
        for image in batch.bad:
            assert image.name == source.name(image.index)
            assert "in no known image format" in image.reason
        met |= {image.index for image in batch.bad}
    assert met == broken
    assert chains, "no replacement was itself broken: the test shows less than it should"


def test_the_number_of_workers_does_not_change_replacements(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 9, broken={0, 3, 4, 7})
    alone = train_batches(source, 0)
    assert sum(len(batch.bad) for batch in alone) > 4
    assert_same(train_batches(source, 3), alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_of_which_nothing_is_readable_is_one_sentence(tmp_path: Path, num_workers: int) -> None:
    source = folder_of(tmp_path, 4, broken=range(4))
    with pytest.raises(UserError) as error:
        train_batches(source, num_workers)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"data: {MAX_ATTEMPTS} images in a row cannot be read, the last one")
    assert any(repr(source.name(index)) in message for index in range(4))
    assert "in no known image format" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mistake_of_ours_is_not_taken_for_a_bad_image(tmp_path: Path, num_workers: int) -> None:
    source = folder_of(tmp_path, 4)
    builder = BatchBuilder(source, train_view(), KeyedOrder(4, SEED))
    request = BatchRequest(0, (0,), (99,), SIZE, progress=0.0, weight=1.0, last=True)
    loader = load_batches(builder, [request], num_workers=num_workers, prefetch=1, pin_memory=False)
    with pytest.raises(IndexError):
        list(loader)


def test_prefetch_may_be_longer_than_the_run(tmp_path: Path) -> None:
    source = folder_of(tmp_path, 9)
    order = KeyedOrder(9, SEED)
    loader = load_batches(
        BatchBuilder(source, train_view(), order),
        RequestSampler(order, Plan, range(1)),
        num_workers=2,
        prefetch=8,
        pin_memory=False,
    )
    assert len(list(loader)) == 1


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 100), (1, 1)])
def test_evaluation_shows_each_image_once_in_order(count: int, batch_size: int) -> None:
    indices = [7 * i + 2 for i in range(count)]
    requests = evaluation_requests(indices, size=SIZE, batch_size=batch_size)
    assert [index for request in requests for index in request.indices] == indices
    assert sum(request.weight for request in requests) == pytest.approx(1.0)
    assert [request.last for request in requests] == [False] * (len(requests) - 1) + [True]
    assert [request.step for request in requests] == list(range(len(requests)))
    for request in requests:
        assert request.sample_ids == request.indices
        assert request.bandwidth == SIZE
        assert 1 <= len(request.indices) <= batch_size


def test_no_images_to_evaluate_are_no_requests() -> None:
    assert evaluation_requests([], size=SIZE, batch_size=4) == []


def test_evaluation_batches_hold_the_evaluation_view() -> None:
    source = SyntheticConfig(num_eval_images=7, size=(20, 30)).open(
        "eval", in_chans=1, image_size=SIZE, seed=0
    )
    view = EvalView(SIZE, crop_pct=0.9)
    builder = BatchBuilder(source, view, KeyedOrder(7, 0))
    requests = evaluation_requests([6, 0, 3, 5, 1], size=SIZE, batch_size=2)
    loader = load_batches(builder, requests, num_workers=2, prefetch=1, pin_memory=False)
    assert {request.progress for request in requests} == {1.0}
    images = torch.cat([batch.images for batch in loader])
    expected = [view(source.open(index), 0, SIZE) for index in (6, 0, 3, 5, 1)]
    assert torch.equal(images, torch.stack(expected))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_classes", "wrong"), [(3, None), (2, None), (1, "label 1"), (None, None)])
def test_a_label_beyond_the_classes_is_a_sentence(
    num_workers: int, num_classes: int | None, wrong: str | None, tmp_path: Path
) -> None:
    source = folder_of(tmp_path, 6)
    builder = BatchBuilder(source, train_view(), KeyedOrder(6, SEED), num_classes)
    loader = load_batches(
        builder,
        RequestSampler(builder.order, Plan, range(2)),
        num_workers=num_workers,
        prefetch=1,
        pin_memory=False,
    )
    if wrong is None:
        assert len(list(loader)) == 2
        return
    with pytest.raises(UserError) as error:
        list(loader)
    assert re.fullmatch(
        r"data: image 'b/\d\d\.png' has label 1, but model\.num_classes is 1: labels are 0 to 0",
        str(error.value),
    )


def test_a_batch_on_another_device_keeps_everything_else() -> None:
    request = BatchRequest(0, (5,), (2,), SIZE, progress=0.0, weight=1.0, last=True)
    bad = (BadImage(1, "name", "reason"),)
    batch = Batch(
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor([1]), torch.tensor([5]), 5, request, bad
    )
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.images, moved.labels, moved.sample_ids)} == {"meta"}
    assert moved.first_sample_id == 5
    assert moved.request == request
    assert moved.bad == bad


def open_workers(source: FileSource) -> tuple[Iterator[Batch], list[BaseProcess]]:
    """A loader's batches and its two workers, past their start."""
    order = KeyedOrder(len(source), SEED)
    loader = load_batches(
        BatchBuilder(source, train_view(), order),
        RequestSampler(order, Plan, range(6)),
        num_workers=2,
        prefetch=1,
        pin_memory=False,
    )
    before = multiprocessing.active_children()
    iterator = loader
    assert [next(iterator).request.step, next(iterator).request.step] == [0, 1]
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    return iterator, workers


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_workers_go_on_when_a_signal_reaches_the_whole_process_group(tmp_path: Path, name: str) -> None:
    iterator, workers = open_workers(folder_of(tmp_path, 9))
    # From another process: a SIGTERM of the main process itself means it.
    subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert [batch.request.step for batch in iterator] == [2, 3, 4, 5]


def test_workers_end_when_the_main_process_says_so(tmp_path: Path) -> None:
    iterator, workers = open_workers(folder_of(tmp_path, 9))
    try:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(timeout=10)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
        iterator.close()  # type: ignore[attr-defined]


def test_workers_are_gone_once_the_batches_are_closed_or_have_failed(tmp_path: Path) -> None:
    iterator, workers = open_workers(folder_of(tmp_path / "sound", 9))
    iterator.close()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in workers)
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError) as error:
        train_batches(folder_of(tmp_path / "broken", 4, broken=range(4)), num_workers=2)
    # The exception and its frames are still alive here.
    assert error.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= before


def test_a_process_that_fails_with_batches_under_way_ends() -> None:
    program = """
from etpp_ssl.data.views import EvalView
from etpp_ssl.data.loader import BatchBuilder, evaluation_requests, load_batches
from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.data.sources.synthetic import SyntheticConfig

source = SyntheticConfig(num_images=50).open("train", in_chans=3, image_size=(8, 8), seed=0)
builder = BatchBuilder(source, EvalView((8, 8), 1.0), KeyedOrder(50, 0))
requests = evaluation_requests(range(50), size=(8, 8), batch_size=2)
iterator = load_batches(builder, requests, num_workers=2, prefetch=2, pin_memory=False)
next(iterator), next(iterator)
raise RuntimeError("on purpose")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("RuntimeError: on purpose")
