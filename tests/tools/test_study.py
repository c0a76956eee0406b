"""The study: what is run, what is done, what a run leaves, what the table says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from study_curriculum import run_study
from study_file import Study, load_study, recorded
from study_report import draw, looks_of, markdown, minutes_of_common_days, with_tables
from tiny_runs import TINY, TINY_CLASSIFIER

from etpp_ssl.recipe import load_any

STUDIES = sorted((Path(__file__).parents[2] / "tools" / "studies").glob("*.yaml"))

TEXT = """
recipe: recipes/quickstart.yaml
baseline: constant
budget_epochs: 4
common: [precision=bf16]
finetune_common: []
arms:
  constant: {overrides: [curriculum=constant], seeds: {"1": [0, 1], "1/1.5": [0]}}
  other: {overrides: [], seeds: {"1": [0, 1, 2]}}
evaluate:
  knn: {numbers: {knn: knn_top1}, probe: [probe=knn]}
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    file = tmp_path / "tiny.yaml"
    file.write_text(TEXT)
    return load_study(file, ["data.num_workers=0"])


def test_every_arm_share_and_seed_is_one_run_under_its_own_key(study: Study) -> None:
    assert [entry.key for entry in study.entries] == [
        "constant-1-seed0",
        "constant-1over1.5-seed0",
        "other-1-seed0",
        "constant-1-seed1",
        "other-1-seed1",
        "other-1-seed2",
    ]
    assert study.entries[1].overrides == (
        "precision=bf16",
        "curriculum=constant",
        "data.num_workers=0",
        "budget_epochs=2.66667",
        "seed=0",
    )


