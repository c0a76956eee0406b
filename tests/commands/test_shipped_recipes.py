"""`etpp recipes`, and recipes by name on the command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from etpp_ssl.cli import main
from etpp_ssl.commands.keys import purpose
from etpp_ssl.recipe import load_any
from etpp_ssl.recipe_file import shipped_recipes


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_every_recipe_has_a_purpose_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    for name, file in shipped_recipes().items():
        assert 30 < len(purpose(file)) < 112, name
        assert "\n" not in purpose(file)
    assert "The whole method in a few minutes" in next(
        line for line in lines if line.startswith("quickstart")
    )


def test_a_recipe_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["recipes", "finetune_vit_large"]) == 0
    printed = capsys.readouterr().out
    assert printed == shipped_recipes()["finetune_vit_large"].read_text()
    (tmp_path / "mine.yaml").write_text(printed)
    assert run(["plan", str(tmp_path / "mine.yaml"), *TINY]) == 0
    assert run(["plan", "finetune_vit_large", *TINY]) == 0
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :]


TINY = ["model={name: vit, patch_size: 16, embed_dim: 8, depth: 1, num_heads: 2, num_classes: 2}",
        "optim.layer_decay=null"]  # fmt: skip


@pytest.mark.parametrize("command", ["recipes", "pretrain", "finetune", "plan", "probe", "embed"])
def test_an_unknown_name_is_one_sentence_with_close_names(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([command, "cifar10_vit_mirco"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    what = "recipe" if command == "recipes" else "recipe or run"
    assert f"error: {what} 'cifar10_vit_mirco' does not exist; " in line
    assert "cifar10_vit_micro" in line
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_trained_in_its_own_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["data.num_images=64", "data.num_workers=0", "budget_epochs=1", "probe=none", "batch_size=16"]
    assert run(["pretrain", "quickstart", *few]) == 0
    assert (tmp_path / "runs" / "quickstart" / "recipe.yaml").is_file()


STAND_INS = {
    name: re.findall(r"data[.\w]*=\S+", line)
    for name, file in shipped_recipes().items()
    for line in file.read_text().splitlines()
    if line.startswith("# Stand-in:")
}
SMALL = ["image_size=32", "model.patch_size=8", "model.embed_dim=24", "model.depth=1", "model.num_heads=2",
         "model.decoder={embed_dim: 16, depth: 1, num_heads: 2}", "precision=fp32", "budget_epochs=1",
         "batch_size=16", "curriculum.stages=[{bandwidth: 16, share: 0.5}, {bandwidth: 32, share: 0.5}]",
         "data.num_images=48", "data.num_eval_images=16", "data.num_workers=0", "data.range=null",
         "probe.every_steps=null"]  # fmt: skip


def test_there_are_stand_ins() -> None:
    assert sorted(STAND_INS) == ["dicom_xray_vit_small", "eurosat_ms_vit_small", "microscopy_5ch_vit_small"]


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_is_inspected_and_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", name, *STAND_INS[name], *SMALL, "--write", "mine.yaml"]) == 0
    assert run(["pretrain", "mine.yaml", "output=run"]) == 0
    assert "outside data.range" not in capsys.readouterr().err
    recipe = load_any("run")
    own = load_any(name)
    assert recipe.in_chans == own.in_chans
    assert recipe.data.range is not None
    assert recipe.data.mean is not None
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    # Without a range 8 bits would lose them.
    assert run(["pretrain", name, *STAND_INS[name], *SMALL, "output=other"]) == 2
    assert "etpp inspect" in capsys.readouterr().err
    assert not Path("other").exists()
