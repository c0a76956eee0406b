"""One contract for all that write files: on a failing disk one sentence, and nothing that is half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import SmallDisk
from PIL import Image
from torch import Tensor

import etpp_ssl.report.page as page_module
from etpp_ssl.commands.prepare import PrepareConfig, prepare
from etpp_ssl.commands.probe import probe_run
from etpp_ssl.config import UserError
from etpp_ssl.evaluation.features import Embeddings, Features, write_embeddings
from etpp_ssl.evaluation.training import ProbeState
from etpp_ssl.export import encoder_only, official, timm
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.recipe_base import RunRecipe
from etpp_ssl.report.confusion import write_evaluation
from etpp_ssl.report.grid import write_grids
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.checkpoint import save_checkpoint

SQUARE = ["image_size=16", "curriculum=constant"]


@dataclass(frozen=True)
class Result:
    confusion: Tensor
    num_images: int = 6
    top1: float = 83.3
    macro_top1: float = 87.5
    recall: tuple[float | None, ...] = (75.0, 100.0)

    def numbers(self) -> dict[str, float | int | None]:
        return {"top1": self.top1}


@dataclass(frozen=True)
class Runs:
    """Folders of runs that have a checkpoint."""

    encoder: Path
    classifier: Path


def _quiet(text: str) -> None:
    """What a writer says is of no interest here."""


def _embeddings(runs: Runs, out: Path) -> None:
    rows = Features(torch.randn(300, 20), torch.zeros(300, dtype=torch.long), torch.arange(300))
    names = [f"{number}.png" for number in range(300)]
    write_embeddings(out / "train.safetensors", Embeddings(rows, names, ["oak"], {}))


def _probe_state(runs: Runs, out: Path) -> None:
    head = torch.nn.Linear(20, 20)
    ProbeState(out / "state.safetensors", head, torch.optim.SGD(head.parameters(), lr=0.1)).save(3)


def _evaluation(runs: Runs, out: Path) -> None:
    write_evaluation(out / "eval", Result(torch.tensor([[3, 1], [0, 2]])), ["oak", "yew"], {}, {})


def _recipe(runs: Runs, out: Path) -> None:
    RunFolder(runs.encoder).recipe().save(out / "recipe.yaml")


WRITERS: dict[str, Callable[[Runs, Path], Any]] = {
    "export to timm": lambda runs, out: timm.export(runs.encoder, out, say=_quiet),
    "export to mae": lambda runs, out: official.export_mae(runs.encoder, out, say=_quiet),
    "export to pixio": lambda runs, out: encoder_only.export(
        encoder_only.PIXIO, runs.encoder, out, say=_quiet
    ),
    "export to transformers": lambda runs, out: official.export_transformers(runs.encoder, out, say=_quiet),
    "export of a classifier": lambda runs, out: timm.export(runs.classifier, out, say=_quiet),
    "report": lambda runs, out: page_module.write_report([runs.encoder], out / "page.html", say=_quiet),
    "reconstructions": lambda runs, out: write_grids(runs.encoder, out=out, count=1, say=_quiet),
    "evaluation": _evaluation,
    "embeddings": _embeddings,
    "state of a probe": _probe_state,
    "recipe": _recipe,
}


@pytest.fixture
def runs(
    tiny_recipe: Callable[..., Recipe],
    tiny_classifier: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Runs:
    def make(recipe: RunRecipe, model: torch.nn.Module) -> Path:
        folder = RunFolder(recipe.output)
        recipe.save(folder.recipe_file)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        save_checkpoint(folder, 5, model, optimizer, {"classes": [str(n) for n in range(10)]}, keep=1)
        return folder.path

    # Its figures take seconds, and are not what is written.
    monkeypatch.setattr(page_module, "page", lambda *_: "page" * 9000)
    encoder = tiny_recipe(f"output={tmp_path / 'encoder'}", *SQUARE)
    classifier = tiny_classifier(f"output={tmp_path / 'classifier'}", *SQUARE)
    return Runs(make(encoder, encoder.build_model()), make(classifier, classifier.build_model(10)))


@contextmanager
def no_rename() -> Any:
    """The last moment at which a disk can fail."""

    def refuse(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "filler"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


Fault = Callable[[], AbstractContextManager[None]]


def check(write: Callable[[Path], Any], folder: Path, faults: dict[str, Fault]) -> None:
    """Over an earlier version and without one: the writer fails in one sentence, and leaves no file."""
    write(folder / "old")
    before = contents(folder)
    assert before
    for words, fault in faults.items():
        for out in (folder / "old", folder / "new"):
            with fault(), pytest.raises(UserError, match="cannot be written") as caught:
                write(out)
            assert "\n" not in str(caught.value)
            assert words in str(caught.value)
            assert contents(folder) == before
    write(folder / "old")
    write(folder / "new")
    assert len(contents(folder)) == 2 * len(before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_on_a_failing_disk(name: str, runs: Runs, small_disk: SmallDisk) -> None:
    # torch.save does not pass on why the disk took no more, and its error holds the file open.
    full = "the disk did not take all of it" if name == "export to mae" else "No space left on device"
    faults: dict[str, Fault] = {"Read-only file system": small_disk.read_only, full: small_disk.full}
    check(lambda out: WRITERS[name](runs, out), small_disk.folder, faults)


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_whose_last_rename_fails(name: str, runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    check(lambda out: WRITERS[name](runs, out), tmp_path / "disk", {"Input/output error": no_rename})


def test_a_probe_that_cannot_be_recorded_has_its_result(runs: Runs, small_disk: SmallDisk) -> None:
    said: list[str] = []
    run = shutil.copytree(runs.encoder, small_disk.folder / "run")
    recipe = Recipe.load(run, ["probe=knn"])
    with small_disk.full():
        numbers = probe_run(recipe, str(run), said.append)
    assert "knn_top1" in numbers
    told = [text for text in said if "No space left" in text]
    assert len(told) == 1
    assert "probes.jsonl' cannot be written" in told[0]
    file = run / "report" / "probes.jsonl"
    file.write_text('{"step": 5, "knn')
    assert probe_run(recipe, str(run), said.append) == numbers
    assert [json.loads(line)["knn_top1"] for line in file.read_text().splitlines()] == [numbers["knn_top1"]]


def test_shards_on_a_full_disk_go_on_from_what_is_there(small_disk: SmallDisk, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(100):
        noise = np.random.default_rng(number).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{number:02d}.png")

    def convert(
        out: Path, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, bytes]:
        prepare(images, out, PrepareConfig(shard_mb=1), progress)
        return contents(out)

    expected = convert(tmp_path / "shards")
    assert len([name for name in expected if name.endswith(".tar")]) == 2
    shards = small_disk.folder / "shards"
    sentence = r"cannot be written: No space left on device; the same command resumes from what is there$"
    with ExitStack() as someone_else:

        def fill(done: int, total: int) -> None:
            # After the room on the disk was looked at.
            if done == 1:
                someone_else.enter_context(small_disk.full(left=3 << 19))

        with pytest.raises(UserError, match=sentence):
            convert(shards, fill)
    assert not shards.exists()
    first = small_disk.folder / "shards.partial" / "shard-000000.tar"
    made = first.stat().st_mtime_ns
    assert convert(shards) == expected
    assert (shards / first.name).stat().st_mtime_ns == made
