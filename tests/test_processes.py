"""Several processes over gloo: the curve of one, resumed by any number, and no image counted twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Server

from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder

CLOSE = 1e-4
"""Relative difference of the losses that another number of processes may make, over at least 50 steps."""
# Batches of 11 in parts of 2 to 6, micro-batches of 3 and what is left; two stages begin on the way.
UNEVEN = ["batch_size=11", "micro_batch_size=3", "budget_epochs=5", "log_every_steps=1"]
EVALUATED = ["data.num_eval_images=3", "data.num_classes=2"]
"""Fewer images to evaluate than processes."""
COUNTS = [2, 1, 2, 4, 2]
"""Processes that train a run one after the other."""
STOP = """
import os, signal
from etpp_ssl.train.loop import on_step_end

def stop(run):
    # Only the last process is told.
    if run.state.step == {step} and rank == run.accelerator.num_processes - 1:
        os.kill(os.getpid(), signal.SIGTERM)

on_step_end.append(stop)
"""
PROBES = """
import json, os
from tiny_runs import TINY
from contracts.test_probes import CASES, MILD, build
from etpp_ssl.dist.peers import leave
from etpp_ssl.recipe import Recipe

found, data = [], ["data.num_images=15", "data.num_eval_images=3", "data.num_classes=3"]
for name, overrides in CASES:
    probe, model = build(Recipe.parse(TINY, ["probe=" + name, *overrides, *MILD.get(name, []), *data]))
    found.append(probe.run(model))
with open({out!r} + "." + str(rank), "w") as file:
    json.dump(found, file)
leave(probe.context.accelerator)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def whole(ranks: Server, folder: Path) -> list[dict[str, Any]]:
    """Rows of one process's run without an interruption."""
    ranks.run(
        ["pretrain", str(recipe(folder)), f"output={folder / 'whole'}", *UNEVEN, "probe=knn", *EVALUATED], 1
    )
    return RunFolder(folder / "whole").metrics()


def recipe(folder: Path) -> Path:
    from tiny_runs import TINY

    file = folder / "recipe.yaml"
    file.write_text(TINY, encoding="utf-8")
    return file


def worst_difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]], key: str = "loss") -> float:
    """Largest relative difference of the rows' losses; rows and steps must be the same."""
    here, there = ({row["step"]: row[key] for row in run if key in row} for run in (rows, expected))
    assert list(here) == list(there)
    return max(abs(here[step] - there[step]) / abs(there[step]) for step in there)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_curve_of_one(
    count: int, ranks: Server, folder: Path, whole: list[dict[str, Any]]
) -> None:
    output = folder / f"by-{count}"
    said = ranks.run(
        ["pretrain", str(recipe(folder)), f"output={output}", *UNEVEN, "probe=knn", *EVALUATED], count
    )
    rows = RunFolder(output).metrics()
    losses = [row for row in rows if "loss" in row]
    assert len(losses) >= 50
    assert len({tuple(row["bandwidth"]) for row in losses}) == 3
    assert {row["num_processes"] for row in losses} == {count}
    assert worst_difference(rows, whole) < CLOSE
    assert rows[-1]["knn_top1"] == whole[-1]["knn_top1"]
    # The others leave the talking to the main process.
    assert all("step" in text for text in said[:1])
    assert not any(text.strip() for text in said[1:])


def test_another_number_of_processes_goes_on_with_a_run(
    ranks: Server, folder: Path, whole: list[dict[str, Any]]
) -> None:
    losses = [row for row in whole if "loss" in row]
    output, part = folder / "changing", len(losses) // len(COUNTS)
    command = ["pretrain", str(recipe(folder)), f"output={output}", *UNEVEN, *EVALUATED]
    said = []
    for index, count in enumerate(COUNTS[:-1], 1):
        jobs = ranks.start(command, count, before=STOP.format(step=index * part))
        assert [job.wait() for job in jobs] == [75] * count
        assert f"stopped by SIGTERM after step {index * part}; the same command resumes" in jobs[0].text
        assert json.loads((output / "status.json").read_text())["state"] == "stopped"
        said.append(jobs[0].text)
    said.append(ranks.run(command, COUNTS[-1])[0])
    for before, after, text in zip(COUNTS, COUNTS[1:], said[1:], strict=False):
        assert f"the last bits may differ from the run so far: processes {before} -> {after}" in text
    rows = RunFolder(output).metrics()
    counts = [count for count in COUNTS[:-1] for _ in range(part)]
    assert [row["num_processes"] for row in rows] == counts + COUNTS[-1:] * (len(rows) - len(counts))
    assert worst_difference(rows, losses) < CLOSE


