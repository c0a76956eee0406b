"""Fine-tuning of small sets: what a run begins with, and what the holdout decides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import yaml
from ranks import Server
from safetensors.torch import load_file
from tiny_runs import TINY_CLASSIFIER
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.export.timm import export
from etpp_ssl.recipe import FinetuneRecipe, load_any, load_probed
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.classify import Classification, Judge
from etpp_ssl.train.launch import finetune
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.run import Run
from etpp_ssl.train.selection import best_of

Build = Callable[..., FinetuneRecipe]
SMALL = ["model.head=linear", "data.holdout_share=0.2", "evaluate.keep_better=true", "augment.ramp=false"]
AUTO = ["optim.base_lr=auto", "optim.auto_lrs=[0.001, 0.01]", "optim.auto_share=0.3"]


def weights(folder: Path, file: str = "ema.safetensors") -> dict[str, torch.Tensor]:
    return load_file(RunFolder(folder).checkpoints()[0].path / file)


def last_choice(folder: Path) -> dict[str, float]:
    return [row for row in RunFolder(folder).metrics() if "start_kept" in row][-1]


def test_a_run_begins_with_the_head_that_is_best_on_the_holdout(
    tiny_classifier: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["data.num_images=250", "data.holdout_share=0.2"]
    random, fitted = open_run(tiny_classifier(*images)), open_run(tiny_classifier(*SMALL, *images))
    assert isinstance(fitted.task, Classification)
    assert fitted.task.judge is not None
    ours, timms = fitted.bare_model.state_dict(), random.bare_model.state_dict()
    # The head alone is another one, and the model that the end is compared with is the same.
    other = {name for name in ours if not ours[name].equal(timms[name])}
    assert other == {"net.head.weight", "net.head.bias"}
    began = fitted.task.judge.began()
    assert all(value.equal(ours[name]) for name, value in began.state_dict().items())
    right = fitted.task.judge.right(began)
    assert len(right) == 50
    told = re.search(
        r"linear head on frozen features: ([\d.]+) % on the holdout of 50 images", capsys.readouterr().err
    )
    assert told is not None
    assert float(told[1]) == pytest.approx(100.0 * right.double().mean().item())
    assert right.sum() > max(5, fitted.task.judge.right(random.bare_model).sum())


def test_the_learning_rate_is_chosen_by_trials_and_resumed_in_the_same_bits(
    tiny_classifier: Build, tmp_path: Path, crash_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(tiny_classifier(*SMALL, *AUTO, f"output={whole}"))
    chosen = json.loads((whole / "trials" / "chosen.json").read_text())
    assert [trial["base_lr"] for trial in chosen["trials"]] == [0.001, 0.01]
    best = best_of(chosen["trials"])
    assert chosen["base_lr"] == best["base_lr"] == RunFolder(whole).any_recipe().optim.base_lr
    assert not list(whole.glob("trials/*/checkpoints"))
    # Stopped in the first trial, then in the second one, then in the run itself.
    recipe = tiny_classifier(*SMALL, *AUTO, f"output={cut}", "checkpoint.every_steps=2")
    for stop in (3, 3, 9):
        with crash_after(stop):
            finetune(recipe)
    finetune(recipe)
    assert json.loads((cut / "trials" / "chosen.json").read_text()) == chosen
    ours, theirs = weights(cut), weights(whole)
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert last_choice(cut) == last_choice(whole)


@pytest.mark.parametrize(
    ("top1", "num_images", "chosen"),
    [((50, 55, 59), 50, 0), ((50, 55, 61), 50, 2), ((50, 54, 53), 5_000, 1), ((54, 50, 53), 5_000, 0)],
)
def test_another_learning_rate_is_taken_for_more_than_noise(
    top1: tuple[float, ...], num_images: int, chosen: int
) -> None:
    trials = [{"base_lr": n, "top1": value, "num_images": num_images} for n, value in enumerate(top1)]
    assert best_of(trials)["base_lr"] == chosen


@pytest.mark.parametrize(
    ("only_began", "only_trained", "kept"),
    [(0, 0, False), (1, 0, False), (3, 0, True), (9, 5, True), (8, 5, False)],
)
def test_what_the_run_began_with_is_kept_where_training_has_made_it_worse(
    tiny_classifier: Build, tmp_path: Path, only_began: int, only_trained: int, kept: bool
) -> None:
    recipe = tiny_classifier(*SMALL, "optim.base_lr=1e-3", "budget_epochs=0.4")
    began = open_run(tiny_classifier(*SMALL, f"output={tmp_path / 'other'}")).bare_model.state_dict()

    def right(model: nn.Module) -> Tensor:
        images = torch.zeros(20, dtype=torch.bool)
        if all(value.equal(began[name]) for name, value in model.state_dict().items()):
            images[:only_began] = True
        else:
            images[10 : 10 + only_trained] = True
        return images

    def judged(run: Run) -> None:
        assert isinstance(run.task, Classification)
        assert run.task.judge is not None
        run.task.judge = Judge(right, run.task.judge.began)

    on_step_end.append(judged)
    try:
        finetune(recipe)
    finally:
        on_step_end.remove(judged)
    saved = weights(tmp_path / "run")
    assert all(value.equal(began[name]) for name, value in saved.items()) == kept
    row = last_choice(tmp_path / "run")
    shares = {"start_holdout_top1": 5.0 * only_began, "holdout_top1": 5.0 * only_trained}
    assert {key: row[key] for key in shares} == pytest.approx(shares)
    assert row["start_kept"] == kept
    card = (export(recipe.output, say=str) / "README.md").read_text()
    assert ("weights that it began with" in card) == kept


def test_two_processes_choose_what_one_does(tiny_classifier: Build, tmp_path: Path, ranks: Server) -> None:
    plain = [*SMALL, *AUTO, "augment.mixup=0", "augment.cutmix=0"]
    finetune(tiny_classifier(*plain, f"output={tmp_path / 'one'}"))
    file = tmp_path / "recipe.yaml"
    tiny_classifier(*plain, f"output={tmp_path / 'two'}").save(file)
    ranks.run(["finetune", str(file)], 2)
    one, two = (json.loads((tmp_path / run / "trials" / "chosen.json").read_text()) for run in ("one", "two"))
    assert one["base_lr"] == two["base_lr"]
    assert last_choice(tmp_path / "one") == last_choice(tmp_path / "two")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*AUTO], ["data.holdout_share is 0", "optim.base_lr"]),
        (["optim.base_lr=auto", "optim.auto_lrs=[]"], ["auto_lrs is empty"]),
        (["evaluate.split=holdout"], ["give data.holdout_share"]),
        ([*SMALL, "data.labels_per_class=1"], ["holds out none", "no class has two", "optim.base_lr"]),
        (
            [
                *SMALL,
                "model={name: resnetv2_50x1_bit, head: linear}",
                "data.num_images=40",
                "image_size=32",
                "curriculum=constant",
            ],
            ["head is linear", "not a linear layer"],
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    tiny_classifier: Build, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        finetune(tiny_classifier(*overrides))
    assert [word for word in words if word not in str(caught.value)] == []


def recipe_file(folder: Path, **optim: object) -> Path:
    values = {**yaml.safe_load(TINY_CLASSIFIER), "output": str(folder / "run"), "optim": optim}
    del values["augment"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def test_init_without_a_learning_rate_asks_for_the_protocol_of_small_sets(tmp_path: Path) -> None:
    file = recipe_file(tmp_path)
    small = FinetuneRecipe.load(file, ["init=weights.pth"])
    assert (small.model.head, small.optim.base_lr, small.optim.layer_decay) == ("linear", "auto", 0.75)
    assert (small.data.holdout_share, small.evaluate.keep_better, small.augment.by_size) == (0.1, True, True)
    assert "small sets" in " ".join(small.notes)
    # What the recipe says holds, here and there.
    own = FinetuneRecipe.load(file, ["init=weights.pth", "data.holdout_share=0.3", "augment.mixup=0.1"])
    assert (own.data.holdout_share, own.augment.by_size, own.augment.mixup) == (0.3, False, 0.1)
    for others in (["optim.base_lr=1e-3", "init=weights.pth"], ["optim.name=sgd", "init=weights.pth"], []):
        plain = FinetuneRecipe.load(file, others)
        assert (plain.model.head, plain.data.holdout_share, plain.evaluate.keep_better) == (
            "random",
            0,
            False,
        )
    # A probe fine-tunes nothing, and a run's own recipe is as it was written.
    assert load_probed(file, ["init=weights.pth", "probe=knn"]).data.holdout_share == 0
    small.save(tmp_path / "run.yaml")
    assert load_any(tmp_path / "run.yaml").model_dump() == small.model_dump()


@pytest.mark.parametrize("num_images", [100, 10_000, 99_999, 100_000])
def test_augmentation_and_warmup_follow_the_number_of_images(tiny_classifier: Build, num_images: int) -> None:
    recipe = tiny_classifier("augment={by_size: true}", "optim.warmup_steps=50", "optim.base_lr=1e-3")
    settled = recipe.for_images(num_images)
    curriculum = settled.build_curriculum(num_images)
    warmup = settled.optim.warmup_share
    assert warmup == min(0.25, curriculum.progress_after(min(50, curriculum.num_steps)))
    strength = (num_images >= 10_000) + (num_images >= 100_000)
    augment = settled.augment
    assert (augment.rand_augment is not None, augment.mixup > 0) == (strength > 0, strength > 1)
    assert settled.for_images(num_images) == settled
