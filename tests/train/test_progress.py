"""What a run shows in the terminal: where it stands while it trains, and a block at its start and its end."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tiny_runs import TINY

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.log import Progress
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.plan_table import print_plan
from etpp_ssl.train.summary import short_run_warnings

ROW = {"stage": 0, "bandwidth": [8, 12], "loss": 0.5, "lr": 1e-3, "images_per_second": 10.0,
       "data_wait_share": 0.0}  # fmt: skip


def curriculum() -> Curriculum:
    return Recipe.parse(TINY).build_curriculum(64)


def shown_on(**console: Any) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    progress = Progress(curriculum(), visible=True)
    progress.console = Console(file=out, **console)
    return progress, out


def test_a_bar_that_is_started_again_after_a_rewind_is_the_only_one() -> None:
    progress, terminal = shown_on(force_terminal=True, width=100)
    progress.start(0)
    progress.step(3)
    progress.start(2)
    progress.stop()
    hidden_and_shown = re.findall(r"\x1b\[\?25[lh]", terminal.getvalue())
    assert hidden_and_shown == ["\x1b[?25l", "\x1b[?25h"] * 2


def test_a_terminal_of_80_columns_shows_bar_percent_time_left_and_step() -> None:
    progress, terminal = shown_on(force_terminal=True, width=80, color_system=None)
    progress.evaluation = "evaluation"
    progress.start(0)
    progress.step(10)
    progress.row({**ROW, "step": 10})
    progress.stop()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").split("\n")[-2]
    assert re.match(r"[━╸╺ ]{8}  ?3\d% ETA \d:\d\d:\d\d \+ evaluation step 10/20 at 8x12 px loss 0.5", last)
    assert len(last) == 80


def test_without_a_terminal_there_are_plain_lines() -> None:
    progress, lines = shown_on(width=200, soft_wrap=True)
    progress.start(0)
    for step in range(1, 6):
        progress.row({**ROW, "step": step})
    progress.row({**ROW, "step": progress.curriculum.num_steps})
    progress.stop()
    first, last = lines.getvalue().splitlines()
    assert re.search(r"ETA \d:\d\d:\d\d  step 1/20 at 8x12 px loss 0.5000 10 img/s \(stage 1/3\)", first)
    assert last.startswith("100.0% ")
    assert "\x1b" not in lines.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_an_evaluation_is_shown_while_it_lasts_and_promises_no_end(terminal: bool) -> None:
    progress, out = shown_on(width=80, force_terminal=terminal, color_system=None)
    progress.evaluation = "probe"
    progress.start(0)
    progress.row({**ROW, "step": 20})
    before = len(out.getvalue())
    with progress.evaluating(20):
        if terminal:
            progress.stop()
    during = out.getvalue()[before:]
    assert "probe after step 20" in during
    assert "ETA" not in during
    assert "100%" not in during


def test_the_first_step_is_shown_but_writes_no_row(
    tiny_recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(tiny_recipe("log_every_steps=1000"))
    assert [row["step"] for row in run.folder.metrics()] == [8, 16, 20]
    assert re.search(r"ETA .*step 1/20 at \S+ px loss \d", capfd.readouterr().err)


def test_a_run_says_what_it_trains_on_and_what_came_of_it(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "photos"
    for split, count in (("train", 40), ("validation", 12), ("test", 12)):
        for number in range(count):
            folder = images / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 16), (5 * number, 90, 200)).save(folder / f"{number}.png")
    output = tmp_path / "my run"
    recipe = tiny_recipe(
        f"data={{name: folder, root: {images}, num_workers: 0}}",
        "probe=knn",
        "probe.k=3",
        "probe.every_steps=9",
        "budget_epochs=2.5",
        f"output={output}",
    )
    run = pretrain(recipe)
    said = capfd.readouterr().err
    start = said[: said.index("ETA")]
    for line in (
        r"  training    vit, image 16x24, patch 4, .* M parameters in the encoder",
        rf"  images      40 images in '{images}/train' \(40 \.png; 2 classes\)",
        rf"  evaluation  12 images in '{images}/validation' \(12 \.png; 2 classes\); "
        r"probe knn every 9 steps and after the last step",
        r"  steps       \d+; batches of 10 images, \S+ equivalent epochs",
        r"  on          cpu in fp32, 1 process with 0 data workers",
        rf"  output      {output}",
    ):
        assert re.search(f"^{line}", start, re.MULTILINE), line
    end = said[said.index("\nfinished ") :]
    numbers = run.folder.metrics()[-1]
    assert f"finished {run.state.step} steps, " in end
    assert f"knn_top1 {numbers['knn_top1']:.4g}" in end
    assert f"  weights     {output}/checkpoints/step-{run.state.step:08d}\n" in end
    for command in ("report", "probe", "export"):
        assert f"etpp {command} '{output}'" in end
    pretrain(recipe)
    again = capfd.readouterr().err
    assert again.startswith(f"run {output} is finished ({run.state.step} steps)\n")
    assert "resuming" not in again
    assert f"etpp export '{output}'" in again


def test_a_classifier_is_evaluated_next_and_unlabelled_images_are_reconstructed(
    tiny_recipe: Callable[..., Recipe],
    tiny_classifier: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    finetune(tiny_classifier("budget_epochs=1"))
    said = capfd.readouterr().err
    assert "; accuracy after the last step" in said
    assert f"etpp evaluate {tmp_path / 'run'}" in said
    assert re.search(r"^finished .*top1 ", said, re.MULTILINE)
    for number in range(10):
        (tmp_path / "plain").mkdir(exist_ok=True)
        Image.new("RGB", (24, 16), (5 * number, 90, 200)).save(tmp_path / "plain" / f"{number}.png")
    pretrain(
        tiny_recipe(f"data={{name: folder, root: {tmp_path / 'plain'}}}", f"output={tmp_path / 'other'}")
    )
    said = capfd.readouterr().err
    assert "  images      10 images in '" in said
    assert "(10 .png; no labels)" in said
    assert f"etpp reconstruct {tmp_path / 'other'}" in said
    assert RunFolder(tmp_path / "other").newest(print) is not None


def test_the_plan_fits_80_columns(tiny_recipe: Callable[..., Recipe]) -> None:
    plan, wide, narrow = plan_run(tiny_recipe()), io.StringIO(), io.StringIO()
    print_plan(plan, Console(file=wide, width=200))
    print_plan(plan, Console(file=narrow, width=80))
    titles = next(line for line in wide.getvalue().splitlines() if "bandwidth" in line).split()
    assert titles[0] == "stage"
    assert set(titles) <= set(narrow.getvalue().split())
    assert narrow.getvalue().count("stage  ") == 2, "the second table names the stages, too"
    assert "…" not in narrow.getvalue()
    assert max(map(len, narrow.getvalue().splitlines())) <= 80


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batch_size=64", "curriculum=constant"], "the run has only 2 optimizer steps"),
        (["optim.warmup_share=0.02"], r"warm-up has only 1 step of 20: optim.warmup_share is 0.02"),
        (["optim.warmup_share=0"], None),
        ([], None),
    ],
)
def test_a_run_or_a_warm_up_of_too_few_steps_is_warned_of_in_the_plan(
    overrides: list[str], words: str | None, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe(*overrides)
    out = io.StringIO()
    print_plan(plan_run(recipe), Console(file=out, width=250))
    assert ("warning: " in out.getvalue()) == (words is not None)
    assert re.search(words or "", out.getvalue())
    assert len(short_run_warnings(recipe, recipe.build_curriculum(64))) == (words is not None)
