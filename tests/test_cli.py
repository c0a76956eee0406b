"""The command line: one clear sentence and exit code 2 for a mistake, and nothing half-written."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import Server

import etpp_ssl
from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.plan import plan_run
from etpp_ssl.train.run import Run

MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing folder": (["data=folder", "data.root={tmp}/nowhere"], "data.root"),
    "empty folder": (["data=folder", "data.root={tmp}/empty"], "no image below"),
    "folder without images": (["data=folder", "data.root={tmp}/texts"], "no image below"),
    "a file as folder": (["data=folder", "data.root={tmp}/texts/a.txt"], "is not a folder"),
    "unknown key": (["model.depht=2"], "did you mean 'depth'"),
    "wrong type": (["batch_size=big"], "batch_size is 'big'"),
    "bandwidth beyond the image": (
        ["curriculum.stages=[{bandwidth: 64, share: 1.0}]"],
        "larger than the image (16x24)",
    ),
    "bandwidth below two patches": (
        ["curriculum.stages=[{bandwidth: [4, 24], share: 0.5}, {bandwidth: 16, share: 0.5}]"],
        "fewer than two patches",
    ),
    "replay that does not divide the batch": (
        ["curriculum=constant", "curriculum.replay={times: 4, buffer: 2}"], "does not divide its batch of 10"
    ),
    "patch that does not divide": (["model.patch_size=5"], "does not divide the image height 16"),
    "no visible patch": (["model.mask_ratio=0.99"], "leaves no visible patch out of"),
    "no masked patch": (["model.mask_ratio=0.01"], "leaves no masked patch out of"),
    "nothing to predict": (
        ["model.decoder=cross", "model.decoder.predict_ratio=0.01"], "leaves nothing to predict out of 6"
    ),
    "more to predict than is masked": (
        ["model.decoder=cross", "model.decoder.predict_ratio=0.8"], "larger than model.mask_ratio 0.75"
    ),
    "a schedule that ends without a visible patch": (
        ["model.mask_ratio={start: 0.5, end: 0.99}"], "leaves no visible patch out of"
    ),
    "no timm name": (["model.name=vit_smal_patch16_224"], "vit_small_patch16_224"),
    "no ViT": (["model.name=resnet18"], "not a plain Vision Transformer"),
    "wrong number of images": (["data.num_images=63", "data=folder", "data.root={tmp}/images",
                                "data.num_images=9", "data.strict=true"], "data.num_images is 9"),
    "mean of another channel count": (["data.mean=[0.5]"], "data.mean has 1 numbers"),
    "fp16 without a GPU": (["precision=fp16"], "needs a GPU"),
    "tracker that is not installed": (["tracker=clearml"], "pip install clearml"),
    "unreadable output": (["output={tmp}/texts/a.txt/run"], "cannot be written"),
    "output with other files": (["output={tmp}/texts"], "other files in it"),
    "probe without labels": (
        ["data=folder", "data.root={tmp}/images", "probe=knn", "data.holdout=1"], "needs labels"
    ),
    "settings chosen on the evaluation images": (
        ["probe=linear_cached", "probe.select_on=eval"], "use holdout"
    ),
    "probe without evaluation images": (
        ["data=folder", "data.root={tmp}/images", "probe=reconstruction"], "data.holdout"
    ),
    "init that is not there": (["init={tmp}/nowhere"], "init"),
    "two budgets": (["budget_hours=1"], "give exactly one of them"),
    "no budget": (["budget_epochs=null"], "give exactly one of them"),
    "holdout of everything": (["data.holdout=64"], "leaves nothing to train on"),
}  # fmt: skip


@pytest.fixture
def recipe_file(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (24, 16), (i, 2, 3)).save(tmp_path / "images" / f"{i}.png")
    file = tmp_path / "recipe.yaml"
    tiny_recipe().save(file)
    return file


def run(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


@pytest.mark.parametrize(("overrides", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2_and_writes_nothing(
    overrides: list[str],
    words: str,
    recipe_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    filled = [text.replace("{tmp}", str(tmp_path)) for text in overrides]
    assert run(["pretrain", str(recipe_file), *filled]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("etpp: error: ")
    assert words in lines[0]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_full_disk_is_refused_before_anything_is_written(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As many checkpoints as no disk holds: 150 TB.
    overrides = ["checkpoint.keep=1000000", "model.embed_dim=512", "model.depth=4"]
    assert run(["pretrain", str(recipe_file), *overrides]) == 2
    told = capsys.readouterr().err
    assert re.search(r"has [\d.]+ [kMGT]?B free, but 1000001 more checkpoints take", told), told
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_or_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["pretrain"], ["plan"], ["probe"], ["embed"], ["export"]):
        assert run([*command, str(tmp_path / "nowhere")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_way_from_recipe_to_export(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "run")
    assert run(["plan", str(recipe_file)]) == 0
    assert "16x24" in capsys.readouterr().out
    assert run(["pretrain", str(recipe_file), "budget_epochs=0.3"]) == 0
    assert run(["pretrain", folder]) == 0
    assert "finished" in capsys.readouterr().err
    assert run(["probe", folder, "probe=knn", "probe.k=3"]) == 0
    printed = capsys.readouterr().out
    protocol, images, result, _ = printed.splitlines()
    assert protocol.startswith("probe: name=knn ")
    assert " k=3 " in protocol
    assert images.startswith("images: 24 images of ")
    assert result.startswith("knn_top1 ")
    assert (tmp_path / "run" / "report" / "probes.jsonl").read_text().count("\n") == 1
    assert run(["probe", folder, "probe=linear_cached", "probe.epochs=2"]) == 0
    printed = capsys.readouterr().out
    names = [line.split()[0].removeprefix("linear_cached_") for line in printed.splitlines()[2:]]
    assert names == ["top1", "macro_top1", "top5", "base_lr", "weight_decay", "holdout_top1"]
    row = json.loads((tmp_path / "run" / "report" / "probes.jsonl").read_text().splitlines()[-1])
    assert row["protocol"]["name"] == "linear_cached"
    assert row["linear_cached_base_lr"] in row["protocol"]["base_lrs"]
    assert run(["probe", folder]) == 2
    assert "probe=knn" in capsys.readouterr().err
    assert run(["probe", folder, "probe=knn", "model.embed_dim=24"]) == 2
    assert "another model" in capsys.readouterr().err
    assert run(["export", folder, "--to", "timm"]) == 0
    assert "export/timm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("export", "missing argument 'RUN'; see etpp export -h"),
        ("export x --to tflite",
         "invalid value for '--to': 'tflite' is not one of 'timm', 'mae', 'transformers', 'dinov3', 'pixio', "
         "'onnx'; see etpp export -h"),
        ("embed x --split test", "invalid value for '--split': 'test' is not one of 'train', 'eval'; "
         "see etpp embed -h"),
        ("export x --to", "option '--to' requires an argument; see etpp"),
        ("reconstruct x --count 0", "invalid value for '--count': it should be greater than or equal to 1"),
        ("plan --foo", "no such option: --foo; see etpp plan -h"),
        ("plan x --data.root y",
         "no such option: --data.root; a key of the recipe is given as data.root=VALUE; see etpp plan -h"),
        ("pretain x", "no such command 'pretain'; did you mean 'pretrain'; see etpp -h"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_commands_words_is_one_sentence(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"etpp: error: {sentence}")


def test_version_and_help_have_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"etpp {etpp_ssl.__version__}\n"
    for words in (["-h"], ["plan", "-h"], ["plan", "--help"]):
        assert run(words) == 0
        assert " Usage: etpp " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("begun", "completed"),
    [
        ("pl", ["plan"]),
        ("plan cifar10_vit_m", ["cifar10_vit_micro", "cifar10_vit_micro_muon", "cifar10_vit_micro_pixio"]),
        ("plan quickstart data.num_w", ["data.num_workers="]),
    ],
)
def test_a_shell_can_complete_commands_recipes_and_keys(
    begun: str,
    completed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("_ETPP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"etpp {begun}")
    monkeypatch.setenv("COMP_CWORD", str(len(begun.split())))
    run([])
    assert capsys.readouterr().out.split() == completed


def test_log_lines_and_warnings_of_libraries_do_not_reach_the_screen(
    recipe_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def library(_: Run) -> None:
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
        logging.getLogger("timm").error("something else")
        warnings.warn("this DataLoader will create many workers", UserWarning, stacklevel=1)

    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    on_step_end.append(library)
    try:
        assert run(["pretrain", str(recipe_file), "budget_epochs=0.3"]) == 0
    finally:
        on_step_end.remove(library)
        logging.getLogger().removeHandler(handler)
    printed = capfd.readouterr().err
    assert "stage 3/3" in printed
    for words in ("CUDA runtime", "something else", "many workers"):
        assert words not in printed
    assert logging.getLogger("timm").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    ("task", "name"),
    [("pretrain", "vit_base_r50"), ("pretrain", "vit_relpos_small_patch16_224"), ("pretrain", "resnet18"),
     ("finetune", "swin_tiny"), ("finetune", "maxvit")],
)  # fmt: skip
def test_a_close_name_of_timms_is_not_refused_in_turn(
    task: str, name: str, tiny_recipe: Callable[..., Recipe], tiny_classifier: Callable[..., FinetuneRecipe]
) -> None:
    sizes = ["image_size=224", "curriculum=efficienttrain", "curriculum.stages=null"]

    def take(name: str) -> None:
        if task == "pretrain":
            # One block each: what is refused is the kind of network, or a size.
            plan_run(tiny_recipe(*sizes, f"model={{name: {name}, depth: 1, decoder: {{depth: 1}}}}"))
        else:
            recipe = tiny_classifier(*sizes, f"model={{name: {name}}}")
            recipe.check_curriculum(recipe.build_curriculum(64))

    with pytest.raises(UserError) as refused:
        take(name)
    assert f"model.name '{name}' is " in str(refused.value)
    _, _, offered = str(refused.value).partition("; close names: ")
    for other in offered.split(", ") if offered else ():
        take(other)


def newest_step(folder: Path) -> int:
    return max((checkpoint.step for checkpoint in RunFolder(folder).checkpoints()), default=0)


def test_sigkill_three_times_with_other_workers_ends_in_the_same_bits(
    recipe_file: Path, tmp_path: Path, ranks: Server
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["pretrain", str(recipe_file), "budget_epochs=20"]
    assert run([*command, f"output={whole}"]) == 0
    command.append("checkpoint.every_steps=4")
    for attempt, workers in enumerate((0, 2, 1)):
        before = newest_step(cut)
        (job,) = ranks.start([*command, f"output={cut}", f"data.num_workers={workers}"], 1)
        deadline = time.monotonic() + 60
        while newest_step(cut) < before + 12 and job.code is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert job.code is None, job.text
        os.killpg(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
        assert newest_step(cut) < newest_step(whole), f"attempt {attempt} came too late"
    ranks.run([*command, f"output={cut}", "data.num_workers=3"], 1)
    a, b = (RunFolder(folder).checkpoints()[0] for folder in (whole, cut))
    assert a.step == b.step
    for tensors in ("model", "optimizer"):
        x, y = getattr(a, tensors)(), getattr(b, tensors)()
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)
    losses = [
        [(row["step"], row["loss"], row["lr"]) for row in RunFolder(folder).metrics()]
        for folder in (whole, cut)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_ends_with_a_checkpoint_and_its_code(
    signum: signal.Signals, code: int, recipe_file: Path, tmp_path: Path, ranks: Server
) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach the data workers too.
    folder = tmp_path / "run"
    overrides = ["budget_epochs=60", "data.num_workers=2", "checkpoint.every_steps=1000", "log_every_steps=1"]
    (job,) = ranks.start(["pretrain", str(recipe_file), f"output={folder}", *overrides], 1)
    deadline = time.monotonic() + 60
    while len(RunFolder(folder).metrics()) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signum)
    assert job.wait() == code, job.text
    assert "the same command resumes" in job.text
    assert "Traceback" not in job.text
    assert newest_step(folder) >= 5
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert status["step"] == newest_step(folder)
