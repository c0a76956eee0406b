"""A disk that does not take a checkpoint leaves the older ones as they are, and says so in one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import SmallDisk, no_file_beyond

import etpp_ssl.train.checkpoint as checkpoint_module
from etpp_ssl.config import RunFault
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.checkpoint import save_checkpoint

FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")


class Job:
    """Saves one model again and again."""

    def __init__(self, folder: Path, width: int = 100) -> None:
        torch.manual_seed(0)
        self.folder = RunFolder(folder)
        self.model = torch.nn.Linear(width, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.randn(2, width)).sum().backward()
        self.optimizer.step()

    def save(self, step: int, keep: int = 2) -> None:
        average = self.model.state_dict()
        save_checkpoint(self.folder, step, self.model, self.optimizer, {}, keep=keep, average=average)

    def contents(self) -> dict[str, bytes]:
        """All that is there, hidden or not."""
        place = self.folder.checkpoint_folder
        return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*") if f.is_file()}

    def fails(self, step: int, words: str) -> None:
        """It fails in one sentence, and nothing is lost, and nothing left."""
        before, folders = self.contents(), sorted(self.folder.checkpoint_folder.iterdir())
        with pytest.raises(RunFault, match=rf"^checkpoint of step {step} could not be written to") as caught:
            self.save(step)
        text = str(caught.value)
        assert words in text
        assert "\n" not in text
        assert "the newest one, of step" in text
        assert "is intact" in text
        assert self.contents() == before
        assert sorted(self.folder.checkpoint_folder.iterdir()) == folders


def failing(
    real: Callable[..., Any], number: int, when: Callable[..., bool], part: bytes | None = None
) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        if not when(*args):
            return real(*args, **kwargs)
        if part is not None:
            Path(args[-1]).write_bytes(part)
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize(
    "place", [*FILES, "mkdir", "fsync of a file", "fsync of the folder", "rename", "rename with one there"]
)
def test_an_error_at_any_place(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    job.save(1)
    job.save(2)
    step = 2 if place == "rename with one there" else 3
    with monkeypatch.context() as patch:
        if place.endswith(".safetensors"):
            fail = failing(
                checkpoint_module.save_tensors, number, lambda _, file: file.name == place, b"part"
            )
            patch.setattr(checkpoint_module, "save_tensors", fail)
        elif place == "state.json":
            patch.setattr(Path, "write_text", failing(Path.write_text, number, lambda *_: True))
        elif place == "mkdir":
            patch.setattr(os, "mkdir", failing(os.mkdir, number, lambda path, *_: ".writing" in str(path)))
        elif place.startswith("fsync"):
            calls = iter(range(100))
            nth = 2 if place == "fsync of a file" else len(FILES)
            patch.setattr(os, "fsync", failing(os.fsync, number, lambda _: next(calls) == nth))
        else:
            patch.setattr(os, "replace", failing(os.replace, number, lambda path, _: ".writing" in str(path)))
        job.fails(step, os.strerror(number))
    job.save(step)
    assert job.folder.checkpoints()[0].step == step
    assert job.folder.checkpoints()[0].fault() is None


def test_an_error_after_the_rename_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    job.save(1, keep=1)
    calls = iter(range(100))
    fail = failing(os.fsync, errno.EIO, lambda _: next(calls) == len(FILES) + 1)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFault, match="Input/output error"):
        job.save(2, keep=1)
    # Nobody knows whether the new name is on the disk, so the old checkpoint stays.
    assert [(c.step, c.fault()) for c in job.folder.checkpoints()] == [(2, None), (1, None)]


def test_a_disk_that_fills_up_in_each_file(small_disk: SmallDisk) -> None:
    job = Job(small_disk.folder / "run", width=200)
    job.save(1)
    sizes = [(job.folder.checkpoints()[0].path / name).stat().st_size for name in FILES]
    room = sum(-(-size // 4096) * 4096 for size in sizes)
    for number in range(len(FILES)):
        pages = sum(-(-size // 4096) * 4096 for size in sizes[:number])
        with small_disk.full(left=pages):
            job.fails(2, "No space left on device")
            with pytest.raises(RunFault, match=r"a checkpoint takes \d+ kB, .* (bytes|kB) are free"):
                job.save(2)
    with small_disk.full(left=room):
        job.save(2)


def test_a_disk_that_is_read_only(small_disk: SmallDisk) -> None:
    job = Job(small_disk.folder / "run")
    job.save(1)
    with small_disk.read_only():
        job.fails(2, "Read-only file system")
    job.save(2)


@pytest.mark.parametrize("size", [0, 500, 50_000])
def test_files_that_are_cut_short(size: int, tmp_path: Path) -> None:
    # The model has 40 kB, the optimizer's two moments 80 kB.
    job = Job(tmp_path)
    job.save(1)
    with no_file_beyond(size):
        job.fails(2, "File too large")
    job.save(2)


def test_old_checkpoints_go_once_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    job.save(1)
    job.save(2)
    real, flushed = os.fsync, []

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert {checkpoint.step for checkpoint in job.folder.checkpoints()} >= {1, 2}
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    job.save(3)
    place = job.folder.checkpoint_folder
    aside = place / ".writing-step-00000003"
    assert sorted(flushed[: len(FILES)]) == sorted(str(aside / name) for name in FILES)
    assert flushed[len(FILES) :] == [str(aside), str(place)]
    assert [checkpoint.step for checkpoint in job.folder.checkpoints()] == [3, 2]
