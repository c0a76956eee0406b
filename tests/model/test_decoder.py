"""The decoder against the original's order of work: full grid of tokens, every patch predicted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.decoders import MAEDecoder, MAEDecoderConfig
from etpp_ssl.model.masking import random_masking, removed_ids

ENCODER_DIM, WIDTH, VALUES = 10, 16, 12
BASE = (4, 6)
CONFIG = MAEDecoderConfig(embed_dim=WIDTH, depth=2, num_heads=4)


def make_decoder(num_prefix: int) -> MAEDecoder:
    torch.manual_seed(0)
    decoder = CONFIG.build(
        encoder_dim=ENCODER_DIM, encoder_depth=3, num_prefix=num_prefix, base_grid=BASE, num_values=VALUES
    ).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return decoder


def position_table(grid: tuple[int, int]) -> Tensor:
    """Sin-cos at the patch centres in base units: columns in the first half, rows in the second."""
    rows, columns = ((np.arange(now) + 0.5) * full / now - 0.5 for now, full in zip(grid, BASE, strict=True))
    grid_w, grid_h = np.meshgrid(columns, rows)
    omega = 1 / 10000 ** (np.arange(WIDTH // 4) / (WIDTH / 4))
    angles = [np.outer(axis.ravel(), omega) for axis in (grid_w, grid_h)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table.astype(np.float32)).double()


def decode_in_the_originals_order(
    decoder: MAEDecoder, tokens: Tensor, ids_keep: Tensor, ids_removed: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Embed, append mask tokens, restore the order, add positions, predict all patches: (B, N, V)."""
    num_prefix = decoder.num_prefix
    ids_restore = torch.cat([ids_keep, ids_removed], dim=1).argsort(dim=1)
    embedded = decoder.embed(tokens)
    prefix, visible = embedded[:, :num_prefix], embedded[:, num_prefix:]
    hidden = decoder.mask_token.repeat(len(tokens), ids_removed.shape[1], 1)
    shuffled = torch.cat([visible, hidden], dim=1)
    full = torch.stack([row[order] for row, order in zip(shuffled, ids_restore, strict=True)])
    sequence = torch.cat([prefix, full], dim=1)
    no_position = torch.zeros(num_prefix, WIDTH, dtype=torch.float64)
    sequence = sequence + torch.cat([no_position, position_table(grid)])
    for block in decoder.blocks:
        sequence = block(sequence)
    predictions: Tensor = decoder.head(decoder.norm(sequence))
    return predictions[:, num_prefix:]


@pytest.mark.parametrize("num_prefix", [0, 1, 4])
@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (6, 4), (3, 7)])
def test_predictions_and_gradients_are_those_of_the_originals_order(
    num_prefix: int, grid: tuple[int, int]
) -> None:
    decoder = make_decoder(num_prefix)
    num_patches = grid[0] * grid[1]
    num_keep = num_patches // 4
    ids_keep = random_masking(torch.arange(3), num_patches, num_keep, seed=0)
    ids_removed = removed_ids(ids_keep, num_patches)
    tokens = torch.randn(3, num_prefix + num_keep, ENCODER_DIM, dtype=torch.float64)
    inputs = [tokens.requires_grad_(), *decoder.parameters()]

    ours = decoder(tokens, ids_keep, ids_removed, grid)
    everything = decode_in_the_originals_order(decoder, tokens, ids_keep, ids_removed, grid)
    masked = torch.stack([p[ids] for p, ids in zip(everything, ids_removed, strict=True)])
    assert ours.shape == (3, num_patches - num_keep, VALUES)
    torch.testing.assert_close(ours, masked, rtol=0, atol=1e-6)

    weight = torch.randn(ours.shape, dtype=torch.float64)
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs)
    plain_grads = torch.autograd.grad((masked * weight).sum(), inputs)
    for fast, plain in zip(ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)


