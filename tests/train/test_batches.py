"""Batches step by step, and what happens to images that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from etpp_ssl.config import UserError
from etpp_ssl.data.loader import BadImage, Batch, BatchBuilder
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder, RequestSampler
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.views import TrainView
from etpp_ssl.run_state import TrainState
from etpp_ssl.train import batches
from etpp_ssl.train.batches import BadImages, TrainingBatches

SIZE = (8, 8)


@dataclass(frozen=True)
class Plan:
    """Steps of ten images."""

    step: int
    bandwidth: tuple[int, int] = SIZE
    progress: float = 0.5

    @property
    def samples(self) -> range:
        return range(10 * self.step, 10 * (self.step + 1))


class Notebook:
    """Stands in for the progress display and keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def processes(count: int = 1, device: str = "cpu") -> Any:
    """The part of an Accelerator that is needed here."""
    return SimpleNamespace(device=torch.device(device), num_processes=count)


def open_batches(steps: range, *, num_workers: int = 0, device: str = "cpu", **part: int) -> TrainingBatches:
    source = SyntheticConfig(num_images=12).open("train", in_chans=3, image_size=SIZE, seed=0)
    order = KeyedOrder(len(source), seed=0)
    view = TrainView(image_size=SIZE, crop_scale=(0.5, 1.0), flip=True, lanczos=False, seed=0)
    return TrainingBatches(
        BatchBuilder(source, view, order),
        RequestSampler(order, Plan, steps, micro_batch_size=4, **part),
        processes(device=device),
        num_workers=num_workers,
        prefetch=2,
    )


def batch_with(*bad: BadImage) -> Batch:
    request = BatchRequest(0, (0,), (0,), SIZE, progress=0.0, weight=1.0, last=True)
    images = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    return Batch(images, torch.tensor([0]), torch.tensor([0]), 0, request, tuple(bad))


def bad(index: int) -> BadImage:
    return BadImage(index, f"photos/{index}.jpg", "it is truncated")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_step_has_exactly_its_own_micro_batches(num_workers: int) -> None:
    reader = open_batches(range(3, 6), num_workers=num_workers)
    for step in range(3, 6):
        found = list(reader.step())
        assert [len(batch.sample_ids) for batch in found] == [4, 4, 2]
        assert [batch.request.step for batch in found] == [step] * 3
        positions = [position for batch in found for position in batch.sample_ids.tolist()]
        assert positions == list(range(10 * step, 10 * step + 10))
        assert sum(batch.request.weight for batch in found) == pytest.approx(1.0)


def test_each_process_gets_its_own_part_of_every_step() -> None:
    readers = [open_batches(range(2), rank=rank, num_processes=3) for rank in range(3)]
    for step in range(2):
        positions = [p for reader in readers for batch in reader.step() for p in batch.sample_ids.tolist()]
        assert positions == list(range(10 * step, 10 * step + 10))


def test_batches_arrive_on_the_accelerators_device() -> None:
    for batch in open_batches(range(1), device="meta").step():
        assert {t.device.type for t in (batch.images, batch.labels, batch.sample_ids)} == {"meta"}


class SlowBuilder(Dataset[Batch]):
    """Takes a second for each batch, which ends its step."""

    def __init__(self) -> None:
        self.now = 0.0

    def __getitem__(self, request: BatchRequest) -> Batch:
        self.now += 1.0
        return batch_with()


def test_the_wait_is_that_of_the_current_step_and_of_data_only() -> None:
    builder = SlowBuilder()
    requests = RequestSampler(KeyedOrder(12, seed=0), Plan, range(2), micro_batch_size=4)
    reader = TrainingBatches(
        builder, requests, processes(), num_workers=0, prefetch=2, clock=lambda: builder.now
    )
    for _ in range(3):
        for _ in reader.step():
            builder.now += 100.0
        assert reader.wait_seconds == 1.0


