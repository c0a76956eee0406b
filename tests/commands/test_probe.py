"""`etpp probe`: a run's newest checkpoint, or a recipe with `init`; two processes; and signals."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Server

from etpp_ssl.cli import main
from etpp_ssl.recipe import Recipe

LINEAR = ["probe=linear", "probe.epochs=6", "probe.warmup_epochs=1", "probe.base_lr=30",
          "probe.batch_size=25", "probe.micro_batch_size=6"]  # fmt: skip
ATTENTIVE = ["probe=attentive", "probe.epochs=4", "probe.batch_size=25", "probe.base_lr=3e-2"]


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture
def recipe_file(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    tiny_recipe("budget_epochs=0.3").save(file)
    return file


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "report" / "probes.jsonl").read_text().splitlines()]


def test_a_recipe_with_init_probes_those_weights(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["probe", str(recipe_file), *ATTENTIVE]) == 2
    message = capsys.readouterr().err
    assert "init is null" in message
    assert "init=FILE-or-RUN, or the folder of a run" in message

    folder = tmp_path / "run"
    assert run(["pretrain", str(recipe_file)]) == 0
    assert run(["export", str(folder)]) == 0
    capsys.readouterr()
    found = []
    out = tmp_path / "out"
    sources = [
        str(folder),
        str(folder / "export" / "timm"),
        str(folder / "export" / "timm" / "model.safetensors"),
    ]
    for init in sources:
        assert run(["probe", str(recipe_file), f"output={out}", f"init={init}", *ATTENTIVE]) == 0
        found.append(capsys.readouterr().out)
    assert run(["probe", str(folder), *ATTENTIVE]) == 0
    found.append(capsys.readouterr().out)
    assert len(set(found)) == 1
    assert "attentive_top1" in found[0]
    assert "name=attentive epochs=4" in found[0]
    assert [row["init"] for row in rows(out)] == sources
    (row,) = rows(folder)
    assert row["step"]
    # The recipe alone stands for the run in its output folder.
    assert run(["probe", str(recipe_file), *ATTENTIVE]) == 0
    assert capsys.readouterr().out == found[0]

    # And a folder that holds nothing but results of other weights can still become a run.
    assert run(["pretrain", str(recipe_file), f"output={out}"]) == 0
    assert len(rows(out)) == len(sources)

    assert run(["probe", str(folder), f"init={out}", *ATTENTIVE]) == 2
    assert "for a run its own checkpoint is probed" in capsys.readouterr().err


def test_the_protocol_is_a_line_and_numbers_have_something_to_stand_beside(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pretrain", str(recipe_file), "probe=knn", "probe.every_steps=3"]) == 0
    capsys.readouterr()
    folder = tmp_path / "run"
    assert run(["probe", str(folder), "--untrained"]) == 0
    protocol, images, trained, macro, untrained, _ = capsys.readouterr().out.splitlines()
    assert "every_steps" not in protocol
    assert "; without looking: 10 % by chance, " in images
    (row,) = rows(folder)
    assert trained == f"knn_top1 {row['knn_top1']:.6g} %"
    assert macro == f"knn_macro_top1 {row['knn_macro_top1']:.6g} %"
    assert untrained == f"untrained_knn_top1 {row['untrained']['untrained_knn_top1']:.6g} %"
    # The reference is what the encoder of step 0 has.
    first = tmp_path / "first"
    assert run(["pretrain", str(recipe_file), f"output={first}", "optim.base_lr=1e-30"]) == 0
    capsys.readouterr()
    assert run(["probe", str(first), "probe=knn"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == untrained.removeprefix("untrained_")
    # A loss is no accuracy.
    assert run(["probe", str(folder), "probe=reconstruction"]) == 0
    assert "without looking" not in capsys.readouterr().out


def test_two_gloo_processes_give_the_numbers_of_one_without_a_cache(
    recipe_file: Path, tmp_path: Path, ranks: Server
) -> None:
    # With one, and for the other probes: tests/contracts/test_probes.py.
    overrides = [*ATTENTIVE, "probe.cache=false"]
    assert run(["pretrain", str(recipe_file)]) == 0
    arguments = ["probe", str(recipe_file), f"init={tmp_path / 'run'}", "data.num_eval_images=25", *overrides]
    assert run([*arguments, f"output={tmp_path / '1'}"]) == 0
    ranks.run([*arguments, f"output={tmp_path / '2'}"], 2)
    ((one,), (two,)) = (rows(tmp_path / str(count)) for count in (1, 2))
    numbers = [key for key in one if key not in ("init", "protocol", "data")]
    assert numbers
    for key in numbers:
        assert one[key] == pytest.approx(two[key], rel=1e-4)


def test_a_signal_ends_a_long_probe_with_its_state_and_the_same_command_goes_on(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: Server
) -> None:
    assert run(["pretrain", str(recipe_file)]) == 0
    arguments = ["probe", str(tmp_path / "run"), *LINEAR, "probe.epochs=80", "probe.save_minutes=1e-4"]
    (job,) = ranks.start([*arguments, "data.num_workers=1"], 1)
    report = tmp_path / "run" / "report"
    deadline = time.time() + 60
    while not list(report.glob("linear_probe-*")) and job.code is None and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(60) == 75, job.text
    output = job.text
    assert "the same command resumes it" in output
    assert "Traceback" not in output
    assert len(list(report.glob("linear_probe-*"))) == 1
    capsys.readouterr()
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert "resumes after step" in said.err
    assert "linear_top1" in said.out
    assert not list(report.glob("*linear_probe-*"))