def test_predictions_follow_the_order_of_the_ids_asked_for() -> None:
    decoder = make_decoder(1)
    ids_keep = random_masking(torch.arange(2), 24, 6, seed=0)
    ids_removed = removed_ids(ids_keep, 24)
    tokens = torch.randn(2, 7, ENCODER_DIM, dtype=torch.float64)
    forward = decoder(tokens, ids_keep, ids_removed, BASE)
    backward = decoder(tokens, ids_keep, ids_removed.flip(1), BASE)
    torch.testing.assert_close(backward.flip(1), forward)


def test_every_grid_uses_the_same_parameters() -> None:
    decoder = make_decoder(1)
    before = {name: (id(p), p.shape) for name, p in decoder.named_parameters()}
    for grid in ((2, 3), (4, 6), (8, 12), (5, 5)):
        num_patches = grid[0] * grid[1]
        ids_keep = random_masking(torch.arange(1), num_patches, 2, seed=0)
        tokens = torch.randn(1, 3, ENCODER_DIM, dtype=torch.float64)
        values = decoder(tokens, ids_keep, removed_ids(ids_keep, num_patches), grid)
        assert values.shape == (1, num_patches - 2, VALUES)
    assert {name: (id(p), p.shape) for name, p in decoder.named_parameters()} == before


def test_a_first_use_in_inference_mode_does_not_spoil_training() -> None:
    decoder = make_decoder(1)
    ids_keep = torch.tensor([[0, 5]])
    tokens = torch.randn(1, 3, ENCODER_DIM, dtype=torch.float64)
    with torch.inference_mode():
        seen = decoder(tokens, ids_keep, removed_ids(ids_keep, 10), (2, 5))
    values = decoder(tokens, ids_keep, removed_ids(ids_keep, 10), (2, 5))
    values.sum().backward()
    assert torch.equal(values.detach(), seen)


def test_nothing_masked_gives_no_predictions() -> None:
    decoder = make_decoder(1)
    ids_keep = torch.arange(24).expand(2, 24)
    tokens = torch.randn(2, 25, ENCODER_DIM, dtype=torch.float64)
    assert decoder(tokens, ids_keep, removed_ids(ids_keep, 24), BASE).shape == (2, 0, VALUES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_predictions_have_the_type_of_the_parameters(dtype: torch.dtype) -> None:
    decoder = make_decoder(1).to(dtype)
    ids_keep = random_masking(torch.arange(2), 24, 6, seed=0)
    tokens = torch.randn(2, 7, ENCODER_DIM, dtype=dtype)
    assert decoder(tokens, ids_keep, removed_ids(ids_keep, 24), BASE).dtype == dtype


def test_the_defaults_are_maes_imagenet_decoder() -> None:
    with torch.device("meta"):
        decoder = MAEDecoderConfig().build(
            encoder_dim=768, encoder_depth=12, num_prefix=1, base_grid=(14, 14), num_values=768
        )
    # Embedding, mask token, eight blocks of width 512 and ratio 4, final norm, head.
    block = 2 * (2 * 512) + 512 * 1536 + 1536 + 512 * 512 + 512 + 2 * 512 * 2048 + 2048 + 512
    expected = (768 * 512 + 512) + 512 + 8 * block + 2 * 512 + (512 * 768 + 768)
    assert sum(p.numel() for p in decoder.parameters()) == expected
    assert decoder.blocks[0].attn.num_heads == 16
    norms = [m for m in decoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 17
    assert all(norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize(
    ("width", "heads", "message"),
    [
        (12, 5, r"model\.decoder\.num_heads 5 does not divide model\.decoder\.embed_dim 12"),
        (6, 3, r"model\.decoder\.embed_dim 6 is not a multiple of 4"),
    ],
)
def test_a_width_that_does_not_divide_gets_a_sentence(width: int, heads: int, message: str) -> None:
    config = MAEDecoderConfig(embed_dim=width, depth=1, num_heads=heads)
    with pytest.raises(UserError, match=message):
        config.build(encoder_dim=8, encoder_depth=1, num_prefix=1, base_grid=BASE, num_values=4)
