"""The loop around the original's code, with a stand-in for the clone: budget, schedule, order, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import original_pretrain
import pytest
import torch
from original_mae import import_original, original_model
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.recipe import Recipe

# What of the clone the tools rely on: the constructor, the call, a block that takes qk_scale, np.float.
STAND_IN = """
import numpy as np
import torch
from timm.models.vision_transformer import Block

before_step = []

class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, decoder_embed_dim,
                 decoder_depth, decoder_num_heads, mlp_ratio, norm_layer, norm_pix_loss):
        super().__init__()
        assert norm_pix_loss and np.float is float
        self.block = Block(embed_dim, num_heads, mlp_ratio, qk_scale=None, norm_layer=norm_layer)
        self.seen = []

    def forward(self, images, mask_ratio):
        for act in before_step:
            act(len(self.seen))
        self.seen.append(images.mean().item())
        tokens = images.flatten(1).mean(1)[:, None, None].expand(-1, 2, self.block.norm1.weight.shape[0])
        return self.block(tokens).square().mean(), None, None
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "models_mae.py").write_text(STAND_IN)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for number in range(13):
        folder = tmp_path / "images" / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 17), (20 * number, 255 - 15 * number, 99)).save(folder / f"{number}.png")
    return Recipe.load(
        "recipes/quickstart.yaml",
        [
            "data=folder", f"data.root={tmp_path / 'images'}", "data.num_workers=0", "probe=none",
            "curriculum=constant", "image_size=16", "batch_size=4", "budget_epochs=2.5", "log_every_steps=1",
            "precision=fp32", f"output={tmp_path / 'run'}",
        ],
    )  # fmt: skip


def rows(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


def test_it_takes_the_steps_of_our_budget_and_leaves_the_originals_layout(
    clone: Path, recipe: Recipe
) -> None:
    rates: list[float] = []
    noted = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    original_pretrain.train(recipe, clone)
    num_steps = recipe.build_curriculum(13).num_steps
    schedule = recipe.optim.learning_rates(4)
    assert rates == [schedule(number / num_steps) for number in range(num_steps)]
    assert [row["step"] for row in rows(recipe)] == list(range(1, num_steps + 1))
    assert rows(recipe)[-1]["images_seen"] == 4 * num_steps
    weights = torch.load(Path(recipe.output) / "weights.pth", weights_only=True)
    assert weights["model"].keys() == original_model(recipe, recipe.size, clone).state_dict().keys()
    original_pretrain.train(recipe, clone)
    noted.remove()
    assert len(rates) == num_steps


def test_an_epoch_shows_every_image_of_its_whole_batches_once_wherever_it_is_entered(recipe: Recipe) -> None:
    order = [torch.arange(start, start + 1).float() for start in range(13)]
    images = [(image, 0) for image in order]
    whole = [samples.flatten().tolist() for samples in original_pretrain.batches(images, recipe, 0, 8)]
    assert len(whole) == 8
    for epoch in range(2):
        assert len({value for batch in whole[3 * epoch : 3 * epoch + 3] for value in batch}) == 12
    for first in (1, 3, 5):
        rest = [samples.flatten().tolist() for samples in original_pretrain.batches(images, recipe, first, 8)]
        assert rest == whole[first:]


@contextmanager
def before_step(clone: Path, act: Callable[[int], None]) -> Iterator[None]:
    """The stand-in does something inside before each step; `act` is told how many steps are done."""
    hooks = import_original(clone).before_step
    hooks.append(act)
    try:
        yield
    finally:
        hooks.remove(act)


def test_a_stopped_run_goes_on_from_its_step(clone: Path, recipe: Recipe) -> None:
    def stop(done: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with before_step(clone, stop), pytest.raises(Interrupted, match="SIGTERM after step 3") as stopped:
        original_pretrain.train(recipe, clone)
    assert stopped.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert [row["step"] for row in rows(recipe)] == [1, 2, 3]
    original_pretrain.train(recipe, clone)
    assert [row["step"] for row in rows(recipe)] == list(range(1, recipe.build_curriculum(13).num_steps + 1))
    assert [row["seconds"] for row in rows(recipe)] == sorted(row["seconds"] for row in rows(recipe))


def test_a_killed_run_forgets_what_it_logged_after_its_state(clone: Path, recipe: Recipe) -> None:
    state = Path(recipe.output) / "state.pt"
    older = state.with_name("older.pt")

    def die(done: int) -> None:
        # As if no state had been due since the first one.
        if done == 1:
            shutil.copy(state, older)
        if done == 4:
            older.rename(state)
            raise KeyboardInterrupt

    with before_step(clone, die), pytest.raises(KeyboardInterrupt):
        original_pretrain.train(recipe, clone, save_seconds=-1.0)
    assert [row["step"] for row in rows(recipe)] == [1, 2, 3, 4]
    assert torch.load(state, weights_only=True)["step"] == 1
    original_pretrain.train(recipe, clone)
    assert [row["step"] for row in rows(recipe)] == list(range(1, recipe.build_curriculum(13).num_steps + 1))


def test_what_the_original_cannot_do_is_refused(
    clone: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, reason in (
        ([], "curriculum=constant"),
        (["curriculum=constant", "target=hog"], "target=pixels"),
        (["curriculum=constant", "target.norm_pix=false"], "normalised pixels"),
        (["curriculum=constant", "model.decoder=cross"], "model.decoder=mae"),
        (["curriculum=constant"], "data.name=folder"),
    ):
        with pytest.raises(SystemExit):
            original_pretrain.main([str(clone), "recipes/quickstart.yaml", *overrides])
        assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="square"):
        original_model(recipe, (16, 24), clone)


def test_a_folder_of_other_settings_and_too_few_images_are_refused(clone: Path, recipe: Recipe) -> None:
    few = recipe.model_copy(update={"batch_size": 14})
    with pytest.raises(UserError, match="13 images are not one batch of 14"):
        original_pretrain.train(few, clone)
    original_pretrain.train(recipe, clone)
    with pytest.raises(UserError, match=r"started with other settings: batch_size \(4 -> 14\)"):
        original_pretrain.train(few, clone)
