"""Runs that train on a stream: killed and resumed to the bit, alone and as two processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Server
from safetensors.torch import load_file
from stream_sources import EXAMPLES, NUM_IMAGES, png

from etpp_ssl.commands.evaluate import evaluate_run
from etpp_ssl.config import UserError
from etpp_ssl.data.streams.base import StreamConfig
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.time_budget import decide_steps

TIMINGS = {"seconds", "images_per_second", "data_wait_share", "probe_seconds"}
EVAL = {"name": "synthetic", "num_images": 12, "num_eval_images": 6, "num_classes": 3}


def data_of(config: StreamConfig, **changes: Any) -> str:
    """The override that makes a run train on a stream."""
    values = {**config.model_dump(mode="json", exclude_none=True), "num_workers": 0, **changes}
    return f"data={json.dumps(values)}"


def state_of(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    state: dict[str, Any] = json.loads((newest / "state.json").read_text())["state"]
    return state


def assert_same(a: Path, b: Path) -> None:
    newest = [sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (a, b)]
    for file in ("model.safetensors", "optimizer.safetensors"):
        x, y = (load_file(checkpoint / file) for checkpoint in newest)
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []
    rows = [
        [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in text.splitlines()]
        for text in ((folder / "metrics.jsonl").read_text() for folder in (a, b))
    ]
    assert rows[0] == rows[1]
    for key in ("step", "streams", "bad_images"):
        assert state_of(a)[key] == state_of(b)[key]


@pytest.mark.parametrize(
    ("name", "num_workers"), [("webdataset", 0), ("webdataset", 2), ("huggingface", 0), ("mix", 1)]
)
def test_a_run_killed_at_any_step_ends_in_the_same_bits(
    name: str,
    num_workers: int,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    config = EXAMPLES[name](tmp_path, (3, 17))
    data = data_of(config, num_workers=num_workers, max_bad_share=0.5)
    common = [data, "micro_batch_size=4", "checkpoint.every_steps=2"]
    pretrain(tiny_recipe(f"output={tmp_path / 'whole'}", *common))
    cut = tiny_recipe(f"output={tmp_path / 'cut'}", *common)
    for step in (5, 9):
        with crash_after(step):
            pretrain(cut)
    run = pretrain(cut)
    assert len(run.state.bad_images) == (4 if name == "mix" else 2)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_save_where_both_stand_and_go_on_from_there(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, ranks: Server
) -> None:
    whole, cut, file = tmp_path / "whole", tmp_path / "cut", tmp_path / "recipe.yaml"
    recipe = tiny_recipe(
        f"output={whole}", data_of(EXAMPLES["mix"](tmp_path), num_workers=1), "micro_batch_size=3",
        "checkpoint.every_steps=4", "checkpoint.keep=9",
    )  # fmt: skip
    recipe.save(file)
    ranks.run(["pretrain", str(file)], 2)
    shutil.copytree(whole, cut)
    for checkpoint in sorted((cut / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    first, second = state_of(cut)["streams"]
    assert first["lanes"] != second["lanes"]
    with pytest.raises(UserError, match="read with processes 2 and cannot be resumed with 1"):
        open_run(Recipe.load(file, [f"output={cut}"]))
    ranks.run(["pretrain", str(file), f"output={cut}"], 2)
    assert_same(whole, cut)


def test_another_number_of_readers_is_a_sentence_and_a_fork_begins_anew(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    config = EXAMPLES["webdataset"](tmp_path)
    recipe = tiny_recipe(data_of(config), "checkpoint.every_steps=3")
    with crash_after(7):
        pretrain(recipe)
    for change, words in (
        ("data.num_workers=2", "read with data.num_workers 1 and cannot be resumed with 2"),
        ("micro_batch_size=3", "read with micro_batch_size None and cannot be resumed with 3"),
        ("data.num_images=32", r"data\.num_images \(31 -> 32\)"),
        (data_of(config, urls=f"{tmp_path}/tars/{{0..5}}.tar"), "the data is not what run"),
    ):
        changed = tiny_recipe(data_of(config), "checkpoint.every_steps=3", change)
        with pytest.raises(UserError, match=words) as error:
            open_run(changed)
        assert "\n" not in str(error.value)
        assert "--fork" in str(error.value)
        fork = open_run(changed.model_copy(update={"output": str(tmp_path / "fork")}), Path(recipe.output))
        assert (fork.state.step, fork.state.streams) == (6, [])
    # One worker reads what no worker reads.
    assert open_run(tiny_recipe(data_of(config, num_workers=1))).state.step == 6


def test_what_a_stream_does_not_go_with_is_a_sentence(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    data = data_of(EXAMPLES["webdataset"](tmp_path))
    replay = "curriculum.stages=[{bandwidth: [16, 24], share: 1.0, replay: {times: 2, buffer: 3}}]"
    for overrides, words in (
        ([replay], "stage 1 has a replay buffer"),
        (["data.num_workers=8"], "7 shards"),
        (["probe=knn"], r"data\.eval is missing"),
        (["probe=reconstruction"], r"data\.eval is missing"),
    ):
        with pytest.raises(UserError, match=words) as error:
            open_run(tiny_recipe(data, *overrides))
        assert "\n" not in str(error.value)


def test_a_probe_takes_its_images_from_the_evaluation_data(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    data = data_of(EXAMPLES["webdataset"](tmp_path), eval=EVAL)
    run = pretrain(tiny_recipe(data, "probe=knn", "probe.k=3", "budget_epochs=0.8"))
    rows = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert "knn_top1" in rows[-1]


def test_a_plan_needs_the_number_of_images_only(tiny_recipe: Callable[..., Recipe]) -> None:
    data = {"name": "webdataset", "urls": "http://nowhere/{0..9}.tar", "num_images": 5000}
    assert plan_run(tiny_recipe(f"data={json.dumps(data)}")).num_images == 5000
    del data["num_images"]
    with pytest.raises(UserError, match="num_images is missing"):
        tiny_recipe(f"data={json.dumps(data)}")


def test_measuring_the_speed_of_a_budget_in_hours_reads_nothing_away(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    data = data_of(EXAMPLES["webdataset"](tmp_path))
    run = open_run(tiny_recipe(data, "budget_epochs=null", "budget_hours=0.02"))
    # A second passes each time it is asked, so that few steps are measured.
    run.clock = count().__next__
    decide_steps(run)
    assert run.state.plan is not None
    assert run.state.streams == []


def test_a_classifier_learns_from_the_labels_of_a_stream(
    tiny_classifier: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    config = EXAMPLES["webdataset"](tmp_path)
    common = ["checkpoint.every_steps=2", f"model.num_classes={NUM_IMAGES}", "evaluate.split=null"]
    finetune(tiny_classifier(f"output={tmp_path / 'whole'}", data_of(config), *common))
    cut = tiny_classifier(f"output={tmp_path / 'cut'}", data_of(config), *common)
    with crash_after(3):
        finetune(cut)
    finetune(cut)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_stream_without_class_names_takes_those_of_its_evaluation_images(
    tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    config = EXAMPLES["webdataset"](tmp_path)
    overrides = [f"model.num_classes={NUM_IMAGES}", "budget_epochs=0.5"]
    for number in range(NUM_IMAGES):
        folder = tmp_path / "images" / "val" / f"class {number:02d}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png(number))
    (tmp_path / "images" / "train").mkdir()
    evaluation = {"name": "folder", "root": str(tmp_path / "images")}
    named = tiny_classifier(data_of(config, eval=evaluation), *overrides)
    run = finetune(named)
    assert run.task.evaluation is not None
    assert run.task.evaluation.images is not None
    assert run.classes == run.task.evaluation.images.classes
    assert evaluate_run(named, run.folder, print).classes == run.classes
    numbered = tiny_classifier(
        f"output={tmp_path / 'other'}", data_of(config), *overrides, "evaluate.split=null"
    )
    assert finetune(numbered).classes == [str(number) for number in range(NUM_IMAGES)]


def test_labels_and_classes_that_do_not_fit_are_a_sentence(
    tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    config = EXAMPLES["webdataset"](tmp_path)
    names = ["class 0", "class 1", "class 2"]
    for changes, overrides, words in (
        ({}, [], r"model\.num_classes must be given"),
        ({"label_key": None}, ["model.num_classes=31"], "give its label_key or label_column"),
        ({}, ["model.num_classes=31"], r"data\.eval is missing"),
        ({"classes": names, "eval": {**EVAL, "num_classes": 4}}, [], "classes that training lacks: "),
        ({"eval": EVAL}, ["model.num_classes=31"], "have 3 classes, but model.num_classes is 31, and the"),
        (
            {},
            ["model.num_classes=31", "augment.balance=sqrt"],
            "but the images of a stream come as they come",
        ),
        ({}, ["model.num_classes=31", "augment.logit_adjustment=1"], r"give augment\.class_counts"),
        (
            {},
            ["model.num_classes=31", "augment.class_weights=sqrt", "augment.class_counts=[1, 2]"],
            r"class_counts is \[1, 2\]: give the number of images of each of the 31 classes",
        ),
        ({}, ["model.num_classes=20", "evaluate.split=null"], r"has label \d+, but model.num_classes is 20"),
    ):
        with pytest.raises(UserError, match=words) as error:
            finetune(tiny_classifier(data_of(config, **changes), *overrides))
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_resolved_recipe_of_a_stream_reads_back_equal(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for name, make in EXAMPLES.items():
        recipe = tiny_recipe(data_of(make(tmp_path / name), eval=EVAL))
        recipe.save(tmp_path / "recipe.yaml")
        assert Recipe.load(tmp_path / "recipe.yaml") == recipe
        assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["name"] == name
