"""A run folder whose files say anything: the newest whole checkpoint is taken, or one sentence is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.curriculum.hours import TimePlan
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain

TINY = """
image_size: [16, 24]
budget_epochs: 1
batch_size: 10
precision: fp32
data: {name: synthetic, num_images: 64, num_workers: 0}
curriculum: {name: constant}
model: {name: vit, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2,
  decoder: {embed_dim: 8, depth: 1, num_heads: 2}}
log_every_steps: 2
checkpoint: {every_minutes: null, every_steps: 4}
"""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints, the newest of its last step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pretrain(Recipe.parse(TINY, [f"output={folder}"]))
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def newest(run: Path) -> Path:
    return RunFolder(run).checkpoints()[0].path


def change_state(run: Path, **changes: Any) -> None:
    file = newest(run) / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, **changes}))


def change_train_state(run: Path, **changes: Any) -> None:
    state = json.loads((newest(run) / "state.json").read_text())["state"]
    change_state(run, state={**state, **changes})


def write_state(run: Path, content: bytes) -> None:
    (newest(run) / "state.json").write_bytes(content)


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file: Path, content: bytes) -> None:
    """Of the same size, so that only the content tells."""
    size = file.stat().st_size
    file.write_bytes((content * (size // len(content) + 1))[:size])


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "state of nothing": lambda run: write_state(run, b""),
    "state cut short": lambda run: shorten(newest(run) / "state.json"),
    "state of zeros": lambda run: overwrite(newest(run) / "state.json", b"\0"),
    "state of no UTF-8": lambda run: write_state(run, b"\xff\xfe{}"),
    "state of a list": lambda run: write_state(run, b"[]"),
    "state of brackets": lambda run: write_state(run, b"[" * 100_000),
    "state of digits": lambda run: write_state(run, b'{"files": ' + b"9" * 10_000 + b"}"),
    "state that is gone": lambda run: (newest(run) / "state.json").unlink(),
    "state that is a pipe": lambda run: pipe(newest(run) / "state.json"),
    "state without files": lambda run: change_state(run, files={}),
    "files of a list": lambda run: change_state(run, files=[]),
    "files elsewhere": lambda run: change_state(run, files={"../../recipe.yaml": 5}),
    "files beyond": lambda run: change_state(
        run, files={"model.safetensors": 1, "optimizer.safetensors": 1, "../../recipe.yaml": 5}
    ),
    "sizes of text": lambda run: change_state(
        run, files={"model.safetensors": "1", "optimizer.safetensors": None}
    ),
    "another step": lambda run: change_train_state(run, step=3),
    "step of text": lambda run: change_train_state(run, step="x"),
    "step below zero": lambda run: change_train_state(run, step=-1),
    "huge step": lambda run: change_train_state(run, step=10**30),
    "loss of text": lambda run: change_train_state(run, loss_sum="x"),
    "bad images of numbers": lambda run: change_train_state(run, bad_images=[1, 2]),
    "bad images of a word": lambda run: change_train_state(run, bad_images="many"),
    "plan of nothing": lambda run: change_train_state(run, plan={"hours": 1}),
    "train state of null": lambda run: change_state(run, state=None),
    "train state of nothing": lambda run: change_state(run, state={}),
    "environment of a word": lambda run: change_state(run, environment="x"),
    "data of a number": lambda run: change_state(run, data=3),
    "model cut short": lambda run: shorten(newest(run) / "model.safetensors"),
    "model of zeros": lambda run: overwrite(newest(run) / "model.safetensors", b"\0"),
    "model of brackets": lambda run: overwrite(newest(run) / "model.safetensors", b"["),
    "model gone": lambda run: (newest(run) / "model.safetensors").unlink(),
    "optimizer of nothing": lambda run: (newest(run) / "optimizer.safetensors").write_bytes(b""),
    "optimizer of noise": lambda run: overwrite(newest(run) / "optimizer.safetensors", bytes(range(256))),
    "optimizer a folder": lambda run: (
        (newest(run) / "optimizer.safetensors").unlink(),
        (newest(run) / "optimizer.safetensors").mkdir(),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(name: str, run: Path) -> None:
    last = newest(run)
    before = RunFolder(run).checkpoints()[1]
    DAMAGE[name](run)
    said: list[str] = []
    found = RunFolder(run).newest(said.append)
    assert found is not None
    assert found.path == before.path
    (line,) = said
    assert line.startswith(f"checkpoint {last.name} is damaged (")
    assert "\n" not in line
    assert len(line) < 500


def test_if_all_are_damaged_nothing_is_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in RunFolder(run).checkpoints():
        shorten(checkpoint.path / "state.json")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", str(run)])
    assert stop.value.code == 2
    assert "none of the 2 checkpoints" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_goes_on_from_the_one_before(run: Path, whole_run: Path) -> None:
    DAMAGE["state of brackets"](run)
    done = pretrain(Recipe.load(run))
    assert done.state.step == RunFolder(whole_run).checkpoints()[0].step
    one, other = (load_file(newest(folder) / "model.safetensors") for folder in (run, whole_run))
    assert all(one[name].equal(other[name]) for name in other)


def test_keys_that_are_missing_are_a_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in RunFolder(run).checkpoints():
        file = checkpoint.path / "state.json"
        file.write_text(json.dumps({"files": json.loads(file.read_text())["files"]}))
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", str(run)])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("etpp: error: checkpoint ")
    assert line.endswith("cannot be resumed: state.json: environment is missing or damaged")


def test_tensors_of_another_model_are_a_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in RunFolder(run).checkpoints():
        model = checkpoint.path / "model.safetensors"
        tensors = load_file(model)
        del tensors["encoder.norm.bias"]
        save_file(tensors, model)
        state = json.loads((checkpoint.path / "state.json").read_text())
        state["files"]["model.safetensors"] = model.stat().st_size
        (checkpoint.path / "state.json").write_text(json.dumps(state))
    for command in (["pretrain", str(run)], ["embed", str(run)], ["export", str(run)]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert "encoder.norm.bias" in capsys.readouterr().err.splitlines()[-1]


METRICS: dict[str, bytes] = {
    "no rows": b'\xff\xfe\0\n[1, 2]\n3\nnull\n{}\n{"step": "x"}\n{"step": true}\n',
    "a deep row": b"[" * 100_000 + b"\n",
    "digits": b'{"step": ' + b"9" * 10_000 + b"}\n",
    "a row without end": b'{"step": 1, "a": "' + b"x" * 3_000_000,
    "a row cut short": b'{"step": 4, "lo',
}


def test_rows_of_metrics_that_are_none_are_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(run)
    rows = folder.metrics()
    assert rows
    whole = folder.metrics_file.read_bytes()
    for content in METRICS.values():
        folder.metrics_file.write_bytes(whole + content)
        assert folder.metrics() == rows
    folder.metrics_file.write_bytes(whole + b"\n".join(METRICS.values()))
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert stop.value.code == 0
    assert (tmp_path / "page.html").stat().st_size > 1000
    # Resuming cuts the file back, and what is no row goes.
    shutil.rmtree(newest(run))
    pretrain(Recipe.load(run))
    assert [row["step"] for row in folder.metrics()] == [row["step"] for row in rows]


PLANS: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "brackets": b"[" * 100_000,
    "binary": bytes(range(256)),
    "an empty object": b"{}",
}


def test_a_plan_that_is_none_is_a_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in PLANS.values():
        (run / "plan.json").write_bytes(content)
        with pytest.raises(UserError, match=r"plan\.json' is not a plan: ") as caught:
            RunFolder(run).plan()
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(run)])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def hours_plan() -> dict[str, Any]:
    segments = [
        {"stage": 0, "share": 0.5, "first_step": 0, "num_steps": 4, "spent": 0.0, "total": 8.0},
        {"stage": 0, "share": 0.5, "first_step": 4, "num_steps": 4, "spent": 4.0, "total": 8.0},
    ]
    stages = [{"bandwidth": [16, 24], "share": 1.0, "batch_size": 4, "replay": None}]
    return {"hours": 1.0, "stages": stages, "segments": segments, "pace": [0.1], "step": 0, "elapsed": 1.0,
            "reserve": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hours", "long"),
        ("stages", []),
        ("stages", [{"bandwidth": "wide"}]),
        ("segments", []),
        ("segments", [{**hours_plan()["segments"][0], "stage": 7}]),
        ("segments", [{**hours_plan()["segments"][0], "stage": -1}]),
        ("segments", [{**hours_plan()["segments"][0], "first_step": 3}]),
        ("segments", [{**hours_plan()["segments"][0], "num_steps": 0}]),
        ("segments", [{**hours_plan()["segments"][0], "total": 0.0}]),
        ("pace", []),
        ("pace", ["fast"]),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(key: str, value: Any) -> None:
    assert TimePlan.from_json(hours_plan()).segments[1].num_steps == 4
    with pytest.raises(ValueError, match=r"segment|stage|TimePlan"):
        TimePlan.from_json({**hours_plan(), key: value})


def test_a_hostile_recipe_of_a_run_is_not_obeyed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "executed"
    (run / "recipe.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {mark}']\n")
    commands = [["pretrain", str(run)], ["plan", str(run)], ["probe", str(run)], ["embed", str(run)],
                ["export", str(run)], ["reconstruct", str(run)], ["report", str(run)],
                ["evaluate", str(run)]]  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2, command
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "tags (" in line
    assert not mark.exists()
