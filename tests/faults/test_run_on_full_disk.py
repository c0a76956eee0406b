"""A run whose disk fails goes on or stops as its recipe says, and loses nothing that it says it has."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import SmallDisk, full_where, no_checkpoint_of, no_file_beyond, opens_for_writing
from forked_runs import ForkedRuns

from etpp_ssl.cli import main
from etpp_ssl.config import RunFault, UserError
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import prepare_run, pretrain
from etpp_ssl.train.log import MetricsFile
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.records import save
from etpp_ssl.train.run import Run

TIMINGS = {"seconds", "images_per_second", "data_wait_share"}


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def build(*overrides: str) -> Recipe:
        return tiny_recipe("budget_epochs=1", "checkpoint.every_steps=3", "checkpoint.keep=9", *overrides)

    return build


@contextmanager
def no_row_from(step: int, times: int) -> Iterator[None]:
    """Rows from this step on find the disk full so many times."""
    done, left = 0, iter(range(times))

    def count(run: Run) -> None:
        nonlocal done
        done = run.state.step

    def asked(event: str, arguments: tuple[Any, ...]) -> bool:
        is_row = opens_for_writing(event, arguments, "metrics.jsonl")
        return is_row and done >= step and next(left, None) is not None

    on_step_end.append(count)
    try:
        with full_where(asked):
            yield
    finally:
        on_step_end.remove(count)


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in TIMINGS} for row in folder.metrics()]


def assert_as_undisturbed(folder: RunFolder, recipe: Recipe, tmp_path: Path) -> None:
    undisturbed = pretrain(recipe.model_copy(update={"output": str(tmp_path / "undisturbed")})).folder
    a, b = undisturbed.checkpoints()[0], folder.checkpoints()[0]
    assert a.step == b.step
    for tensors in ("model", "optimizer"):
        x, y = getattr(a, tensors)(), getattr(b, tensors)()
        assert [key for key in x if not torch.equal(x[key], y[key])] == []
    assert rows_of(undisturbed) == rows_of(folder)


def steps_of(folder: RunFolder) -> list[int]:
    return sorted(checkpoint.step for checkpoint in folder.checkpoints())


def test_by_default_it_stops_with_code_1_and_one_line_and_goes_on_later(
    recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    recipe().save(file)
    with no_checkpoint_of(6), pytest.raises(SystemExit) as ended:
        main(["pretrain", str(file)])
    assert ended.value.code == 1
    told = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
    assert len(told) == 1
    assert told[0].startswith("etpp: error: checkpoint of step 6 could not be written to")
    assert "the newest one, of step 3, is intact" in told[0]
    folder = RunFolder(tmp_path / "run")
    assert steps_of(folder) == [3]
    pretrain(recipe())
    assert_as_undisturbed(folder, recipe(), tmp_path)


def test_it_goes_on_where_the_recipe_says_so(
    recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    goes_on = recipe("checkpoint.on_error=continue")
    with no_checkpoint_of(3, 9):
        pretrain(goes_on)
    told = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
    assert len(told) == 2
    assert "there is none before it; training continues, and the next checkpoint tries again" in told[0]
    assert "the newest one, of step 6, is intact; training continues" in told[1]
    folder = RunFolder(tmp_path / "run")
    assert steps_of(folder) == [6, 12, pretrain(goes_on).curriculum.num_steps]
    assert_as_undisturbed(folder, goes_on, tmp_path)


def test_without_its_last_checkpoint_no_run_is_finished(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    goes_on = recipe("checkpoint.on_error=continue")
    last = open_run(goes_on).curriculum.num_steps
    with (
        no_checkpoint_of(last),
        pytest.raises(RunFault, match=f"checkpoint of step {last} could not be written"),
    ):
        pretrain(goes_on)
    assert not open_run(goes_on).finished
    assert pretrain(goes_on).finished


@pytest.mark.parametrize("required", [False, True])
def test_a_checkpoint_that_is_required_ends_a_run_that_would_go_on(
    required: bool, recipe: Callable[..., Recipe]
) -> None:
    run = open_run(recipe("checkpoint.on_error=continue"))
    prepare_run(run)
    with no_checkpoint_of(0):
        if required:
            with pytest.raises(RunFault) as caught:
                save(run, required=True)
            assert caught.value.everywhere
        else:
            assert save(run) is False
    assert save(run, required=required) is True


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_all_processes_act_alike(
    policy: str, recipe: Callable[..., Recipe], forked_runs: ForkedRuns, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    chosen = recipe(f"checkpoint.on_error={policy}")
    chosen.save(file)
    main_one, other = forked_runs.run_together(file, num_processes=2, refused=[6])
    last = chosen.build_curriculum(64).num_steps
    assert steps_of(RunFolder(tmp_path / "run")) == ([3] if policy == "stop" else [3, 9, 12, last])
    words = "checkpoint of step 6 could not be written"
    if policy == "stop":
        # The text is the main process's, on both.
        assert (main_one.code, other.code) == (1, 1), main_one.output + other.output
        assert words in main_one.output
        assert words in other.output
        ended = forked_runs.run_together(file, num_processes=2)
        assert [one.code for one in ended] == [0, 0]
    else:
        assert (main_one.code, other.code) == (0, 0), main_one.output + other.output
        assert main_one.output.count(words) == 1
        assert words not in other.output


def test_a_folder_that_cannot_be_made_ends_all_processes(
    recipe: Callable[..., Recipe], forked_runs: ForkedRuns, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    recipe(f"output={file}/run").save(file)
    for ended in forked_runs.run_together(file, num_processes=2):
        assert ended.code == 2
        assert "cannot be written: Not a directory" in ended.output


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_disk_without_room_for_rows(
    policy: str, recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = recipe(f"checkpoint.on_error={policy}", "log_every_steps=1")
    folder = RunFolder(tmp_path / "run")
    sentence = (
        r"^checkpoint of step 6 could not be written, since rows could .*No space left on device; the newest"
    )
    # The rows of steps 5 and 6, and with them the checkpoint of step 6; the next row gets through.
    with no_row_from(5, times=3):
        if policy == "stop":
            with pytest.raises(RunFault, match=sentence):
                pretrain(chosen)
        else:
            pretrain(chosen)
    told = capfd.readouterr().err
    assert told.count("rows from step 5 on wait in memory") == 1
    assert told.count("those that waited (2) among them") == (policy == "continue")
    assert 6 not in steps_of(folder)
    pretrain(chosen)
    assert_as_undisturbed(folder, chosen, tmp_path)


def test_a_run_on_a_disk_that_is_too_small(
    small_disk: SmallDisk, recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(small_disk.folder / "run")
    chosen = recipe(f"output={folder.path}")
    with small_disk.full(left=152 << 10):
        with pytest.raises(
            UserError, match=r"has 156 kB free, but 10 more checkpoints take \d+ kB: make room"
        ):
            pretrain(chosen)
        assert not folder.path.exists()
        # Room for two checkpoints by their weights and moments, for one as they really are.
        with pytest.raises(RunFault, match="checkpoint of step 6 could not be written"):
            pretrain(recipe(f"output={folder.path}", "checkpoint.keep=1"))
        assert steps_of(folder) == [3]
        with pytest.raises(UserError, match=r"free, but 9 more checkpoints take 7\d\d kB"):
            pretrain(chosen)
    with small_disk.read_only(), pytest.raises(UserError, match=r"cannot be written.*Read-only"):
        pretrain(chosen)
    assert steps_of(folder) == [3]
    pretrain(chosen)
    assert_as_undisturbed(folder, chosen, tmp_path)
    assert "Traceback" not in capfd.readouterr().err


class Tracker:
    """What a metrics file needs of accelerate."""

    is_main_process = True

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_wait_in_memory_and_follow_in_order(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), []
    file = MetricsFile(folder, Tracker(), said.append)
    file.write({"step": 1, "loss": 0.5})
    size = folder.metrics_file.stat().st_size
    # A part of the row reaches the file and is cut off again.
    with no_file_beyond(size + 5):
        for step in (2, 3, 4):
            file.write({"step": step, "loss": 0.5})
        with pytest.raises(RunFault, match=r"rows could not be written to .*metrics.jsonl': File too large"):
            file.flush()
        assert folder.metrics_file.stat().st_size == size
    assert len(said) == 1
    assert "rows from step 2 on wait in memory" in said[0]
    file.write({"step": 5, "loss": 0.5})
    assert said[1:] == ["rows are written again, those that waited (3) among them"]
    file.flush()
    assert [row["step"] for row in folder.metrics()] == [1, 2, 3, 4, 5]
    assert folder.metrics_file.read_text().count("\n") == 5


def test_rows_that_wait_are_cut_back_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    file = MetricsFile(folder, Tracker(), lambda _: None)
    file.write({"step": 1})
    with no_file_beyond(3):
        for step in (2, 3):
            file.write({"step": step})
    file.cut_back(2)
    file.write({"step": 3, "again": True})
    assert folder.metrics() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\xff\x00", b"x" * 100_000])
def test_a_torn_line_never_joins_the_next_row(torn: bytes, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    file = MetricsFile(folder, Tracker(), pytest.fail)
    file.write({"step": 1})
    for cut in (False, True):
        with folder.metrics_file.open("ab") as opened:
            opened.write(torn)
        assert folder.metrics()[0] == {"step": 1}
        if cut:
            file.cut_back(2)
        else:
            file.write({"step": 2})
        assert folder.metrics_file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_tracker_on_a_full_disk_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    file = MetricsFile(RunFolder(tmp_path), Tracker(fails=True), said.append)
    for step in (1, 2, 3):
        file.write({"step": step})
    assert said == ["warning: the tracker takes no rows from step 1 on: No space left on device"]
    assert len(RunFolder(tmp_path).metrics()) == 3
