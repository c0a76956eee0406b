"""Combined targets: the parts' predictions side by side, and the weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.masking import random_masking, removed_ids
from etpp_ssl.recipe import Recipe
from etpp_ssl.targets.combined import CombinedConfig, CombinedObjective, HogPart, PixelsPart
from etpp_ssl.targets.hog import HogConfig
from etpp_ssl.targets.pixels import PixelsConfig

PATCH = (4, 6)
PARTS = (PixelsPart(weight=0.5), HogPart(weight=2.0, cell=2, bins=6), PixelsPart(norm_pix=False))


def batch() -> tuple[Tensor, Tensor]:
    images = torch.randn(2, 3, 12, 30, generator=torch.Generator().manual_seed(0))
    ids_keep = random_masking(torch.arange(2), 15, 4, seed=0)
    return images, removed_ids(ids_keep, 15)


def combined() -> CombinedObjective:
    return CombinedConfig(parts=PARTS).build(patch_size=PATCH, in_chans=3)


def test_values_targets_and_losses_are_those_of_the_parts_apart() -> None:
    configs = [PixelsConfig(), HogConfig(cell=2, bins=6), PixelsConfig(norm_pix=False)]
    apart = [config.build(patch_size=PATCH, in_chans=3) for config in configs]
    objective, (images, ids_removed) = combined(), batch()
    assert objective.num_values == sum(part.num_values for part in apart) == 72 + 2 * 3 * 6 * 3 + 72
    assert torch.equal(
        objective.target(images, ids_removed),
        torch.cat([part.target(images, ids_removed) for part in apart], dim=-1),
    )
    values = torch.randn(2, 11, objective.num_values, generator=torch.Generator().manual_seed(1))
    losses = objective.losses(values, ids_removed, images)
    assert list(losses) == ["loss", "loss_norm_pixels", "loss_hog", "loss_pixels"]
    first, second, third = (
        part(share, ids_removed, images)
        for part, share in zip(apart, values.split([72, 108, 72], dim=-1), strict=True)
    )
    assert torch.equal(losses["loss_norm_pixels"], first)
    assert torch.equal(losses["loss_hog"], second)
    assert torch.equal(losses["loss_pixels"], third)
    torch.testing.assert_close(losses["loss"], 0.5 * first + 2 * second + third)


def test_each_part_moves_its_own_values_by_its_weight() -> None:
    objective, (images, ids_removed) = combined(), batch()
    target = objective.target(images, ids_removed)
    values = torch.randn_like(target).requires_grad_()
    objective(values, ids_removed, images).backward()
    factors = torch.cat([torch.full((72,), 0.5 / 72), torch.full((108,), 2 / 108), torch.full((72,), 1 / 72)])
    expected = 2 * (values.detach() - target) * factors / (2 * 11)
    torch.testing.assert_close(values.grad, expected)


def test_no_target_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, (images, ids_removed) = combined(), batch()
    values = objective.target(images, ids_removed)
    calls = []
    for part in objective.parts:
        real = part.objective.target
        monkeypatch.setattr(part.objective, "target", lambda *args, real=real: calls.append(1) or real(*args))
    objective.losses(values, ids_removed, images)
    assert len(calls) == len(objective.parts)


MINIMAL = "output: runs/x\nbudget_epochs: 2\nbatch_size: 4\ndata: {name: synthetic}\n"


def test_recipes_name_targets_as_any_other_section() -> None:
    assert Recipe.parse(MINIMAL).target == PixelsConfig()
    assert Recipe.parse(MINIMAL, ["target.norm_pix=false"]).target == PixelsConfig(norm_pix=False)
    assert Recipe.parse(MINIMAL, ["target=hog"]).target == HogConfig()
    assert Recipe.parse(MINIMAL, ["target=hog", "target.cell=[4, 8]"]).target == HogConfig(cell=(4, 8))
    assert Recipe.parse(MINIMAL, ["target=combined"]).target == CombinedConfig()
    parts = "[{name: pixels, weight: 0.5}, {name: hog, cell: 4, label: hog4}, {name: hog}]"
    recipe = Recipe.parse(MINIMAL, ["target=combined", f"target.parts={parts}"])
    assert recipe.target == CombinedConfig(
        parts=(PixelsPart(weight=0.5), HogPart(cell=4, label="hog4"), HogPart())
    )


def test_the_decoder_predicts_the_values_of_all_parts(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("target=combined")
    assert recipe.build_model().decoder.head.out_features == recipe.build_objective().num_values == 48 + 108


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target=edges"], ["target.name is 'edges'", "pixels, hog, combined"]),
        (["target=hog", "target.bins=1"], ["target.bins is 1"]),
        (["target=hog", "target.cel=4"], ["unknown key 'target.cel'", "did you mean 'cell'"]),
        (["target=hog", "target.cell=many"], ["target.cell is 'many'"]),
        (["target=combined", "target.parts=[]"], ["target.parts is []", "at least 1"]),
        (
            ["target=combined", "target.parts=[{name: combined}]"],
            ["target.parts.0.name is 'combined'; valid are pixels, hog"],
        ),
        (["target=combined", "target.parts=[{weight: 2.0}]"], ["target.parts.0.name is missing"]),
        (
            ["target=combined", "target.parts=[{name: hog, weight: 0}]"],
            ["target.parts.0.weight is 0", "greater than 0"],
        ),
        (
            ["target=combined", "target.parts=[{name: hog, norm_pix: true}]"],
            ["unknown key 'target.parts.0.norm_pix'", "valid keys of target.parts.0 are bins, cell"],
        ),
        (
            ["target=combined", "target.parts=[{name: hog}, {name: hog, cell: 4}]"],
            ["target.parts: several parts would be logged as loss_hog", "label: hog2"],
        ),
        (
            ["target=combined", "target.parts=[{name: hog, label: my loss}]"],
            ["target.parts.0.label is 'my loss'"],
        ),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.parse(MINIMAL, overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
