"""The result of an evaluation for several processes, uneven parts and parts without an image among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import Server

SCRIPT = """
import json
import timm, torch
from accelerate import Accelerator
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sources.splits import Subset
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.dist.peers import leave
from etpp_ssl.evaluation.classification import ClassifierEvaluation, EvaluateConfig

class Damaged(Subset):
    def open(self, index):
        if index in (4, 5, 11):
            raise UnreadableImage("damaged")
        return super().open(index)

accelerator, size, results = Accelerator(cpu=True), (32, 64), []
torch.manual_seed(0)
args = {"img_size": size, "depth": 1, "num_heads": 2, "embed_dim": 32, "num_classes": 10}
model = timm.create_model("vit_tiny_patch16_224", **args)
for count in (13, 2, 1):
    source = SyntheticConfig(num_eval_images=count, num_classes=10).open(
        "eval", in_chans=3, image_size=size, seed=0)
    found = ClassifierEvaluation(
        source=Damaged(source, list(range(count))), view=EvalView(size, 1.0),
        normalise=Normalise((0.5,) * 3, (0.25,) * 3, accelerator.device), accelerator=accelerator,
        num_workers=0, num_classes=10, config=EvaluateConfig(batch_size=4)).run(model)
    results.append([found.numbers(), found.recall, found.confusion.tolist()])
with open(f"{out}.{rank}", "w") as file:
    json.dump(results, file)
leave(accelerator)
"""


def test_any_number_of_processes_finds_the_same_even_with_fewer_images(ranks: Server, tmp_path: Path) -> None:
    found = []
    for count in (1, 3):
        out = str(tmp_path / str(count))
        ranks.run(None, count, before=f"out = {out!r}\n{SCRIPT}")
        found += [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(count)]
    one, *others = found
    assert [numbers["num_images"] for numbers, *_ in one] == [10, 2, 1]
    assert [numbers["num_unreadable"] for numbers, *_ in one] == [3, 0, 0]
    for other in others:
        for (numbers, *counts), (expected, *expected_counts) in zip(other, one, strict=True):
            assert counts == expected_counts
            # Kernels for batches of another size may round otherwise.
            assert numbers == pytest.approx(expected, rel=1e-5)
