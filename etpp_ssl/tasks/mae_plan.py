"""What `etpp plan` and the start of a run tell of a masked autoencoder: its decoders' cost, its kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from etpp_ssl.curriculum.cost import count_cost
from etpp_ssl.messages import members_at, name_of
from etpp_ssl.model.attention import AttentionName, choose_kernel
from etpp_ssl.model.decoders import CrossDecoder
from etpp_ssl.model.mae import AnyDecoder, MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import MaskCounts
from etpp_ssl.randomness import ShapesOnly


def decoder_flops(
    config: AnyDecoder,
    model: MaskedAutoencoder,
    grid: tuple[int, int],
    counts: MaskCounts,
    num_values: int,
) -> int:
    """Operations of a decoder behind a model's encoder, forward and backward, for one image.

    Args:
        config: the decoder, which need not be the model's own.
        model: the encoder's size is read from it; nothing is computed.
        grid: (h, w) patches.
        counts: patches of the image.
        num_values: numbers to predict per patch.
    """
    encoder = model.encoder
    prefix, width = encoder.num_prefix_tokens, encoder.embed_dim
    with ShapesOnly():
        decoder = config.build(
            encoder_dim=width,
            encoder_depth=len(encoder.blocks),
            num_prefix=prefix,
            base_grid=tuple(encoder.patch_embed.grid_size),
            num_values=num_values,
        )
        outputs = [
            torch.zeros(1, prefix + counts.num_keep, width, requires_grad=True)
            for _ in range(len(encoder.blocks) + 1 if config.reads_blocks else 1)
        ]
        ids_keep = torch.zeros(1, counts.num_keep, dtype=torch.int64)
        ids_predict = torch.zeros(1, counts.num_predict, dtype=torch.int64)

    def loss() -> Tensor:
        tokens = outputs if config.reads_blocks else outputs[0]
        values: Tensor = decoder(tokens, ids_keep, ids_predict, grid)
        return values.sum()

    return count_cost(loss, decoder).flops


def other_decoders(config: AnyDecoder) -> list[AnyDecoder]:
    """The decoders of other names, at the width, depth and heads of `config`."""
    shape = {"embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.num_heads}
    kinds = members_at(ModelConfig, ["decoder"])
    return [kind.model_validate(shape) for kind in kinds if name_of(kind) != config.name]  # type: ignore[misc]


def attention_notes(
    model: MaskedAutoencoder, counts: Iterable[MaskCounts], attention: AttentionName, dtype: torch.dtype
) -> list[str]:
    """One sentence per attention kernel in use: the numbers of tokens it serves, and the reason.

    Args:
        model: on its device.
        counts: patches of the images of each stage.
        attention: the recipe's choice.
        dtype: that the model computes in.
    """
    device, lengths = next(model.parameters()).device, set()
    for patches in counts:
        encoded = model.encoder.num_prefix_tokens + patches.num_keep
        crossed = isinstance(model.decoder, CrossDecoder)
        lengths |= {encoded, max(encoded, patches.num_predict) if crossed else encoded + patches.num_predict}
    served: dict[tuple[bool, str], list[str]] = {}
    for length in sorted(lengths):
        choice = choose_kernel(attention, device.type, dtype, length)
        served.setdefault((choice.fused, choice.reason), []).append(str(length))
    return [
        f"attention over {', '.join(tokens)} tokens: {'fused' if fused else 'unfused'} ({reason})"
        for (fused, reason), tokens in served.items()
    ]
