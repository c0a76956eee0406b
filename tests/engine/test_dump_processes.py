"""Two processes of which one has the bad batch: one verdict, one dump, one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_runs import paint_images

from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.engine.replay_nan import replay_nan
from etpp_ssl.engine.replay_report import diagnosis

RECIPE = """
seed: 3
output: unused
image_size: [16, 24]
budget_epochs: 0.5
batch_size: 11
micro_batch_size: 4
precision: fp32
data: {name: folder, root: unused, mean: [0, 0, 0], num_workers: 0}
curriculum: {name: constant}
model: {name: vit, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2,
        decoder: {embed_dim: 8, depth: 1, num_heads: 2}}
checkpoint: {every_minutes: null}
"""
# Each process runs twice: it stops, and dumps its healthy first step too; then it skips, while the second
# process's disk is full.
SCRIPT = """
import json, os, sys
from pathlib import Path
from etpp_ssl.cli import main
from etpp_ssl.engine import dump
from etpp_ssl.engine.nonfinite import Guard
from etpp_ssl.engine import nonfinite

folder, rank, found = Path(sys.argv[1]), int(os.environ["RANK"]), []
verdict, whole = Guard._verdict, nonfinite._whole

def noted_verdict(self):
    losses.append(float(self.meter.step_loss()))
    bad = verdict(self)
    if policy == "stop" and self.run.state.step == 0:
        dump.write_dump(self.run, 0, self.feed.kept[0])
    return bad

def noted_norm(norm):
    norms.append(float(norm))
    return whole(norm)

def full(*arguments):
    raise OSError(28, "No space left on device")

Guard._verdict, nonfinite._whole = noted_verdict, noted_norm
for policy in ("stop", "skip"):
    losses, norms = [], []
    if policy == "skip" and rank == 1:
        dump.save_file = full
    code = 0
    try:
        main(["pretrain", str(folder / "recipe.yaml"), f"output={folder / policy}",
              f"data.root={folder / 'images'}", f"nonfinite.policy={policy}", *sys.argv[2:]])
    except SystemExit as end:
        code = end.code
    found.append({"code": code, "losses": [str(x) for x in losses], "norms": [str(x) for x in norms]})
(folder / f"found.{rank}").write_text(json.dumps(found))
"""


def run_two(folder: Path, std: float) -> tuple[list[list[dict[str, list[str]]]], str]:
    """What each process found, and what both have written; the white image is the second process's."""
    paint_images(folder / "images", bright=KeyedOrder(64, seed=3).index(20))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(folder / "script.py"), str(folder), f"data.std=[{std}, {std}, {std}]"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"found.{rank}").read_text()) for rank in range(2)], done.stderr


def test_what_one_process_meets_ends_both_with_one_dump_and_one_line(tmp_path: Path) -> None:
    found, told = run_two(tmp_path, std=1e-39)
    (stopped, skipped), (other_stopped, other_skipped) = found
    assert stopped["code"] == other_stopped["code"] == 1
    assert len(stopped["losses"]) == len(other_stopped["losses"]) == 2
    dump = tmp_path / "stop/dumps/step-00000002"
    assert told.count(f"of step 2 (samples 11 to 21) are not finite; etpp replay-nan {dump}") == 1
    assert {folder.name for folder in dump.parent.iterdir()} == {"step-00000001", dump.name}
    assert {file.name for file in dump.iterdir()} >= {"rank-0.safetensors", "rank-1.safetensors"}

    replayed = replay_nan(dump)
    assert replayed.reproduced
    assert [str(loss) for loss in replayed.process_losses] == [
        stopped["losses"][1],
        other_stopped["losses"][1],
    ]
    assert float(stopped["losses"][1]) < float("inf")
    assert [(bad.rank, bad.number) for bad in replayed.micro_batches] == [(1, 1)]
    assert [(sample.rank, sample.number, sample.what) for sample in replayed.samples] == [(1, 20, "input")]
    assert diagnosis(replayed).startswith("reproduced: the input of sample 20 (")

    healthy = replay_nan(dump.with_name("step-00000001"))
    assert not healthy.reproduced
    seen = [process["losses"][0] for process in (stopped, other_stopped)]
    assert [str(loss) for loss in healthy.process_losses] == seen
    assert healthy.gradient_norm == pytest.approx(float(stopped["norms"][0]), rel=1e-6)

    assert skipped["code"] == other_skipped["code"] == 0
    assert len(skipped["losses"]) == len(other_skipped["losses"]) == 3
    warning = (
        "step 2 is not finite, but no dump of it was written: process 1: [Errno 28] No space left on device"
    )
    assert told.count(warning) == told.count("no dump of it") == 1
    assert told.count("are not finite; the step is left out") == 1
    assert list((tmp_path / "skip/dumps").iterdir()) == []
