"""Two processes of which one has the bad batch: one verdict, one dump, one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty_runs import paint_images
from ranks import Server

from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.debug.report import diagnosis
from etpp_ssl.debug.reproduce import reproduce

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
# In a run that stops, the healthy first step is dumped too; in one that skips, the second one's disk is full.
WATCHED = """
from pathlib import Path
from etpp_ssl.train import dump
from etpp_ssl.train.nonfinite import on_gradients

policy, file = {policy!r}, Path({folder!r}, f"{policy}-{{rank}}.txt")

def note(run, loss, norm):
    with file.open("a") as notes:
        notes.write(f"loss {{float(loss)}}\\nnorm {{float(norm)}}\\n")
    if policy == "stop" and run.state.step == 0:
        dump.write_dump(run, 0, run.batches.kept[0])

def full(*arguments):
    raise OSError(28, "No space left on device")

on_gradients.append(note)
if policy == "skip" and rank == 1:
    dump.save_tensors = full
"""


def run_two(ranks: Server, folder: Path, policy: str, code: int) -> tuple[list[dict[str, list[str]]], str]:
    """What each process found, and what both have written; the white image is the second process's."""
    arguments = ["pretrain", str(folder / "recipe.yaml"), f"output={folder / policy}",
                 f"data.root={folder / 'images'}", f"nonfinite.policy={policy}",
                 "data.std=[1e-39, 1e-39, 1e-39]"]  # fmt: skip
    jobs = ranks.start(arguments, 2, before=WATCHED.format(policy=policy, folder=str(folder)))
    assert [job.wait() for job in jobs] == [code, code], "".join(job.text for job in jobs)
    found: list[dict[str, list[str]]] = []
    for rank in range(2):
        found.append({"loss": [], "norm": []})
        for line in (folder / f"{policy}-{rank}.txt").read_text().splitlines():
            kind, value = line.split()
            found[-1][kind].append(value)
    return found, "".join(job.text for job in jobs)


def test_what_one_process_meets_ends_both_with_one_dump_and_one_line(ranks: Server, tmp_path: Path) -> None:
    paint_images(tmp_path / "images", bright=KeyedOrder(64, seed=3).index(20))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (stopped, other_stopped), told = run_two(ranks, tmp_path, "stop", code=1)
    assert len(stopped["loss"]) == len(other_stopped["loss"]) == 2
    dump = tmp_path / "stop/dumps/step-00000002"
    assert told.count(f"of step 2 (samples 11 to 21) are not finite; etpp replay-nan {dump}") == 1
    assert {folder.name for folder in dump.parent.iterdir()} == {"step-00000001", dump.name}
    assert {file.name for file in dump.iterdir()} >= {"rank-0.safetensors", "rank-1.safetensors"}

    replayed = reproduce(dump)
    assert replayed.reproduced
    assert [str(loss) for loss in replayed.process_losses] == [
        stopped["loss"][1],
        other_stopped["loss"][1],
    ]
    assert float(stopped["loss"][1]) < float("inf")
    assert [(bad.rank, bad.number) for bad in replayed.micro_batches] == [(1, 1)]
    assert [(sample.rank, sample.number, sample.what) for sample in replayed.samples] == [(1, 20, "input")]
    assert diagnosis(replayed).startswith("reproduced: the input of sample 20 (")

    healthy = reproduce(dump.with_name("step-00000001"))
    assert not healthy.reproduced
    seen = [process["loss"][0] for process in (stopped, other_stopped)]
    assert [str(loss) for loss in healthy.process_losses] == seen
    assert healthy.gradient_norm == pytest.approx(float(stopped["norm"][0]), rel=1e-6)

    (skipped, other_skipped), told = run_two(ranks, tmp_path, "skip", code=0)
    assert len(skipped["loss"]) == len(other_skipped["loss"]) == 3
    warning = (
        "step 2 is not finite, but no dump of it was written: process 1: [Errno 28] No space left on device"
    )
    assert told.count(warning) == told.count("no dump of it") == 1
    assert told.count("are not finite; the step is left out") == 1
    assert list((tmp_path / "skip/dumps").iterdir()) == []
