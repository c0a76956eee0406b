"""Images that differ by class, and a probe on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from etpp_ssl.data.views import Normalise
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import Recipe
from etpp_ssl.tasks.mae import build_probe

COLOURS = {"blue": (20, 30, 200), "green": (20, 200, 30), "red": (200, 30, 20)}


def write_coloured(root: Path, train: int = 12, evaluation: int = 6) -> None:
    for split, count in (("train", train), ("val", evaluation)):
        for label, colour in COLOURS.items():
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noisy = tuple(min(255, c + 5 * i) for c in colour)
                Image.new("RGB", (27, 19), noisy).save(folder / f"{i}.png")


def build(recipe: Recipe, **long: Any) -> tuple[Any, MaskedAutoencoder]:
    accelerator = Accelerator(cpu=True)
    normalise = Normalise(*recipe.data.statistics(recipe.in_chans), accelerator.device)
    probe = build_probe(recipe, accelerator, normalise, recipe.build_objective(), **long)
    assert probe is not None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return probe, recipe.build_model()


class TokenBatchNorm(nn.Module):
    """A BatchNorm among the encoder's layers, and a drop that only eval mode turns off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.drop(self.norm(tokens.flatten(0, 1)).view_as(tokens))
        return out


def leaves_everything_as_it_was(run: Callable[[MaskedAutoencoder], dict[str, float]],
                                model: MaskedAutoencoder) -> dict[str, float]:  # fmt: skip
    """Run a probe on a model with a BatchNorm, in a mixture of modes; returns its numbers."""
    model.encoder.patch_embed.norm = TokenBatchNorm(model.encoder.embed_dim)
    model.train()
    model.encoder.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert any("running_var" in key for key in weights)
    numbers = run(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    return numbers


def with_workers(probe: Any, num_workers: int) -> None:
    probe.context = replace(probe.context, num_workers=num_workers)
