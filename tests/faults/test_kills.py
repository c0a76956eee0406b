"""SIGKILL at any moment: the folder is readable, the same command goes on, and to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import Ended, ForkedRuns
from moments import Bytes, Call, Line, Moment, keyed

from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder

TIMINGS = {"seconds", "images_per_second", "data_wait_share", "probe_seconds", "evaluation_seconds"}
RUNS = {
    "plain": ["data.num_workers=0"],
    "workers": ["data.num_workers=2"],
    "classifier": ["checkpoint.keep=1"],
    "hours": ["budget_epochs=null", f"budget_hours={40 / 3600}"],
}


@dataclass(frozen=True)
class Kill:
    """A run, and when it is killed."""

    run: str
    moment: Moment
    newest: int | None = None
    """The step of the newest checkpoint then."""
    before: Moment | None = None
    """An earlier kill of the same run."""


A_ROW = Bytes("metrics.jsonl", keyed("row", 300), nth=3)
KILLS = {
    "in the model": Kill("plain", Bytes("model.safetensors", keyed("model", 27000), nth=2), newest=4),
    "in the optimizer": Kill("workers", Bytes("optimizer.safetensors", keyed("optimizer", 54000))),
    "in the average": Kill("classifier", Bytes("ema.safetensors", keyed("average", 34000), nth=2), newest=4),
    "in the state": Kill("plain", Bytes("state.json", keyed("state", 500), nth=3), newest=8),
    "between flush and rename": Kill("workers", Call("replace", "take_place", nth=4), newest=4),
    "between rename and removal": Kill("plain", Call("replace", "take_place", nth=3, after=True), newest=12),
    "in the removal": Kill("classifier", Call("unlink", "remove_checkpoints", nth=2), newest=8),
    "while a checkpoint is replaced": Kill(
        "hours", Call("replace", "take_place", nth=2), newest=0, before=Bytes("metrics.jsonl", 50)
    ),
    "in the recipe": Kill("plain", Bytes("recipe.yaml", keyed("recipe", 1000))),
    "before the recipe is renamed": Kill("workers", Call("replace", "prepare_folder")),
    "after the recipe is renamed": Kill("plain", Call("replace", "prepare_folder", after=True)),
    "in the plan": Kill("hours", Bytes("plan.json", keyed("plan", 300))),
    "in a later plan": Kill("hours", Bytes("plan.json", keyed("later plan", 300), nth=2)),
    "in a row": Kill("workers", A_ROW, newest=4),
    "before rows are cut": Kill("plain", Call("truncate", "cut_back"), newest=4, before=A_ROW),
    "after rows are cut": Kill("plain", Call("truncate", "cut_back", after=True), newest=4, before=A_ROW),
}
ANYWHERE = ["plain", "workers", "classifier", "workers", "hours", "plain", "classifier", "workers", "plain"]
"""Runs to kill at a random line of the package."""


class Whole:
    """Runs that nothing stopped, each made once."""

    def __init__(self, forked_runs: ForkedRuns, folder: Path) -> None:
        self.forked_runs = forked_runs
        self.folder = folder
        self._lines: dict[str, int] = {}

    def of(self, name: str, recipe: Path) -> tuple[RunFolder, int]:
        """The folder of a run that was not killed, and the lines of the package that it executed."""
        if name not in self._lines:
            ended = start(self.forked_runs, name, recipe, self.folder / name, Line(-1))
            assert ended.code == 0, ended.output
            self._lines[name] = ended.lines
        return RunFolder(self.folder / name), self._lines[name]


@pytest.fixture(scope="module")
def whole(forked_runs: ForkedRuns, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(forked_runs, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def recipe_of(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        file = tmp_path / "recipe.yaml"
        (tiny_classifier() if name == "classifier" else tiny_recipe()).save(file)
        return file

    return write


def start(
    forked_runs: ForkedRuns, name: str, recipe: Path, output: Path, moment: Moment | None = None
) -> Ended:
    overrides = [f"output={output}", "budget_epochs=1", "checkpoint.every_steps=4", *RUNS[name]]
    return forked_runs.run(recipe, *overrides, moment=moment, clock=name == "hours")


def assert_readable(folder: RunFolder) -> None:
    """As a report or an export would read it at that moment, nothing in it is a part of something."""
    if folder.exists():
        folder.any_recipe()
    assert [checkpoint.fault() for checkpoint in folder.checkpoints()] == [None] * len(folder.checkpoints())
    steps = [row["step"] for row in folder.metrics()]
    assert steps == sorted(steps)
    folder.plan()


def assert_same(a: RunFolder, b: RunFolder) -> None:
    """Everything that a run leaves, to the bit, but for timings."""
    x, y = a.checkpoints()[0], b.checkpoints()[0]
    for tensors in ("model", "optimizer", "average"):
        expected, found = getattr(x, tensors)() or {}, getattr(y, tensors)() or {}
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert _untimed(x.state()["state"]) == _untimed(y.state()["state"])
    assert [_untimed(row) for row in a.metrics()] == [_untimed(row) for row in b.metrics()]
    assert b.metrics_file.read_bytes().count(b"\n") == len(b.metrics())
    assert a.plan() == b.plan()
    assert sorted(path.name for path in a.checkpoint_folder.iterdir()) == sorted(
        path.name for path in b.checkpoint_folder.iterdir()
    )


def _untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in {*TIMINGS, "elapsed"}}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_kill_at_a_delicate_moment(
    kill: Kill, forked_runs: ForkedRuns, whole: Whole, recipe_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(kill.run)
    expected, _ = whole.of(kill.run, recipe)
    folder = RunFolder(tmp_path / "run")
    for moment in filter(None, [kill.before, kill.moment]):
        ended = start(forked_runs, kill.run, recipe, folder.path, moment)
        assert ended.code < 0, ended.output
        assert_readable(folder)
    if kill.newest is not None:
        assert folder.checkpoints()[0].step == kill.newest
    ended = start(forked_runs, kill.run, recipe, folder.path)
    assert ended.code == 0, ended.output
    assert_same(expected, folder)


@pytest.mark.parametrize("number", range(len(ANYWHERE)))
def test_a_kill_anywhere(
    number: int, forked_runs: ForkedRuns, whole: Whole, recipe_of: Callable[[str], Path], tmp_path: Path
) -> None:
    name = ANYWHERE[number]
    recipe = recipe_of(name)
    expected, lines = whole.of(name, recipe)
    folder = RunFolder(tmp_path / "run")
    # A line later or earlier where data workers are slow; the last ones are not always there.
    moment = Line(keyed(f"anywhere {number}", int(0.95 * lines)))
    ended = start(forked_runs, name, recipe, folder.path, moment)
    assert ended.code < 0, ended.output
    assert_readable(folder)
    ended = start(forked_runs, name, recipe, folder.path)
    assert ended.code == 0, ended.output
    assert_same(expected, folder)
