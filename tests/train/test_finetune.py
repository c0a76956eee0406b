"""The promises of a classifier's run: the same bits whatever interrupts it, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Server
from safetensors.torch import load_file

from etpp_ssl.commands.evaluate import evaluate_run
from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import finetune, pretrain

TIMINGS = {"seconds", "images_per_second", "data_wait_share", "evaluation_seconds"}
Build = Callable[..., FinetuneRecipe]


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder) if "loss" in row}


def assert_same(a: Path, b: Path) -> None:
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        x, y = load_file(newest(a) / file), load_file(newest(b) / file)
        assert x.keys() == y.keys()
        assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert rows(a) == rows(b)


def test_resume_is_bitwise_at_any_step_with_any_workers(
    tiny_classifier: Build, tmp_path: Path, crash_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    evaluated = ["evaluate.every_steps=7"]
    finetune(tiny_classifier(f"output={tmp_path / 'whole'}", *evaluated))
    # Steps 5 and 11 lie between two rows, 12 and 17 in the middle of an epoch and of a stage.
    for stop, workers in [(5, 2), (11, 0), (12, 1), (17, 3)]:
        recipe = tiny_classifier(
            f"output={tmp_path / 'cut'}",
            f"data.num_workers={workers}",
            "checkpoint.every_steps=2",
            *evaluated,
        )
        with crash_after(stop):
            finetune(recipe)
    finetune(tiny_classifier(f"output={tmp_path / 'cut'}", *evaluated))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    last = rows(tmp_path / "whole")[-1]
    assert last["num_images"] == 24
    assert 0 <= last["top1"] <= 100


def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(
    tiny_classifier: Build, tmp_path: Path, terminate_in: Callable[[int], AbstractContextManager[None]]
) -> None:
    with terminate_in(4), pytest.raises(Interrupted, match="SIGTERM after step 4"):
        finetune(tiny_classifier())
    assert RunFolder(tmp_path / "run").checkpoints()[0].step == 4


def test_drop_path_mixing_and_erasing_are_redrawn_by_position_alone(
    tiny_classifier: Build, tmp_path: Path
) -> None:
    # Nothing of it follows the process's own generators.
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        finetune(tiny_classifier(f"output={tmp_path / name}"))
    assert_same(tmp_path / "a", tmp_path / "b")


def test_without_mixing_accumulated_micro_batches_give_the_whole_batchs_step(
    tiny_classifier: Build, tmp_path: Path
) -> None:
    plain = ["augment.mixup=0", "augment.cutmix=0"]
    finetune(tiny_classifier(f"output={tmp_path / 'whole'}", *plain))
    finetune(tiny_classifier(f"output={tmp_path / 'parts'}", "micro_batch_size=3", *plain))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_two_processes_give_the_loss_curve_and_the_evaluation_of_one(
    tiny_classifier: Build, tmp_path: Path, ranks: Server
) -> None:
    plain = ["augment.mixup=0", "augment.cutmix=0", "data.num_eval_images=23"]
    finetune(tiny_classifier(f"output={tmp_path / 'one'}", *plain))
    recipe = tiny_classifier(f"output={tmp_path / 'two'}", *plain)
    file = tmp_path / "recipe.yaml"
    recipe.save(file)
    ranks.run(["finetune", str(file)], 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = rows(tmp_path / "one")[-1], rows(tmp_path / "two")[-1]
    assert (two["num_images"], one["num_images"]) == (23, 23)
    assert two["top1"] == one["top1"]


def test_it_learns(tiny_classifier: Build, tmp_path: Path) -> None:
    finetune(
        tiny_classifier(
            "budget_epochs=6",
            "data.num_classes=2",
            "data.num_images=320",
            "data.num_eval_images=200",
            "data.crop_scale=[0.5, 1.0]",
            "optim={base_lr: 5e-2, ema: 0.9}",
            "augment={rand_augment: null, erasing: 0.0, mixup: 0.0, cutmix: 0.0, smoothing: 0.0}",
            "model.drop_path=0.0",
        )
    )
    # Chance is 50, with a standard deviation of 3.5.
    assert rows(tmp_path / "run")[-1]["top1"] > 68


def test_it_starts_from_a_pretraining_run_and_evaluates_as_it_ended(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Build, tmp_path: Path
) -> None:
    source = tmp_path / "pretrained"
    pretrain(tiny_recipe(f"output={source}", "model.depth=2"))
    run = finetune(tiny_classifier(f"init={source}", "optim.layer_decay=0.75"))
    scales = {group["lr_scale"] for group in run.optimizer.param_groups}
    assert scales == {0.75**3, 0.75**2, 0.75, 1.0}
    said: list[str] = []
    evaluated = evaluate_run(run.recipe, run.folder, said.append)
    last = rows(tmp_path / "run")[-1]
    assert evaluated.result.numbers() == {key: last[key] for key in evaluated.result.numbers()}
    assert evaluated.protocol["weights"] == "moving average"


def test_another_width_names_the_tensors(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Build, tmp_path: Path
) -> None:
    source = tmp_path / "pretrained"
    pretrain(tiny_recipe(f"output={source}", "model.embed_dim=24", "model.depth=2"))
    with pytest.raises(UserError, match=r"pretrained' is of another model: cls_token is .*, and 23 more"):
        finetune(tiny_classifier(f"init={source}"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_classes=3", r"model.num_classes is 3, but the data has 10 classes"),
        ("model.name=vgg11", r"vgg11"),
        ("budget_hours=1", r"budget_hours|exactly one"),
        ("task=classify", r"task is 'classify'; valid are pretrain, finetune"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tiny_classifier: Build, override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        finetune(tiny_classifier(override))


def test_a_recipe_of_the_other_task_is_refused(
    tiny_classifier: Build, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from etpp_ssl.recipe import FinetuneRecipe, Recipe

    tiny_recipe().save(tmp_path / "pretrain.yaml")
    tiny_classifier().save(tmp_path / "finetune.yaml")
    with pytest.raises(UserError, match=r"of task finetune .* task pretrain"):
        Recipe.load(tmp_path / "finetune.yaml")
    with pytest.raises(UserError, match=r"of task pretrain .* task finetune"):
        FinetuneRecipe.load(tmp_path / "pretrain.yaml")


def test_resuming_with_another_micro_batch_is_refused(tiny_classifier: Build) -> None:
    finetune(tiny_classifier())
    with pytest.raises(UserError, match="micro_batch_size"):
        finetune(tiny_classifier("micro_batch_size=3"))
