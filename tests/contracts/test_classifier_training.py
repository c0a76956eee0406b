"""Every family of the paper's Table 7, trained across its stages: the same bits whatever interrupts it.

The smallest member each, cut down in depth and width, on synthetic images; and every family's recipes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from classifier_families import FAMILIES
from safetensors.torch import load_file

from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import finetune

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("in1k_*_etpp200.yaml"))

TRAINING = """
task: finetune
seed: 1
output: unused
image_size: [128, 96]
budget_epochs: 1.75
batch_size: 4
precision: fp32
log_every_steps: 2
data: {name: synthetic, num_images: 24, num_eval_images: 7, num_classes: 3, num_workers: 0}
curriculum:
  name: efficienttrain
  stages:
  - {bandwidth: [64, 64], share: 0.12}
  - {bandwidth: [96, 96], share: 0.37}
  - {bandwidth: [128, 96], share: 0.51}
augment: {ramp: true}
optim: {base_lr: 1e-2, ema: 0.9, clip_grad: 5.0}
checkpoint: {every_minutes: null, every_steps: 2}
"""


def build(family: str, output: Path, *overrides: str) -> FinetuneRecipe:
    model = {**FAMILIES[family], "drop_path": 0.2}
    return FinetuneRecipe.parse(TRAINING, [f"output={output}", f"model={json.dumps(model)}", *overrides])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_across_its_stages_and_resumes_to_the_bit(
    family: str, tmp_path: Path, crash_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    whole = finetune(build(family, tmp_path / "whole", "checkpoint.every_steps=null"))
    stages = whole.curriculum.stages
    assert len(stages) == 3
    for stage, workers in ((stages[1], 1), (stages[2], 0)):
        # The newest checkpoint is then one or two steps old, and lies within the stage.
        with crash_after(stage.first_step + 3):
            finetune(build(family, tmp_path / "cut", f"data.num_workers={workers}"))
        newest = RunFolder(tmp_path / "cut").checkpoints()[0].step
        assert stage.first_step < newest < stage.first_step + stage.num_steps - 1
    cut = finetune(build(family, tmp_path / "cut"))
    assert cut.state.step == whole.curriculum.num_steps
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        newest = f"checkpoints/step-{whole.state.step:08d}/{file}"
        a, b = load_file(tmp_path / "whole" / newest), load_file(tmp_path / "cut" / newest)
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    # Every parameter was trained, and kept its base shape.
    start = dict(build(family, tmp_path / "new").build_model(3).named_parameters())
    for name, parameter in whole.bare_model.named_parameters():
        assert parameter.shape == start[name].shape
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_there_is_a_recipe_for_every_row_of_the_papers_table() -> None:
    rows = {
        "resnet50": 1, "convnext": 3, "deit": 2, "pvt": 4, "swin": 3, "cswin": 3, "caformer": 3,
    }  # fmt: skip
    found = [path.stem.removeprefix("in1k_").split("_")[0] for path in RECIPES]
    assert {name: found.count(name) for name in rows} == rows
    assert len(found) == sum(rows.values())
