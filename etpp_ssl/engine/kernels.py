"""Which attention kernels a run takes, and why, in words."""

from __future__ import annotations

import torch

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.model.attention import choose_kernel
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import num_visible
from etpp_ssl.model.patches import grid_of
from etpp_ssl.recipe import Recipe


def attention_notes(
    recipe: Recipe, model: MaskedAutoencoder, curriculum: Curriculum, device: torch.device
) -> list[str]:
    """One sentence per kernel in use: the numbers of tokens it serves, in all stages, and the reason."""
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    lengths = set()
    for stage in curriculum.stages:
        grid = grid_of(stage.bandwidth, model.patch_size)
        num_patches = grid[0] * grid[1]
        for patches in (num_visible(num_patches, recipe.model.mask_ratio), num_patches):
            lengths.add(model.encoder.num_prefix_tokens + patches)
    served: dict[tuple[bool, str], list[str]] = {}
    for length in sorted(lengths):
        choice = choose_kernel(recipe.model.attention, device.type, dtype, length)
        served.setdefault((choice.fused, choice.reason), []).append(str(length))
    return [
        f"attention over {', '.join(tokens)} tokens: {'fused' if fused else 'unfused'} ({reason})"
        for (fused, reason), tokens in served.items()
    ]


def kernels_in_use(recipe: Recipe) -> str:
    """What a checkpoint remembers of the choice, because another one changes the last bits."""
    return f"attention {recipe.model.attention}" + (", compiled" if recipe.model.compiled else "")
