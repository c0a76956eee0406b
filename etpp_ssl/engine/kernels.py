"""Which attention kernels a run takes, and why, in words."""

from __future__ import annotations

import torch

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.model.attention import choose_kernel
from etpp_ssl.model.cross_decoder import CrossDecoder
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masker import Masker
from etpp_ssl.recipe import Recipe


def attention_notes(
    recipe: Recipe, model: MaskedAutoencoder, curriculum: Curriculum, masker: Masker, device: torch.device
) -> list[str]:
    """One sentence per kernel in use: the numbers of tokens it serves, in all stages, and the reason."""
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    lengths = set()
    for stage in curriculum.stages:
        counts = masker.counts(stage.bandwidth, stage.progress)
        encoded = model.encoder.num_prefix_tokens + counts.num_keep
        crossed = max(encoded, counts.num_predict)
        lengths |= {
            encoded,
            crossed if isinstance(model.decoder, CrossDecoder) else encoded + counts.num_predict,
        }
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