def test_larger_batches_at_small_sizes_are_shared_out_too(ranks: Server, folder: Path) -> None:
    overrides = ["batch_size=11", "micro_batch_size=3", "curriculum.large_batch=tokens", "budget_epochs=2"]
    rows = []
    for count in (1, 2):
        output = folder / f"tokens-{count}"
        ranks.run(["pretrain", str(recipe(folder)), f"output={output}", *overrides], count)
        rows.append(RunFolder(output).metrics())
    assert {row["batch_size"] for row in rows[1]} == {44, 22, 11}
    assert worst_difference(rows[1], rows[0]) < CLOSE


def test_classifiers_are_trained_and_evaluated_alike_with_fewer_images_than_processes(
    tiny_classifier: Callable[..., FinetuneRecipe], ranks: Server, tmp_path: Path
) -> None:
    tiny_classifier(*EVALUATED, "micro_batch_size=3", "augment.mixup=0", "augment.cutmix=0").save(
        tmp_path / "recipe.yaml"
    )
    found = []
    for count in (1, 4):
        output = tmp_path / str(count)
        ranks.run(["finetune", str(tmp_path / "recipe.yaml"), f"output={output}"], count)
        found.append(RunFolder(output).metrics())
    one, four = found
    assert worst_difference(four, one) < CLOSE
    assert worst_difference(four, one, "eval_loss") < CLOSE
    assert four[-1]["num_images"] == 3
    assert four[-1]["top1"] == one[-1]["top1"]


def test_every_probe_counts_an_image_once_with_fewer_of_them_than_processes(
    ranks: Server, tmp_path: Path
) -> None:
    found = []
    for count in (1, 4):
        out = str(tmp_path / str(count))
        ranks.run(None, count, before=PROBES.format(out=out))
        found += [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(count)]
    for other in found[1:]:
        assert other == [pytest.approx(numbers, rel=CLOSE) for numbers in found[0]]


def test_all_agree_on_a_budget_in_hours(
    tiny_recipe: Callable[..., Recipe], ranks: Server, tmp_path: Path
) -> None:
    tiny_recipe().save(tmp_path / "recipe.yaml")
    run = RunFolder(tmp_path / "run")
    overrides = ["budget_epochs=null", f"budget_hours={4 / 3600}", "micro_batch_size=3"]
    said = ranks.run(["pretrain", str(tmp_path / "recipe.yaml"), f"output={run.path}", *overrides], 2)
    assert "before:" in said[0]
    # Each process would wait for ever for one with other steps; and each would write another plan.
    last = json.loads(run.plan_file.read_text())["segments"][-1]
    assert run.checkpoints()[0].step == last["first_step"] + last["num_steps"]
    assert run.metrics()[-1]["step"] == run.checkpoints()[0].step


def test_an_unreadable_image_that_another_process_has_met_is_named(ranks: Server, folder: Path) -> None:
    damage = """
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sources import synthetic
whole = synthetic.SyntheticSource.open
def open_damaged(self, index):
    if index == 7:
        raise UnreadableImage("damaged")
    return whole(self, index)
synthetic.SyntheticSource.open = open_damaged
"""
    said = ranks.run(
        ["pretrain", str(recipe(folder)), f"output={folder / 'bad'}", "budget_epochs=1",
         "data.max_bad_share=0.1"], 4, before=damage,
    )  # fmt: skip
    assert said[0].count("unreadable image") == 1
    assert not any(said[1:])


def test_images_that_leave_the_range_are_counted_over_all_processes(ranks: Server, folder: Path) -> None:
    counts = []
    for count in (1, 2):
        output = folder / f"range{count}"
        # About half of the pictures of floats have a value above 0.9.
        overrides = ["budget_epochs=1", "data.dtype=float32", "data.range=[0,0.9]", f"output={output}"]
        said = ranks.run(["pretrain", str(recipe(folder)), *overrides], count)
        rows = [row for row in RunFolder(output).metrics() if "loss" in row]
        counts.append([row.get("images_outside_range", 0) for row in rows])
        line = f"{counts[-1][-1]} of {rows[-1]['images_loaded']} images had values outside data.range"
        assert said[0].count(line) == 1
        assert not any(said[1:])
    assert counts[0] == counts[1]
    assert 0 < counts[0][-1] < rows[-1]["images_loaded"]


def test_pixels_without_data_weigh_the_same_over_several_processes(ranks: Server, folder: Path) -> None:
    """Batches of 11 of which the parts have different shares of gaps: no process's mean is the batch's."""
    gaps = ["data.dtype=float32", "data.range=[0,1]", "data.gaps=0.4", "data.min_valid=0.6"]
    runs = []
    for count in (1, 2):
        output = folder / f"gaps{count}"
        command = ["pretrain", str(recipe(folder)), f"output={output}", "target=combined", *gaps, *UNEVEN]
        ranks.run([*command, "budget_epochs=2"], count)
        runs.append([row for row in RunFolder(output).metrics() if "loss" in row])
    assert len(runs[0]) > 15
    assert worst_difference(*runs) < CLOSE
    lost = [[row.get("images_without_data", 0) for row in rows] for rows in runs]
    assert lost[0] == lost[1]
    assert lost[0][-1] > 0
