"""The GPU check on a CPU: its quick parts, bounds that can be broken, records, resuming and time limits."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from gpu import arithmetic, feeding, kernels, results, room, runs, speed, whole
from gpu.parts import PARTS, Cases, Failed, Figures, Part, Place, Skipped, bounded, same

FILES = {"arithmetic": arithmetic, "kernels": kernels, "runs": runs, "speed": speed, "room": room,
         "feeding": feeding, "whole": whole}  # fmt: skip
HERE = {"device": "a GPU", "driver": "1", "cores": 2, "versions": {"torch": "2"}, "commit": "c", "code": "1"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The CPU, with tiny shapes."""
    return Place("cpu", True, tmp_path)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "machine", lambda: HERE)


def test_every_part_is_a_function_of_its_file() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(callable(getattr(FILES[part.file], part.name)) for part in PARTS)


@pytest.mark.parametrize(
    "cases", [arithmetic.crop, arithmetic.hog, arithmetic.masks, arithmetic.gradients, kernels.attention]
)
def test_a_quick_part_is_within_its_bounds_on_a_cpu(cases: Any, place: Place) -> None:
    ran = 0
    for _, run in cases(place):
        try:
            figures = run()
        except Skipped:
            continue
        ran += 1
        assert "same bits" in figures or figures["error"] <= figures["bound"]
    assert ran >= 3


def test_a_crop_in_reduced_precision_is_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    crop = arithmetic.low_frequency_crop
    monkeypatch.setattr(
        arithmetic, "low_frequency_crop",
        lambda images, size: crop(images, size) if images.dtype == torch.float64
        else crop(images, size).bfloat16().float(),
    )  # fmt: skip
    for _, run in arithmetic.crop(place):
        with pytest.raises(Failed, match="is above 2e-06"):
            run()


def test_masks_that_follow_the_call_are_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        arithmetic.Masker,
        "__call__",
        lambda self, ids, *_: (torch.rand(len(ids), 4), torch.rand(len(ids), 4)),
    )
    patterns = {name: run for name, run in arithmetic.masks(place) if name.endswith("masks")}
    for run in patterns.values():
        with pytest.raises(Failed, match="differ"):
            run()


def test_nan_is_within_no_bound() -> None:
    with pytest.raises(Failed):
        bounded(float("nan"), 1.0)


def some_cases(place: Place) -> Cases:
    """One of each kind."""

    def fail() -> Figures:
        raise ValueError("of\n  its own")

    def skip() -> Figures:
        raise Skipped("needs CUDA")

    yield "good", lambda: {"rate": 2.5}
    yield "bits", lambda: same(False, "bits", rate=1)
    yield "fault", fail
    yield "no GPU", skip


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Part:
    """A part of these cases."""
    monkeypatch.setattr(arithmetic, "crop", some_cases)
    return PARTS[0]


def test_cases_are_recorded_one_by_one_and_not_run_again(part: Part, place: Place, tmp_path: Path) -> None:
    file, said = tmp_path / "deep" / "gpu.jsonl", []
    gpu_check.run_cases(part, place, file, said.append)
    assert results.cases_of(results.rows_of(file), "crop") == {
        "good": "ok", "bits": "failed", "fault": "failed", "no GPU": "skipped"
    }  # fmt: skip
    rows = results.rows_of(file)
    assert [row["what"] for row in rows] == ["", "bits differ", "ValueError: of its own", "needs CUDA"]
    assert rows[0]["figures"] == {"rate": 2.5}
    assert rows[1]["figures"] == {"rate": 1}
    assert rows[0]["command"] == "python tools/gpu_check.py --only crop"
    assert said[0].startswith("  ok       good: rate 2.5 (")
    gpu_check.run_cases(part, place, file, said.append)
    assert len(results.rows_of(file)) == 4
    results.append(file, results.row("crop", None, results.BEGUN))
    gpu_check.run_cases(part, place, file, said.append)
    assert len(results.rows_of(file)) == 9


