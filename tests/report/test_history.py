"""What a report reads of runs in any state, and how their recipes differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from etpp_ssl.config import UserError
from etpp_ssl.recipe import Recipe
from etpp_ssl.report.history import History, distinct_names, probe_keys, read_histories
from etpp_ssl.report.tables import ABSENT, STAGE_TITLES, differing_keys, duration, stage_rows


def read(*folders: Path) -> list[History]:
    return read_histories(folders, print)


def test_a_finished_run_is_read_whole(run: Path) -> None:
    (history,) = read(run)
    assert history.finished is True
    assert history.curriculum is not None
    assert history.steps_done == history.curriculum.num_steps == history.rows[-1]["step"]
    assert [checkpoint.step for checkpoint in history.checkpoints] == [2, 4, 6]
    assert probe_keys(history.probes) == ["heldout_loss"]
    assert {"torch", "device", "threads"} <= set(history.environment)
    assert history.notes == []


def test_stage_rows_add_up_to_the_run(run: Path) -> None:
    (history,) = read(run)
    assert history.curriculum is not None
    rows = [dict(zip(STAGE_TITLES, row, strict=True)) for row in stage_rows(history)]
    assert [row["bandwidth"] for row in rows] == ["8x12", "12x16", "16x24"]
    assert [int(row["steps"]) for row in rows] == [stage.num_steps for stage in history.curriculum.stages]
    assert sum(int(row["images"]) for row in rows) == history.curriculum.num_samples
    assert rows[0]["first loss"] == f"{history.rows[0]['loss']:.4f}"
    assert rows[-1]["last loss"] == f"{history.rows[-1]['loss']:.4f}"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (59, "59 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_in_progress_says_what_is_not_there_yet(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    (run / "checkpoints").rename(run / "elsewhere")
    (history,) = read(run)
    assert len(history.rows) == 1
    assert history.finished is False
    assert history.notes == ["there is no checkpoint yet"]
    (run / "metrics.jsonl").unlink()
    (history,) = read(run)
    assert (history.rows, history.steps_done) == ([], 0)
    assert history.notes == ["nothing is logged yet", "there is no checkpoint yet"]


def test_odd_lines_and_damaged_checkpoints_are_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('7\n{"step": "x", "loss": 1}\n{"step": 9, "loss": NaN}\n{"step": 9}\n[]\n')
    (run / "report").mkdir()
    (run / "report" / "probes.jsonl").write_text(
        '{"step": 6, "knn_top1": 50.0, "protocol": {}}\n'
        '{"init": "x", "knn_top1": 9.0}\n{"knn_top1": 8.0}\n{"st'
    )
    (run / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    (history,) = read(run)
    assert history.rows[-1]["step"] == 6
    assert [row["knn_top1"] for row in history.later_probes] == [50.0, 9.0]
    assert [checkpoint.step for checkpoint in history.checkpoints] == [2, 6]
    assert "step-00000004 is damaged" in history.notes[0]


def test_the_number_of_images_comes_from_the_log_where_the_data_is_elsewhere(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    data = text[text.index("data:\n") : text.index("curriculum:\n")]
    (run / "recipe.yaml").write_text(text.replace(data, "data: {name: folder, root: /not/here}\n"))
    (history,) = read(run)
    assert history.finished is True
    (run / "metrics.jsonl").unlink()
    (history,) = read(run)
    assert history.curriculum is None
    assert history.finished is None
    assert "the stages are not known: data.root '/not/here' does not exist" in history.notes


def test_a_run_given_twice_is_read_once_and_names_differ(run: Path, tmp_path: Path) -> None:
    assert len(read(run, tmp_path / "." / "run")) == 1
    folders = [Path("/x/a/run"), Path("/y/a/run"), Path("/x/b/run"), Path("/x/other")]
    assert distinct_names(folders) == ["x/a/run", "y/a/run", "b/run", "other"]
    assert distinct_names([Path("/a/a"), Path("/a")]) == ["a/a", "/a"]


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe\.yaml"):
        read(run, tmp_path)
    with pytest.raises(UserError, match="at least one run folder"):
        read()


def test_differences_name_every_key_that_is_not_the_same(tiny_recipe: Callable[..., Recipe]) -> None:
    recipes = [
        tiny_recipe("output=a", "probe=knn"),
        tiny_recipe("output=b", "curriculum=constant", "optim.base_lr=1e-3", "data.num_workers=2"),
        tiny_recipe("output=c", "model.decoder.depth=2"),
    ]
    found = {d.key: d for d in differing_keys(recipes)}
    assert found["optim.base_lr"].values == ["0.02", "0.001", "0.02"]
    assert found["model.decoder.depth"].values == ["1", "1", "2"]
    assert found["curriculum.name"].values == ["efficienttrain", "constant", "efficienttrain"]
    assert json.loads(found["curriculum.stages"].values[0])[0] == {"bandwidth": [8, 12], "share": 0.2}
    assert found["curriculum.stages"].values[1] == ABSENT
    assert found["probe.k"].values == ["20", ABSENT, ABSENT]
    assert {key for key, d in found.items() if d.may_change} >= {"data.num_workers", "probe.name", "probe.k"}
    assert not found["optim.base_lr"].may_change
    # Unset in one component and absent from the others: nothing to tell.
    assert not {"output", "probe.num_train", "seed"} & set(found)
    order = [d.may_change for d in differing_keys(recipes)]
    assert order == sorted(order)
    assert differing_keys(recipes[:1] * 2) == []
