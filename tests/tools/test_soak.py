"""The soak's arithmetic and checks; nothing is launched here."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soak
import torch
from safetensors.torch import save_file
from soak_checks import (
    End,
    differences,
    end_faults,
    last_line,
    metrics_faults,
    output_faults,
    row_differences,
    same_bits,
    status_faults,
)
from soak_job import newest_row
from soak_memory import Growth, Sample, fit_slope, growth_table, growths, take
from soak_plan import KINDS, NEED_WORKER, plan_blow, plan_workers
from soak_report import blow_table, memory_faults, step_table, summary

from etpp_ssl.run_folder import RunFolder

EVERY = (20.0, 90.0)
END = End(
    launch="soaked 1",
    kind="term launcher",
    hit="launcher",
    outcome="due",
    exit_code=1,
    seconds=2.0,
    step=120,
    checkpoint=125,
    interval=25,
    left=[],
    status={"state": "stopped", "step": 125, "exit_code": 75},
)


def test_the_slope_and_its_error_are_polyfits() -> None:
    draw = np.random.default_rng(0)
    x = np.sort(draw.uniform(3, 9, 60))
    y = 0.7 * x + 5 + draw.normal(size=60)
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    fit = fit_slope(x.tolist(), y.tolist())
    assert fit.slope == pytest.approx(slope, rel=1e-9)
    assert fit.plain_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)
    assert fit.error >= fit.plain_error


def test_a_jump_between_stages_is_no_slope() -> None:
    x = list(range(40))
    stages = [i // 20 for i in x]
    y = [100 + 0.5 * i + 30 * stage for i, stage in zip(x, stages, strict=True)]
    assert fit_slope(x, y).slope > 1
    assert fit_slope(x, y, stages).slope == pytest.approx(0.5, abs=1e-9)


def test_the_error_of_a_random_walk_is_not_taken_for_that_of_white_noise() -> None:
    draw = np.random.default_rng(1)
    beyond = {"plain": 0, "allowing": 0}
    for _ in range(100):
        fit = fit_slope(range(300), np.cumsum(draw.normal(size=300)).tolist())
        beyond["plain"] += abs(fit.slope) > 2 * fit.plain_error
        beyond["allowing"] += abs(fit.slope) > 2 * fit.error
    assert beyond["plain"] > 80
    assert beyond["allowing"] < 55


def test_points_that_say_nothing_have_an_infinite_error() -> None:
    assert fit_slope([1, 2], [3, 4]).error == math.inf
    assert fit_slope([1, 1, 1, 1], [3, 4, 5, 6]).error == math.inf
    assert fit_slope([], []).error == math.inf


def sampled(megabytes_per_minute: float, *, seconds: int = 200, last_step: int = 1000) -> list[Sample]:
    """Of one rank that trains from the 20th second on and is done 20 seconds before the end.

    Its second stage takes 20 MB more, half of them at once, and before a row of metrics tells of the stage; a
    probe takes 1 GB, and no row tells of it at first.
    """
    noise = np.random.default_rng(2).normal(scale=2e5, size=seconds)
    rows, change, end = [], 20 + round(0.6 * (seconds - 40)), seconds - 20
    for second in range(seconds):
        step = -1 if second < 20 else min(last_step, round((second - 20) / (seconds - 40) * last_step))
        rss = 5e8 + megabytes_per_minute / 60 * second * 1e6 + noise[second]
        rss += 1e7 * (second > change - 3) + 1e7 * min(max(second - change, 0) / 15, 1)
        rss += 1e9 * (second > end - 3)
        rows.append(
            Sample("reference", "rank 0", 7, second, step, int(second > change), int(rss), None, None)
        )
    return rows


def test_growth_is_measured_over_the_second_half_of_training_alone() -> None:
    (growth,) = growths(sampled(3.0), last_step=1000, min_seconds=30)
    assert (growth.process, growth.quantity) == ("rank 0", "rss")
    assert growth.minutes == pytest.approx(75 / 60, abs=0.05)
    assert growth.per_minute.slope == pytest.approx(3.0, abs=0.3)
    # 1000 steps in 160 seconds.
    assert growth.per_1000_steps.slope == pytest.approx(8.0, abs=0.8)
    assert not growths(sampled(3.0), last_step=10, min_seconds=30)
    assert growth.verdict(60) == "GROWS"
    assert memory_faults([growth], 60)
    assert not growths(sampled(3.0), last_step=1000, min_seconds=100)
    assert "GROWS" in growth_table([growth], 60)[1]


def test_what_does_not_grow_is_steady_and_what_is_too_short_is_undecided() -> None:
    (rank,) = growths(sampled(0.0, seconds=400), last_step=1000, min_seconds=30)
    worker = replace(rank, process="rank 0 worker 0")
    assert rank.verdict(60) == "steady"
    assert not memory_faults([rank, worker], 60)
    unsure = replace(worker, per_minute=replace(worker.per_minute, error=5.0))
    assert unsure.verdict(60) == "undecided"
    assert "any data worker" in memory_faults([rank, unsure], 60)[0]
    assert not memory_faults([rank, worker, unsure], 60)
    assert len(memory_faults([], 60)) == 2


def test_pss_is_shown_but_not_judged_because_other_programs_change_it() -> None:
    (growth,) = growths(sampled(9.0), last_step=1000, min_seconds=30)
    pss = replace(growth, quantity="pss")
    assert "not judged" in growth_table([pss], 60)[1]
    assert all("too short" in fault for fault in memory_faults([pss], 60))


def test_this_process_can_be_sampled(tmp_path: Path) -> None:
    named = [("rank 0", psutil.Process())]
    (sample,) = take(tmp_path / "memory.jsonl", "reference", 1.0, (3, 1), named)
    assert sample.rss > 10**7
    assert sample.pss is None or sample.rss >= sample.pss >= (sample.anon or 0) > 10**6
    assert json.loads((tmp_path / "memory.jsonl").read_text()) == vars(sample)


def test_blows_are_a_function_of_seed_and_number_with_every_kind_in_each_round() -> None:
    blows = [plan_blow(3, number, EVERY) for number in range(60)]
    assert blows == [plan_blow(3, number, EVERY) for number in range(60)]
    assert [b.kind for b in blows] != [plan_blow(4, number, EVERY).kind for number in range(60)]
    for start in range(0, 60, len(KINDS)):
        assert {blow.kind for blow in blows[start : start + len(KINDS)]} == {*KINDS}
    assert all(20 <= blow.after <= 90 and 0 <= blow.where < 1 for blow in blows)
    assert len({blow.after for blow in blows}) == 60


def test_a_launch_has_a_worker_if_its_blow_needs_one() -> None:
    counts = Counter()
    for number in range(200):
        workers = plan_workers(5, number)
        counts[workers] += 1
        assert workers or plan_blow(5, number, EVERY).kind not in NEED_WORKER
    assert {*counts} == {0, 1, 2, 3}


def write_run(folder: Path) -> RunFolder:
    """A finished run of 4 steps with rows of losses and of a probe."""
    checkpoint = folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.tensor([1.0, -2.0, math.nan])}, checkpoint / "model.safetensors")
    save_file({"weight.exp_avg": torch.zeros(3, 5)}, checkpoint / "optimizer.safetensors")
    files = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    state = {"step": 4, "loss_sum": 0.0, "seconds": float(len(str(folder)))}
    (checkpoint / "state.json").write_text(json.dumps({"files": files, "state": state}))
    rows = [{"step": step, "loss": 1 / (step + 1), "seconds": 0.1 * step} for step in (2, 4)]
    rows.append({"step": 4, "knn_top1": 20.5})
    run = RunFolder(folder)
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_equal_runs_have_no_differences_timings_apart(tmp_path: Path) -> None:
    assert differences(write_run(tmp_path / "a"), write_run(tmp_path / "another")) == []


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_one_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    file = second.checkpoints()[0].path / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (found,) = differences(first, second)
    assert found.startswith(f"{name} tensor weight")


def test_bits_tell_zero_from_minus_zero_and_types_and_shapes_apart() -> None:
    zero = torch.zeros(())
    assert same_bits(zero, zero.clone())
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.int())
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))


def test_a_missing_row_and_a_changed_loss_are_found(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    lines = second.metrics_file.read_text().splitlines(keepends=True)
    second.metrics_file.write_text("".join(lines[1:]))
    (found,) = differences(first, second)
    assert "3 and 2 rows" in found
    assert "(2, True)" in found
    second.metrics_file.write_text("".join([lines[0].replace("0.33", "0.34"), *lines[1:]]))
    assert differences(first, second) == ["metrics of step 2 differ in loss"]
    second.metrics_file.write_text("".join([lines[0], *lines]))
    assert row_differences(first.metrics(), second.metrics())


def test_runs_of_other_lengths_or_without_a_checkpoint_differ(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    folder = second.checkpoints()[0].path
    folder.rename(folder.with_name("step-00000005"))
    assert differences(first, second) == ["newest checkpoints are of steps 4 and 5"]
    assert "no checkpoint" in differences(first, RunFolder(tmp_path / "c"))[0]


def test_rows_that_do_not_parse_or_do_not_rise_are_found_but_a_cut_end_is_not() -> None:
    rows = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 2, "knn_top1": 3}\n'
    assert metrics_faults(rows) == []
    assert metrics_faults(rows + '{"step": 3, "lo') == []
    assert "line 4" in metrics_faults(rows + '{"step": 3, "lo\n')[0]
    assert "step 2 after step 2" in metrics_faults(rows + '{"step": 2, "loss": 1}\n')[0]


def test_the_newest_row_is_the_last_whole_row_of_losses(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert newest_row(file) is None
    file.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 2, "knn_top1": 3}\n{"step": 3,')
    assert newest_row(file) == {"step": 2, "loss": 1}


def test_a_traceback_and_silence_are_faults_unless_the_process_was_killed() -> None:
    said = "warning: x\netpp: stopped by SIGTERM after step 125\n"
    trace = "Traceback (most recent call last):\n"
    train = {"started": True}
    assert output_faults({"launcher": trace, "rank 0": said, "rank 1": ""}, None, **train) == []
    assert output_faults({"rank 0": said, "rank 1": trace}, None, **train) == ["rank 1 printed a traceback"]
    assert output_faults({"rank 0": said, "rank 1": trace}, "rank 1", **train) == []
    assert "sentence" in output_faults({"rank 0": "", "rank 1": ""}, "rank 1", **train)[0]
    assert output_faults({"rank 0": "", "rank 1": ""}, None, started=False) == []
    assert output_faults({"rank 0": trace, "rank 1": ""}, None, started=False)
    assert last_line("a\n b \n\n") == "b"


def test_a_status_that_is_not_true_is_a_fault() -> None:
    assert status_faults(END) == []
    assert status_faults(replace(END, status=None)) == []
    assert status_faults(replace(END, status="{"))
    assert status_faults(replace(END, checkpoint=100))
    assert status_faults(replace(END, status={"state": "running", "step": 120}))
    killed = replace(END, kind="kill all", status={"state": "running", "step": 120})
    assert status_faults(killed) == []
    assert status_faults(replace(killed, kind="kill rank", hit="rank 0")) == []
    assert status_faults(replace(killed, kind="kill rank", hit="rank 1"))
    finished = replace(END, kind=None, outcome="ended", exit_code=0)
    assert status_faults(replace(finished, status={"state": "finished", "step": 500})) == []
    assert status_faults(finished)
    assert (END.told, replace(END, status=None).told) == ("status stopped at 125", "no status")


def test_what_an_end_leaves_is_judged(tmp_path: Path) -> None:
    run, printed = write_run(tmp_path), {"rank 0": "etpp: stopped by SIGTERM after step 125"}
    assert end_faults(END, run, printed) == []
    assert "asked to stop" in end_faults(replace(END, step=130), run, printed)[0]
    assert "every 25" in end_faults(replace(END, kind="kill rank", step=151, status=None), run, printed)[0]
    assert "by itself" in end_faults(replace(END, kind=None, outcome="ended"), run, printed)[0]
    assert "is left" in end_faults(replace(END, left=["7 (running, parent 1)"]), run, printed)[0]
    (run.checkpoints()[0].path / "model.safetensors").write_bytes(b"")
    assert "0 bytes" in end_faults(END, run, printed)[0]


def test_tables_and_summary_say_what_was_found() -> None:
    killed = replace(END, kind="kill all", exit_code=-9, seconds=0.5, step=140, status=None)
    ends = [END, killed, replace(END, kind=None, outcome="ended", exit_code=0, step=500, checkpoint=500)]
    growth = Growth("reference", "rank 1", "rss", 4.0, *[fit_slope(range(9), range(9))] * 2, 1.0, 2.0)
    assert "15, 15  -9 x 1" in next(line for line in blow_table(ends) if line.startswith("kill all"))
    assert len(step_table(ends)) == 4
    lines = summary("a run", ends, [growth], 60, [])
    assert "ended by 2 blows, in 2.0 s at most; at most 15 logged steps" in lines[1]
    assert "to the bit" in lines[2]
    assert "+60.0 +- 0.0 MB/hour (rank 1, rss)" in lines[3]
    assert lines[4] == "PASSED: 0 faults"
    unequal = summary("a run", ends, [], 60, ["equality: model tensor x differs"])
    assert unequal[2].endswith("(1 in all, first equality: model tensor x differs)")
    assert "never compared" in summary("a run", ends[:2], [], 60, ["soaked 2: hangs"])[2]


def test_the_length_follows_from_a_timed_epoch() -> None:
    rows = [{"step": 4 * i, "loss": 1, "seconds": 3 + i, "equivalent_epochs": 0.1 * i} for i in range(1, 11)]
    assert soak.epochs_for([*rows, {"step": 40, "knn_top1": 1}], 432) == pytest.approx(43.2)
    assert soak.epochs_for(rows, 1) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kill-every", "20"], "20..90"),
        (["--kill-every", "90..20"], "smaller"),
        (["--processes", "0"], "--processes"),
        (["--kinds", "kill all,kill bill"], "kill launcher"),
        (["model.depht=2"], "did you mean"),
        (["--folder", "{full}"], "not empty"),
    ],
)
def test_a_mistake_in_the_arguments_is_a_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("")
    recipe = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
    filled = [text.replace("{full}", str(tmp_path / "full")) for text in arguments]
    with pytest.raises(SystemExit) as error:
        soak.parse([recipe, "--folder", str(tmp_path / "new"), *filled])
    assert error.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
