"""Which attention kernels a run takes, and why, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from etpp_ssl.model.attention import choose_kernel
from etpp_ssl.model.decoders import CrossDecoder
from etpp_ssl.recipe import Recipe

if TYPE_CHECKING:
    from etpp_ssl.train.run import Run


def attention_notes(run: Run) -> list[str]:
    """One sentence per kernel in use: the numbers of tokens it serves, in all stages, and the reason."""
    recipe, model, device = run.recipe, run.bare_model, run.accelerator.device
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    lengths = set()
    for stage in run.curriculum.stages:
        counts = run.masker.counts(stage.bandwidth, stage.progress)
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