def test_a_batch_is_copied_to_a_gpu_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = ["training"]

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = "copies" if isinstance(name, torch.device) else str(name)

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            now.append(self.name)

        def __exit__(self, *error: object) -> None:
            now.pop()

    def to(batch: Batch, device: torch.device) -> Batch:
        said.append(f"copy on {now[-1]}")
        return batch

    # There is no GPU here: only the order of what is asked of it can be seen.
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: said.append(f"kept for {stream.name}")
    )
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(
        batches, "load_batches", lambda builder, requests, **_: (builder[r] for r in requests)
    )
    reader = open_batches(range(1), device="cuda")
    assert len(list(reader.step())) == 3
    assert said == 3 * ["copy on copies", "training waits for copies", *3 * ["kept for training"]]


def test_a_bad_image_is_named_once_with_its_reason() -> None:
    state, notebook = TrainState(), Notebook()
    images = BadImages(state, num_images=1000, max_share=0.01, progress=notebook)  # type: ignore[arg-type]
    images.note(batch_with())
    assert notebook.lines == []
    for batch in (batch_with(bad(7), bad(3), bad(7)), batch_with(bad(3)), batch_with(bad(7), bad(5))):
        images.note(batch)
    assert len(notebook.lines) == 3
    for index, line in zip((7, 3, 5), notebook.lines, strict=True):
        assert f"'photos/{index}.jpg'" in line
        assert "it is truncated" in line
    assert state.bad_images == {7: "photos/7.jpg", 3: "photos/3.jpg", 5: "photos/5.jpg"}


def test_a_resumed_run_remembers_the_bad_images_it_has_named() -> None:
    state = TrainState.from_json(TrainState(bad_images={7: "photos/7.jpg"}).to_json())
    notebook = Notebook()
    images = BadImages(state, num_images=100, max_share=0.01, progress=notebook)  # type: ignore[arg-type]
    images.note(batch_with(bad(7)))
    assert notebook.lines == []
    with pytest.raises(UserError):
        images.note(batch_with(bad(8)))


@pytest.mark.parametrize(("max_share", "allowed"), [(0.02, 2), (0.0, 0), (0.025, 2)])
def test_the_run_ends_beyond_the_share_with_one_sentence(max_share: float, allowed: int) -> None:
    images = BadImages(
        TrainState(),
        num_images=100,
        max_share=max_share,
        progress=Notebook(),  # type: ignore[arg-type]
    )
    for index in range(allowed):
        images.note(batch_with(bad(index)))
        images.note(batch_with(bad(index)))
    with pytest.raises(UserError) as error:
        images.note(batch_with(bad(60)))
    message = str(error.value)
    assert "\n" not in message
    assert f"data.max_bad_share {max_share:g}" in message
    assert f"{allowed + 1} of 100 images" in message
    assert "'photos/60.jpg'" in message
    assert "it is truncated" in message


def test_a_share_of_one_never_ends_the_run() -> None:
    images = BadImages(TrainState(), num_images=3, max_share=1.0, progress=Notebook())  # type: ignore[arg-type]
    images.note(batch_with(*map(bad, range(3))))


def test_processes_bring_together_what_they_have_met() -> None:
    others = [{1: "photos/1.jpg"}, {1: "photos/1.jpg", 2: "photos/2.jpg"}]
    state = TrainState()
    images = BadImages(state, num_images=100, max_share=0.03, progress=Notebook())  # type: ignore[arg-type]
    images.note(batch_with(bad(4)))
    images.share(3, lambda mine: mine + others)
    assert state.bad_images == {i: f"photos/{i}.jpg" for i in (4, 1, 2)}
    others.append({50: "photos/50.jpg"})
    with pytest.raises(UserError, match=r"data\.max_bad_share"):
        images.share(4, lambda mine: mine + others)


def test_a_single_process_gathers_nothing() -> None:
    images = BadImages(TrainState(), num_images=100, max_share=0.0, progress=Notebook())  # type: ignore[arg-type]
    images.share(1, lambda mine: pytest.fail("it gathered"))