def test_a_part_stops_between_cases_before_its_time_is_up(part: Part, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    assert not gpu_check.run_cases(part, place, file, print, time.monotonic() - 1)
    assert results.rows_of(file) == []
    assert gpu_check.run_cases(part, place, file, print, time.monotonic() + 60)
    assert len(results.rows_of(file)) == 4


def test_results_of_other_code_or_another_device_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [results.row("crop", None, "ok"), results.row("hog", None, "out of time")]
    assert results.finished_parts(rows) == {"crop"}
    for key in ("code", "device"):
        monkeypatch.setattr(results, "machine", lambda key=key: {**HERE, key: "another"})
        assert results.finished_parts(rows) == set()


@pytest.mark.parametrize(
    ("cases", "state"),
    [
        ("ok skipped", "ok"),
        ("skipped", "skipped"),
        ("ok failed", "failed"),
        ("ok crashed", "failed"),
        ("", "ok"),
    ],
)
def test_the_state_of_a_part_is_that_of_its_worst_case(cases: str, state: str) -> None:
    assert results.state_of(cases.split()) == state


def test_tables_show_the_newest_row_of_a_case_and_leave_out_broken_lines(tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    for rate in (1.5, 1234.5):
        results.append(file, results.row("steps", "B", "ok", figures={"rate": rate}))
    results.append(file, results.row("steps", "L", "failed", what="too slow", figures={"share": 0.25}))
    with file.open("a") as stream:
        stream.write('{"part": "ste')
    text = results.tables(results.rows_of(file))
    assert "## a GPU" in text
    assert "| B | 1,234 |  | ok |" in text
    assert "| L |  | 0.25 | failed: too slow |" in text


def test_a_process_and_its_children_end_with_the_time_limit(tmp_path: Path) -> None:
    script = (
        "import subprocess, time; subprocess.Popen(['sleep', '60']); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    start = time.monotonic()
    assert gpu_check._wait(process, 0.1) is None
    # The pipe ends with the last process that holds it.
    assert process.stdout.read() == b""
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("code", "state"), [("import time; time.sleep(60)", "out of time"), ("raise SystemExit(3)", "crashed")]
)
def test_a_part_that_is_cut_short_goes_on_behind_the_case_in_work(
    code: str, state: str, place: Place, part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "import sys; open(sys.argv[1] + '/case.txt', 'w').write('good'); "
    real = subprocess.Popen

    def script_instead(command: list[str], **others: Any) -> Any:
        folder = command[command.index("--folder") + 1]
        return real([sys.executable, "-c", note + code, folder], **others)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", script_instead)
    file = tmp_path / "gpu.jsonl"
    options = gpu_check.argparse.Namespace(results=file, again=False, smoke=True, original=None, images=None)
    assert gpu_check.run_part(part, options, 0.5) == state
    rows = results.rows_of(file)
    assert [(row["case"], row["state"]) for row in rows] == [("good", state), (None, state)]
    assert results.finished_parts(rows) == set()
    monkeypatch.undo()
    monkeypatch.setattr(results, "machine", lambda: HERE)
    monkeypatch.setattr(arithmetic, "crop", some_cases)
    said: list[str] = []
    gpu_check.run_cases(part, replace(place, folder=tmp_path), file, said.append)
    assert len(said) == 3
    assert "good" not in "".join(said)


def test_missing_requirements_are_named_as_pip_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.missing_wheels() == []
    found = gpu_check.importlib.metadata.version

    def version(name: str) -> str:
        if name in ("timm", "pydantic"):
            raise gpu_check.importlib.metadata.PackageNotFoundError
        return str(found(name))

    monkeypatch.setattr(gpu_check.importlib.metadata, "version", version)
    assert [name.split(">")[0] for name in gpu_check.missing_wheels()] == ["timm", "pydantic"]
