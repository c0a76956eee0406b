"""Recipes of runs that take a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etpp_ssl.recipe import FinetuneRecipe

_BOTH = """
seed: 3
output: unused
image_size: [16, 24]
budget_epochs: 1.5
batch_size: 10
precision: fp32
log_every_steps: 3
data:
  name: synthetic
  num_images: 64
  num_eval_images: 24
  num_workers: 0
curriculum:
  name: efficienttrain
  stages:
  - {bandwidth: [8, 12], share: 0.2}
  - {bandwidth: [12, 16], share: 0.4}
  - {bandwidth: [16, 24], share: 0.4}
checkpoint: {every_minutes: null}
"""

TINY = f"""{_BOTH}
model:
  name: vit
  patch_size: 4
  embed_dim: 16
  depth: 1
  num_heads: 2
  decoder: {{embed_dim: 8, depth: 1, num_heads: 2}}
optim: {{base_lr: 2e-2}}
"""

TINY_CLASSIFIER = f"""{_BOTH}
task: finetune
model:
  name: vit
  patch_size: 4
  embed_dim: 16
  depth: 2
  num_heads: 2
  drop_path: 0.3
augment: {{ramp: true}}
optim: {{base_lr: 5e-2, clip_grad: 1.0, ema: 0.9}}
"""


def written(recipe: FinetuneRecipe) -> Path:
    """The folder of a classifier's run with random weights, at step 5."""
    import torch

    from etpp_ssl.run_folder import RunFolder
    from etpp_ssl.train.checkpoint import save_checkpoint

    folder, model, source = RunFolder(recipe.output), recipe.build_model(10), recipe.open_split("train")
    recipe.save(folder.recipe_file)
    state = {"classes": source.classes, "data": source.fingerprint()}
    save_checkpoint(folder, 5, model, torch.optim.SGD(model.parameters(), lr=0.1), state, keep=1)
    return folder.path
