"""Held-out reconstruction: fixed images, fixed masks, full resolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator

from etpp_ssl.data.sources.splits import keyed_indices
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.model.masking import num_visible, random_masking
from etpp_ssl.recipe import Recipe
from etpp_ssl.tasks.mae import build_probe


def test_it_is_the_plain_loss_over_the_drawn_images(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("probe=reconstruction", "probe.num_eval=11", "probe.batch_size=4", "data.holdout=20")
    accelerator = Accelerator(cpu=True)
    mean, std = recipe.data.statistics(3)
    normalise = Normalise(mean, std, accelerator.device)
    objective = recipe.build_objective()
    probe = build_probe(recipe, accelerator, normalise, objective)
    assert probe is not None
    torch.manual_seed(1)
    model = recipe.build_model().train()
    result = probe.run(model)
    assert model.training
    assert probe.run(model) == result

    # One image at a time, so that nothing depends on the batches.
    source = recipe.data.open("train", in_chans=3, image_size=recipe.size, seed=recipe.seed)
    held_out = keyed_indices(64, 20, recipe.seed, "holdout")
    view = EvalView(recipe.size, recipe.data.crop_pct)
    losses = []
    for index in keyed_indices(20, 11, recipe.seed, "heldout"):
        image = normalise(view(source.open(held_out[index]), index, recipe.size)[None])
        ids = random_masking(torch.tensor([index]), 24, num_visible(24, 0.75), recipe.seed)
        with torch.no_grad():
            values, removed = model.eval()(image, ids)
            losses.append(objective(values, removed, image).item())
    assert result["heldout_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_it_stays_in_float32_under_mixed_precision(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("probe=reconstruction", "probe.num_eval=5")
    mean, std = recipe.data.statistics(3)
    torch.manual_seed(1)
    model = recipe.build_model()
    results = []
    for precision in ("no", "bf16"):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        accelerator.prepare(model)
        normalise = Normalise(mean, std, accelerator.device)
        probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
        assert probe is not None
        results.append(probe.run(model))
    assert results[0] == results[1]


def test_a_decoder_trained_on_a_subset_is_held_to_every_masked_patch(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    overrides = ["probe=reconstruction", "probe.num_eval=5", "model.masking=block"]
    results = []
    for extra in (
        ["model.mask_ratio=0.7"],
        ["model.mask_ratio={start: 0.5, end: 0.7}", "model.decoder.predict_ratio=0.2"],
    ):
        recipe = tiny_recipe(*overrides, "model.decoder=cross", *extra)
        accelerator = Accelerator(cpu=True)
        normalise = Normalise(*recipe.data.statistics(3), accelerator.device)
        probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
        assert probe is not None
        torch.manual_seed(1)
        results.append(probe.run(recipe.build_model()))
    assert results[0] == results[1]
