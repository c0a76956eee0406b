"""Masks in the loop: patterns, a ratio over compute, a subset to predict, several processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from ranks import Server
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain

CROSS = "model.decoder={name: cross, embed_dim: 8, depth: 2, num_heads: 2, predict_ratio: 0.4}"
RAMP = "model.mask_ratio={start: 0.5, end: 0.75}"


def test_every_step_has_the_masks_of_its_samples_and_its_progress(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, MaskedAutoencoder):
            seen.append((arguments[1], arguments[2]))

    hook = register_module_forward_pre_hook(note)
    try:
        run = pretrain(tiny_recipe(CROSS, RAMP, "model.masking=block", "budget_epochs=1"))
    finally:
        hook.remove()
    assert len(seen) == run.curriculum.num_steps
    for step, (ids_keep, ids_predict) in enumerate(seen):
        stage = run.curriculum.stage_at(step)
        num_patches = stage.bandwidth[0] * stage.bandwidth[1] // 16
        ratio = 0.5 + 0.25 * stage.progress
        assert ids_keep.shape == (10, round(num_patches * (1 - ratio)))
        assert ids_predict.shape == (10, round(num_patches * 0.4))
        expected = run.task.masker(torch.tensor(list(stage.samples)), stage.bandwidth, stage.progress)
        assert torch.equal(ids_keep, expected.ids_keep)
        assert torch.equal(ids_predict, expected.ids_predict)
    assert len({ids_keep.shape for ids_keep, _ in seen}) > 3


@pytest.mark.parametrize("pattern", ["block", "grid"])
def test_resume_is_bitwise_with_any_pattern_and_a_schedule(
    pattern: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    overrides = [CROSS, RAMP, f"model.masking={pattern}", "checkpoint.every_steps=4"]
    pretrain(tiny_recipe(f"output={tmp_path / 'whole'}", *overrides))
    cut = tiny_recipe(f"output={tmp_path / 'cut'}", "data.num_workers=1", *overrides)
    with crash_after(7):
        pretrain(cut)
    pretrain(cut)
    whole, resumed = (RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("whole", "cut"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_it_learns_with_cross_attention(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pretrain(tiny_recipe(CROSS, "budget_epochs=20", "curriculum=constant", "target.norm_pix=false"))
    losses = [row["loss"] for row in RunFolder(tmp_path / "run").metrics()]
    assert losses[-1] < 0.7 * losses[0]


def test_two_processes_give_the_curve_of_one_where_the_final_norm_gets_no_gradient(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, ranks: Server
) -> None:
    overrides = [CROSS, RAMP, "model.masking=grid", "budget_epochs=1", "log_every_steps=1"]
    tiny_recipe(*overrides).save(tmp_path / "recipe.yaml")
    pretrain(tiny_recipe(f"output={tmp_path / 'one'}", *overrides))
    ranks.run(["pretrain", str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'two'}"], 2)
    one, two = (RunFolder(tmp_path / name).metrics() for name in ("one", "two"))
    assert {row["num_processes"] for row in two} == {2}
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-4)
