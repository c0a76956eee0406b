"""Runs whose data stops coming: one line, exit code 1, and the same command ends with the same bits."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loader_scenes import Trapped, run_aside
from safetensors.torch import load_file

from etpp_ssl.cli import main
from etpp_ssl.config import RunFault
from etpp_ssl.data.loader import Batch, BatchBuilder
from etpp_ssl.data.replay import Replay
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.views import EvalView
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.batches import TrainingBatches
from etpp_ssl.train.launch import finetune, pretrain

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.skipif(sys.platform != "linux", reason="ends and watches processes by Linux's means"),
]

# The command imports its loop when it runs: here once, not in each process that is forked.
LOOPS = (pretrain, finetune)
SIZE = (8, 12)
GO_ON = "; the same command resumes from its last checkpoint, if it writes any"


def trap(monkeypatch: pytest.MonkeyPatch, index: int, act: Callable[[], Any], split: str = "train") -> None:
    """From now on something happens at one image of every synthetic data set."""
    original = SyntheticConfig.open

    def opened(config: SyntheticConfig, asked: str, **how: Any) -> ImageSource:
        source = original(config, asked, **how)
        return Trapped(source, index, act) if asked == split else source

    monkeypatch.setattr(SyntheticConfig, "open", opened)


def weights(folder: str) -> dict[str, torch.Tensor]:
    checkpoint = RunFolder(folder).newest(print)
    assert checkpoint is not None
    return load_file(checkpoint.path / "model.safetensors")


def assert_same(one: str, other: str) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_that_loses_a_worker_says_why_and_goes_on_to_the_same_bits(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["data.num_workers=2", "checkpoint.every_steps=2"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_recipe(*overrides).model_dump_json())

    def command(folder: str) -> Callable[[], object]:
        return lambda: main(["pretrain", str(recipe), f"output={tmp_path / folder}"])

    spared = tmp_path / "spared"
    # Some image of step 5.
    index = KeyedOrder(64, seed=3).index(52)

    def act() -> None:
        if not spared.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    trap(monkeypatch, index, act)
    ended = run_aside(command("faulty"))
    assert ended.code == 1, ended.stderr
    assert ended.left_over == []
    assert "Traceback" not in ended.stderr
    assert re.fullmatch(
        r"etpp: error: data: worker process 2 of 2 was killed by SIGKILL, probably out of memory \(lower "
        rf"[\w. ]+\), when it was reading image 'photos/{index:02d}\.jpg' \(sample 52\), at work on step 5, "
        r"samples 50, 51, 52, 53, 54, and 5 more \('photos/\d\d\.jpg'(, 'photos/\d\d\.jpg'){4}, and 5 "
        rf"more\)(, while step \d was waited for)?{GO_ON}",
        ended.last_line,
    )
    newest = RunFolder(str(tmp_path / "faulty")).newest(print)
    assert newest is not None
    assert newest.step in (2, 4)
    spared.touch()
    assert run_aside(command("faulty")).code == 0
    assert run_aside(command("whole")).code == 0
    assert_same(str(tmp_path / "faulty"), str(tmp_path / "whole"))


def test_a_classifiers_run_ends_when_its_loader_stalls_in_training_or_in_an_evaluation(
    tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    for split, num_workers, words in [
        ("train", 1, "for step 0, samples 0, 1, .*: worker process 1 of 1 is reading image"),
        ("eval", 0, "for evaluation batch 0, samples 0, 1, .*: the process is reading image"),
    ]:
        overrides = [f"data.num_workers={num_workers}", "data.stall_seconds=3", "evaluate.every_steps=1"]
        recipe.write_text(tiny_classifier(*overrides, f"output={tmp_path / split}").model_dump_json())
        with monkeypatch.context() as patch:
            index = KeyedOrder(64, seed=3).index(4) if split == "train" else 5
            trap(patch, index, lambda: time.sleep(1000), split)
            ended = run_aside(lambda: main(["finetune", str(recipe)]))
        assert ended.code == 1, ended.stderr
        assert ended.left_over == []
        assert "Traceback" not in ended.stderr
        assert re.fullmatch(
            rf"etpp: error: data: no batch within data\.stall_seconds 3 {words} "
            rf"'photos/{index:02d}\.jpg' \(sample \d\){GO_ON}",
            ended.last_line,
        )


@dataclass(frozen=True)
class Plan:
    """Steps of six images, four of them read and two replayed from up to three steps."""

    step: int
    first_step: int = 0
    bandwidth: tuple[int, int] = SIZE
    progress: float = 0.5
    buffer_steps: int = 3

    @property
    def samples(self) -> range:
        return range(4 * self.step, 4 * self.step + 4)

    @property
    def slots(self) -> range:
        return range(8 * self.step, 8 * self.step + 8)

    @property
    def oldest_step(self) -> int:
        return max(self.first_step, self.step - self.buffer_steps)


def open_batches(
    steps: range,
    *,
    num_workers: int = 0,
    act: Callable[[], Any] = int,
    stall_seconds: float | None = None,
    replayed: bool = False,
) -> TrainingBatches:
    """Micro-batches of three images; something happens at image 9."""
    inner = SyntheticConfig(num_images=40).open("train", in_chans=3, image_size=SIZE, seed=0)
    source = Trapped(inner, 9, act)
    order: Any = InOrder(40, seed=0)
    replay = None
    first = steps.start
    if replayed:
        replay = Replay(Plan, steps.start, seed=0, say=lambda text: None, micro_batch_size=3)
        first = replay.first_read
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    return TrainingBatches(
        BatchBuilder(source, EvalView(SIZE, 1.0), order),
        RequestSampler(order, Plan, range(first, steps.stop), micro_batch_size=3),
        accelerator,
        num_workers=num_workers,
        prefetch=2,
        stall_seconds=stall_seconds,
        replay=replay,
    )


class InOrder(KeyedOrder):
    """Sample g is image g."""

    def _draw(self, epoch: int) -> torch.Tensor:
        return torch.arange(self.num_images)


def test_the_limit_holds_while_a_replay_buffer_is_read_again() -> None:
    def never_ends() -> None:
        # In ticks, so that the loader's thread ends with the loader. CPython 3.11 runs in circles in whatever
        # is profiled while an exception waits for another thread.
        while True:
            time.sleep(0.01)

    with pytest.raises(RunFault, match=r"within data\.stall_seconds 0\.5 for step 2, .* 'photos/09\.jpg'"):
        open_batches(range(4, 6), act=never_ends, stall_seconds=0.5, replayed=True)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("replayed", [False, True])
def test_the_two_newest_steps_are_kept_as_they_were_trained_on(num_workers: int, replayed: bool) -> None:
    reader = open_batches(range(4), num_workers=num_workers, replayed=replayed)
    trained: dict[int, list[Batch]] = {}
    assert reader.kept == {}
    for step in range(4):
        for batch in reader.step():
            trained.setdefault(step, []).append(batch)
            # The micro-batch in work is there, and those before it.
            assert list(reader.kept) == [step - 1, step][step == 0 :]
            assert len(reader.kept[step]) == len(trained[step])
        for kept_step, batches in reader.kept.items():
            for kept, batch in zip(batches, trained[kept_step], strict=True):
                assert kept.request == batch.request
                assert kept.request.step == kept_step
                assert kept.sample_ids.tolist() == batch.sample_ids.tolist()
                # On a CPU nothing was copied.
                assert kept.images.data_ptr() == batch.images.data_ptr()
                assert not kept.images.is_shared()
                assert not kept.labels.is_shared()
    reader.close()
    assert list(reader.kept) == [2, 3]


def test_what_is_kept_holds_no_open_files() -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    reader = open_batches(range(4), num_workers=1)
    steps: Iterator[int] = iter(range(4))
    list(reader.step())
    before = files()
    for _ in zip(range(2), steps, strict=False):
        list(reader.step())
    assert sum(map(len, reader.kept.values())) == 4
    # Those that the workers have prepared for later come and go.
    assert files() <= before + 3
    reader.close()
