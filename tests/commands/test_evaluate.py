"""`etpp evaluate`, and other commands on a classifier: what they print, and where they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Server
from tiny_runs import written

from etpp_ssl.cli import main
from etpp_ssl.evaluation.features import read_embeddings
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder

Write = Callable[..., Path]
RESNET = ["model={name: resnet18, args: {layers: [1, 1, 1, 1], channels: [8, 8, 16, 32]}}", "image_size=32",
          "curriculum=constant"]  # fmt: skip


def etpp(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture
def write_run(tiny_classifier: Callable[..., FinetuneRecipe]) -> Write:
    """The folder of a classifier with random weights."""
    return lambda *overrides: written(tiny_classifier(*overrides))


def test_each_split_and_data_set_has_its_result(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run()
    for overrides in ([], ["evaluate.split=train"], ["data.seed=4"], ["data.num_workers=1"]):
        assert etpp("evaluate", run, *overrides) == 0
    places = {line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation: ")}
    folders = sorted(path.name for path in (run / "report" / "evaluation").iterdir())
    assert len(places) == len(folders) == 3
    assert folders[0] == "eval"
    assert folders[1].startswith("eval-")
    assert folders[2] == "train"
    found = {e["data"]["root"]: e for e in RunFolder(run).evaluations()}
    assert found["synthetic train"]["data"]["trained_on"] == 64
    assert found["synthetic eval"]["data"] | {"fingerprint": ""} == {
        "data": "synthetic", "root": "synthetic eval", "split": "eval", "holdout": 0, "num_images": 24,
        "fingerprint": "", "trained_on": 0,
    }  # fmt: skip


def test_a_run_without_classes_is_told_what_measures_it(
    tiny_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    recipe.save(Path(recipe.output) / "recipe.yaml")
    for overrides in ([], ["evaluate.split=train"]):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", recipe.output, *overrides])
        assert ended.value.code == 2
        assert f"`etpp probe {recipe.output}` measures its encoder" in capsys.readouterr().err


def test_training_images_are_marked_and_stand_in_no_card(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run()
    assert etpp("evaluate", run, "evaluate.split=train") == 0
    printed = capsys.readouterr().out.splitlines()
    assert "(training images)" in printed[0]
    assert all("(training images)" in line for line in printed if line.startswith(("top", "mean", "cal")))
    assert etpp("export", run) == 0
    card = (run / "export" / "timm" / "README.md").read_text()
    assert "Nothing was measured with these weights on images that they were not trained on" in card
    assert etpp("evaluate", run) == 0
    assert "training images" not in capsys.readouterr().out
    assert etpp("export", run) == 0
    card = (run / "export" / "timm" / "README.md").read_text()
    assert card.count("| top-1 (%) |") == 1
    assert "on 24 images of synthetic eval, split eval, fingerprint " in card


def test_out_names_a_folder_or_a_file(write_run: Write, tmp_path: Path) -> None:
    run = write_run()
    assert etpp("evaluate", run, "--out", tmp_path / "mine.json") == 0
    assert json.loads((tmp_path / "mine.json").read_text())["protocol"]["step"] == 5
    assert etpp("evaluate", run, "--out", tmp_path / "mine") == 0
    assert (tmp_path / "mine" / "confusion.png").is_file()
    assert not (run / "report").exists()
    assert etpp("evaluate", run, "--out", run) == 2
    assert (run / "recipe.yaml").is_file()


@pytest.mark.parametrize("command", [["evaluate"], ["export", "--out", "{tmp}/out"]])
def test_two_at_once_do_not_destroy_each_others_files(
    command: list[str], write_run: Write, tmp_path: Path, ranks: Server
) -> None:
    run = write_run()
    arguments = [argument.format(tmp=tmp_path) for argument in (command[0], str(run), *command[1:])]
    jobs = [job for _ in range(2) for job in ranks.start(arguments, 1)]
    assert [job.wait() for job in jobs] == [0, 0], [job.text for job in jobs]
    assert not [path for path in tmp_path.rglob(".*") if path.name.startswith((".writing-", ".old-"))]


@pytest.mark.parametrize("model", [[], RESNET])
def test_probes_embeddings_and_reports_take_a_classifier(
    model: list[str], write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(*model)
    width = 32 if model else 16
    for probe in (["knn"], ["linear_cached", "probe.epochs=2"], ["attentive", "probe.epochs=2"],
                  ["linear", "probe.epochs=2", "probe.warmup_epochs=1"]):  # fmt: skip
        assert etpp("probe", run, f"probe={probe[0]}", *probe[1:]) == 0
        assert f"\n{probe[0]}_top1 " in capsys.readouterr().out
    assert etpp("probe", run, "probe=reconstruction") == 2
    assert "needs a decoder, which a classifier" in capsys.readouterr().err
    assert etpp("reconstruct", run) == 2
    assert "is of a classifier, which predicts classes, not pixels" in capsys.readouterr().err
    assert etpp("embed", run) == 0
    found = read_embeddings(run / "embeddings" / "train.safetensors")
    assert found.rows.features.shape == (64, width)
    assert found.notes["split"] == "train"
    assert found.notes["trained_on"] == "64"
    assert etpp("evaluate", run) == 0
    assert etpp("report", run) == 0
    page = (run / "report" / "index.html").read_text()
    for words in ("A classifier predicts classes, not pixels.", "by etpp probe", "best knn_top1"):
        assert words in page
    assert "best top1, evaluate" in page
    assert "last crop_pct" not in page


@pytest.mark.parametrize("command", ["export", "report", "reconstruct"])
def test_only_one_of_several_processes_writes_what_one_can(
    command: str, write_run: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run()
    before = sorted(run.rglob("*"))
    monkeypatch.setenv("RANK", "1")
    assert etpp(command, run) == 0
    assert sorted(run.rglob("*")) == before
    assert capsys.readouterr() == ("", "")