def test_evaluations_are_all_or_those_of_the_arm_or_of_its_share(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    text = TEXT + "  linear: {numbers: {linear: linear_cached_top1}, probe: [probe=linear_cached]}\n"
    text = text.replace('"1/1.5": [0]}}', '"1/1.5": [0]}, evaluate: {"1": [knn, linear], "1/1.5": [linear]}}')
    file.write_text(text)
    found = {entry.key: entry.evaluations for entry in load_study(file).entries}
    assert found["constant-1-seed1"] == found["other-1-seed2"] == ("knn", "linear")
    assert found["constant-1over1.5-seed0"] == ("linear",)
    file.write_text(text.replace("overrides: [],", "overrides: [], evaluate: [knn],"))
    assert {entry.evaluations for entry in load_study(file).entries if entry.arm == "other"} == {("knn",)}


def test_a_mistake_in_a_study_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    for right, wrong, told in (
        ("baseline: constant", "base: constant", r"baseline\n[\s\S]*base\n"),
        ("baseline: constant", "baseline: absent", "'absent' is no arm"),
        ("overrides: [],", "overrides: [], orignal: true,", "arms.other.orignal\n"),
        ("overrides: [],", "overrides: [], control: absent,", "control 'absent' of arm 'other' is no arm"),
        ("overrides: [],", "overrides: [], evaluate: [linear],", r"'other' has unknown .*\['linear'\]"),
        ("overrides: [],", 'overrides: [], evaluate: {"1/2": [knn]},', r"\['1/2'\], but seeds has"),
        ("overrides: [],", 'overrides: [], evaluate: {"1": [linear]},', r"'other' has unknown .*'linear'"),
        ("probe: [probe=knn]", "", "either probe or finetune"),
        ("budget_epochs: 4", "budget_epochs: 0", "greater than 0"),
    ):
        assert right in TEXT
        file.write_text(TEXT.replace(right, wrong))
        with pytest.raises(ValueError, match=told):
            load_study(file)


def test_a_result_that_was_cut_short_is_not_recorded(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert recorded(file) == []
    file.write_text('{"key": "a"}\n{"key": "b", "numb')
    assert [row["key"] for row in recorded(file)] == ["a"]


def test_a_run_is_done_when_its_newest_result_has_every_number_that_is_asked_for(study: Study) -> None:
    entries = [entry.key for entry in study.entries]
    assert study.done([]) == set()
    rows = [result(key, "", "1", 0, 40.0) for key in [*entries[:2], "of an arm that is gone"]]
    assert study.done(rows) == set(entries[:2])
    lacks = {**rows[0], "numbers": {"linear": 1.0}}
    assert study.done([*rows, lacks]) == {entries[1]}
    assert study.done([lacks, *rows]) == set(entries[:2])


def result(key: str, arm: str, share: str, seed: int, knn: float) -> dict[str, object]:
    return {
        "key": key, "arm": arm, "share": share, "seed": seed, "images_seen": 1000, "flops": 2e12,
        "seconds": 90.0, "cpu_seconds": 120.0, "date": "2026-01-01", "numbers": {"knn": knn},
    }  # fmt: skip


def test_differences_are_paired_by_seed_and_the_last_result_of_a_seed_counts(study: Study) -> None:
    rows = [
        result("constant-1-seed0", "constant", "1", 0, 99.0),
        result("constant-1-seed0", "constant", "1", 0, 40.0),
        result("constant-1-seed1", "constant", "1", 1, 44.0),
        result("other-1-seed1", "other", "1", 1, 45.5),
        result("other-1-seed2", "other", "1", 2, 80.0),
        result("constant-1over1.5-seed0", "constant", "1/1.5", 0, 30.0),
    ]
    lines = markdown(study, rows).splitlines()
    assert lines[0].endswith("| training (min) | CPU (min) | knn |")
    assert lines[2:] == [
        "| constant | 1 | 2 | 1,000 | 2 | 1.5 ± 0.0 | 2.0 ± 0.0 | 42.00 ± 2.83 |",
        "| other | 1 | 2 | 1,000 | 2 | 1.5 ± 0.0 | 2.0 ± 0.0 | 62.75 ± 24.40 (+1.50) |",
        "",
        "<details markdown>",
        "<summary>What was run with one seed (rows: 1)</summary>",
        "",
        *lines[:2],
        "| constant | 1/1.5 | 1 | 1,000 | 2 | 1.5 | 2.0 | 30.00 |",
        "",
        "</details>",
    ]
    assert "details" not in markdown(study, rows[-1:])
    figure = draw(study, rows)
    assert len(figure.axes) == 2
    for panel in figure.axes:
        # Deviations of `constant` at both its budgets, then of `other` at its only one.
        bars = [segment for bar in panel.containers for segment in bar.lines[2][0].get_segments()]
        spreads = [float(np.ptp(bar[:, 1])) / 2 for bar in bars if len(bar)]
        assert spreads == pytest.approx([2.83, 24.40], abs=0.01)


def test_an_arm_may_have_a_control_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    text = TEXT.replace("overrides: [],", "overrides: [], control: third,")
    file.write_text(text.replace("evaluate:", '  third: {overrides: [], seeds: {"1": [0]}}\nevaluate:'))
    arms = {"constant": 40.0, "other": 45.0, "third": 44.0}
    rows = [result(f"{arm}-1-seed0", arm, "1", 0, knn) for arm, knn in arms.items()]
    shown = [line.split(" | ")[-1] for line in markdown(load_study(file), rows).splitlines()[2:]]
    assert shown == ["40.00 |", "45.00 (+1.00) |", "44.00 (+4.00) |"]


def test_the_cheapest_runs_as_good_as_the_original_and_as_many_are_named(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    original = '  theirs: {overrides: [], original: true, seeds: {"1": [0, 1]}}\nevaluate:'
    file.write_text(TEXT.replace("evaluate:", original))
    study = load_study(file)
    rows = [
        result("constant-1-seed0", "constant", "1", 0, 41.0),
        {**result("constant-1over1.5-seed0", "constant", "1/1.5", 0, 40.0), "seconds": 60.0},
        {**result("other-1-seed0", "other", "1", 0, 39.9), "seconds": 30.0},
    ]
    goal = {**result("theirs-1-seed0", "theirs", "1", 0, 40.0), "seconds": 240.0}

    def last_line(*others: dict[str, object]) -> str:
        return markdown(study, [*rows, *others]).splitlines()[-1]

    assert last_line(goal) == "| theirs at 1 | knn 40.00 | constant at 1/1.5 | 40.00 | 4.0 | 1.0 | 4.00 |"
    # On another day everything took thrice as long.
    slow = {**result("constant-1-seed1", "constant", "1", 1, 41.0), "seconds": 270.0, "date": "2026-01-02"}
    again = {**goal, "key": "theirs-1-seed1", "seed": 1, "seconds": 720.0, "date": "2026-01-02"}
    line = "| theirs at 1 | knn 40.00 | constant at 1 | 41.00 | 8.0 | 3.0 | 2.67 |"
    assert last_line(slow, goal, again) == line
    # Days weigh the same on both sides: one more run of the slow day changes nothing.
    third = {**again, "key": "theirs-1-seed2", "seed": 2, "numbers": {"knn": 40.0}}
    assert minutes_of_common_days([goal, again, third], [rows[0], slow]) == (8.0, 3.0)
    for theirs in (
        [{**goal, "numbers": {"knn": 50.0}}],
        [{**goal, "date": "2026-01-02"}],
        [{**goal, "numbers": {"other": 40.0}}, {**again, "numbers": {"knn": 99.0}}],
        # Of two seeds, with nothing of two seeds on our side.
        [goal, again],
    ):
        assert last_line(*theirs).endswith("| no arm | | | | |")
    assert len(draw(study, [*rows, goal]).axes) == 2


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_runs_of_every_study_are_recipes(file: Path) -> None:
    found = load_study(file)
    assert set(found.controls.values()) <= {entry.arm for entry in found.entries}
    assert len({entry.key for entry in found.entries}) == len(found.entries)
    for entry in found.entries:
        load_any(found.recipe, entry.overrides)
    for evaluation in found.evaluations.values():
        if evaluation.finetune is None:
            load_any(found.recipe, evaluation.probe or ())
        else:
            load_any(evaluation.finetune, [*found.finetune_common, *evaluation.overrides])
    for line in found.results.read_text().splitlines() if found.results.is_file() else ():
        assert json.loads(line)["key"] in {entry.key for entry in found.entries}


def test_a_run_is_trained_evaluated_and_recorded_and_a_failed_one_is_told(
    tmp_path: Path,
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("64", "40"))
    (tmp_path / "classifier.yaml").write_text(
        TINY_CLASSIFIER.replace("depth: 2", "depth: 1").replace("augment: {ramp: true}", "")
    )
    file = tmp_path / "study.yaml"
    file.write_text(f"""
recipe: {tmp_path / "tiny.yaml"}
baseline: constant
budget_epochs: 1
common: []
finetune_common: []
arms:
  constant: {{overrides: [curriculum=constant], seeds: {{"1/1.5": [4]}}}}
  broken: {{overrides: [init=nowhere], seeds: {{"1": [0]}}, evaluate: [probes]}}
evaluate:
  probes:
    numbers: {{knn: knn_top1, linear: linear_cached_top1}}
    probe: [probe=linear_cached, probe.knn_k=3, probe.epochs=1]
  finetune:
    numbers: {{finetuned: top1}}
    finetune: {tmp_path / "classifier.yaml"}
    overrides: [budget_epochs=0.5]
""")
    study = replace(load_study(file), output=tmp_path / "runs")
    (failure,) = run_study(study, study.entries, jobs=2)
    assert failure.startswith("broken-1-seed0: ")
    assert "nowhere" in failure
    (row,) = recorded(study.results)
    assert (row["key"], row["seed"], row["share"]) == ("constant-1over1.5-seed4", 4, "1/1.5")
    assert row["numbers"].keys() == {"knn", "linear", "finetuned"}
    assert all(0 <= value <= 100 for value in row["numbers"].values())
    assert row["steps"] * 10 == row["images_seen"]
    assert min(row["cpu_seconds"], row["seconds"]) > 0
    assert row["flops"] > 0


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_what_the_study_page_shows_is_what_the_results_say(file: Path) -> None:
    page = (file.parents[2] / "docs" / "study" / "index.md").read_text()
    found = load_study(file)
    tables = markdown(found, recorded(found.results))
    if found.results.is_file():
        assert file.with_suffix(".md").read_text() == tables
        assert with_tables(page, file.stem, tables) == page
    with pytest.raises(ValueError, match="no <!-- study absent -->"):
        with_tables(page, "absent", tables)


def test_no_two_arms_look_alike() -> None:
    runs: list[dict[str, object]] = [result("k", "a", "1", 0, 1.0)]
    arms = {f"line{number}": [runs, runs] for number in range(20)}
    arms |= {f"marker{number}": [runs] for number in range(12)}
    looks = looks_of(arms, {"marker3", "marker4"})
    assert looks.keys() == arms.keys()
    assert len({(looks[arm].colour, looks[arm].line) for arm in arms if arm.startswith("line")}) == 20
    assert len({looks[arm].marker for arm in arms if arm.startswith("marker")}) == 12
