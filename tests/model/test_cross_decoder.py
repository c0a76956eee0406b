"""The cross-attention decoder against plain loops, and what its queries may and may not see."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.decoders import CrossBlock, CrossDecoder, CrossDecoderConfig
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import random_masking, removed_ids
from etpp_ssl.model.pos_embed import sincos_pos_embed

ENCODER_DIM, ENCODER_DEPTH, WIDTH, HEADS, VALUES = 10, 3, 16, 4, 12
BASE = (4, 6)


def make_decoder(reads: str, depth: int = 2) -> CrossDecoder:
    """In double precision, no parameter at the special value of its initialisation."""
    torch.manual_seed(0)
    config = CrossDecoderConfig(embed_dim=WIDTH, depth=depth, num_heads=HEADS, reads=reads)
    decoder = config.build(
        encoder_dim=ENCODER_DIM,
        encoder_depth=ENCODER_DEPTH,
        num_prefix=1,
        base_grid=BASE,
        num_values=VALUES,
    ).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return decoder


def encoder_tokens(decoder: CrossDecoder, num_images: int, num_tokens: int) -> Any:
    torch.manual_seed(1)
    count = ENCODER_DEPTH + 1 if decoder.reads_blocks else 1
    outputs = [
        torch.randn(num_images, num_tokens, ENCODER_DIM, dtype=torch.float64, requires_grad=True)
        for _ in range(count)
    ]
    return outputs if decoder.reads_blocks else outputs[0]


def plain_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias


def plain_block(block: CrossBlock, query: Tensor, memory: list[Tensor]) -> Tensor:
    """One query vector (E,) against the encoder's tokens, head by head, with a full softmax."""
    attention, size = block.attn, WIDTH // HEADS
    q = attention.q(plain_norm(block.norm1, query))
    keys_values = [attention.kv(token) for token in memory]
    heads = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        value_part = slice(WIDTH + head * size, WIDTH + (head + 1) * size)
        scores = [(q[part] * kv[part]).sum() / math.sqrt(size) for kv in keys_values]
        total = sum(score.exp() for score in scores)
        heads.append(
            sum(score.exp() / total * kv[value_part] for score, kv in zip(scores, keys_values, strict=True))
        )
    query = query + attention.proj(torch.cat(heads))
    hidden = block.mlp.fc1(plain_norm(block.norm2, query))
    # The exact GELU.
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return query + block.mlp.fc2(hidden)


def plain_decode(decoder: CrossDecoder, outputs: Any, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch by patch, block by block: the prediction at each id."""
    table = sincos_pos_embed(grid, BASE, WIDTH).double()
    images = []
    for image, row in enumerate(ids.tolist()):
        patches = []
        for patch in row:
            query = decoder.mask_token[0, 0] + table[patch]
            for number, block in enumerate(decoder.blocks):
                if decoder.mixture is None:
                    memory = list(outputs[image])
                else:
                    weights, norm = decoder.mixture.weight[number], decoder.mixture.norms[number]
                    tokens = sum(w * output[image] for w, output in zip(weights, outputs, strict=True))
                    memory = [plain_norm(norm, token) for token in tokens]
                query = plain_block(block, query, memory)
            patches.append(decoder.head(plain_norm(decoder.norm, query)))
        images.append(torch.stack(patches))
    return torch.stack(images)


@pytest.mark.parametrize("reads", ["blocks", "output"])
@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (3, 7)])
def test_predictions_and_gradients_are_those_of_plain_loops(reads: str, grid: tuple[int, int]) -> None:
    decoder = make_decoder(reads)
    num_patches = grid[0] * grid[1]
    ids_keep = random_masking(torch.arange(2), num_patches, num_patches // 3, seed=0)
    ids = removed_ids(ids_keep, num_patches)[:, :4]
    outputs = encoder_tokens(decoder, 2, 1 + ids_keep.shape[1])
    ours = decoder(outputs, ids_keep, ids, grid)
    plain = plain_decode(decoder, outputs, ids, grid)
    assert ours.shape == (2, 4, VALUES)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)

    inputs = [*(outputs if reads == "blocks" else [outputs]), *decoder.parameters()]
    weight = torch.randn(ours.shape, dtype=torch.float64)
    ours_grads = torch.autograd.grad((ours * weight).sum(), inputs)
    plain_grads = torch.autograd.grad((plain * weight).sum(), inputs)
    for fast, slow in zip(ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reads", ["blocks", "output"])
def test_queries_never_see_each_other(reads: str) -> None:
    decoder = make_decoder(reads)
    ids_keep = torch.tensor([[0, 5, 17]])
    outputs = encoder_tokens(decoder, 1, 4)
    before = decoder(outputs, ids_keep, torch.tensor([[1, 2, 3, 4]]), BASE)
    after = decoder(outputs, ids_keep, torch.tensor([[1, 22, 3, 23]]), BASE)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(after[:, [1, 3]], before[:, [1, 3]])
    # Alone, in any order, and among all: the same but for the order of summation inside a matrix product.
    everything = decoder(outputs, ids_keep, removed_ids(ids_keep, 24), BASE)
    for place, patch in enumerate(removed_ids(ids_keep, 24)[0].tolist()):
        alone = decoder(outputs, ids_keep, torch.tensor([[patch]]), BASE)
        torch.testing.assert_close(alone[0, 0], everything[0, place], rtol=0, atol=1e-12)


def test_a_query_sees_every_token_of_its_own_image_and_none_of_another() -> None:
    decoder = make_decoder("output")
    tokens = encoder_tokens(decoder, 2, 5)
    ids_keep, ids = torch.arange(4).expand(2, 4), torch.tensor([[7, 9], [7, 9]])
    (grad,) = torch.autograd.grad(decoder(tokens, ids_keep, ids, BASE)[0].sum(), tokens)
    assert (grad[0].abs().sum(dim=-1) > 0).all()
    assert not grad[1].any()


def test_each_decoder_block_has_a_sum_of_its_own_over_every_encoder_output() -> None:
    decoder = make_decoder("blocks", depth=5)
    assert decoder.mixture is not None
    assert decoder.mixture.weight.shape == (5, ENCODER_DEPTH + 1)
    assert len(decoder.mixture.norms) == 5
    outputs = encoder_tokens(decoder, 2, 4)
    with torch.no_grad():
        decoder.mixture.weight.zero_()
        decoder.mixture.weight[3, 1] = 2.0
    mixed = decoder.mixture(outputs)
    torch.testing.assert_close(mixed[3], decoder.mixture.norms[3](2.0 * outputs[1]))
    for other in (0, 1, 2, 4):
        expected = decoder.mixture.norms[other].bias.expand_as(mixed[other])
        torch.testing.assert_close(mixed[other], expected)


def test_the_weights_of_the_sums_start_with_a_variance_of_one_over_their_number() -> None:
    torch.manual_seed(0)
    config = CrossDecoderConfig(embed_dim=8, depth=200, num_heads=2)
    decoder = config.build(encoder_dim=4, encoder_depth=24, num_prefix=1, base_grid=BASE, num_values=2)
    assert decoder.mixture is not None
    assert decoder.mixture.weight.std().item() == pytest.approx(1 / 5, rel=0.05)
    assert abs(decoder.mixture.weight.mean().item()) < 0.01


def small_model(reads: str, **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    decoder = {"name": "cross", "embed_dim": 12, "depth": 2, "num_heads": 3, "reads": reads}
    settings = {"name": "vit", "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    config = ModelConfig(**{**settings, "decoder": decoder, **changes})
    return config.build(image_size=(16, 24), in_chans=3, num_values=48)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_reads_the_patch_embedding_and_every_block_before_the_final_norm(checkpointing: bool) -> None:
    model = small_model("blocks", grad_checkpointing=checkpointing)
    seen: list[Tensor] = []
    hooks = [(model.encoder.norm_pre, seen), *((block, seen) for block in model.encoder.blocks)]
    for module, found in hooks:
        module.register_forward_hook(lambda _m, _i, out, found=found: found.append(out))
    read: list[Tensor] = []
    assert model.decoder.mixture is not None
    model.decoder.mixture.register_forward_pre_hook(lambda _m, args: read.extend(args[0]))
    images, ids = torch.randn(2, 3, 16, 24), torch.tensor([[0, 3, 9], [1, 5, 20]])
    model(images, ids)
    assert len(read) == len(seen) == 4
    for ours, block_output in zip(read, seen, strict=True):
        assert torch.equal(ours, block_output)


def test_the_final_norm_is_frozen_where_nothing_reads_it_and_trained_where_it_is_read() -> None:
    for reads, frozen in (("blocks", True), ("output", False)):
        model = small_model(reads)
        assert all(p.requires_grad != frozen for p in model.encoder.norm.parameters())
        images, ids = torch.randn(2, 3, 16, 24), torch.tensor([[0, 3, 9], [1, 5, 20]])
        before = model(images, ids).values_BMV
        with torch.no_grad():
            model.encoder.norm.weight.mul_(3.0)
        assert torch.equal(model(images, ids).values_BMV, before) == frozen


def test_the_default_predicts_every_masked_patch_with_crossmaes_twelve_blocks() -> None:
    config = CrossDecoderConfig()
    assert (config.embed_dim, config.depth, config.num_heads, config.predict_ratio) == (512, 12, 16, None)
    with torch.device("meta"):
        decoder = config.build(
            encoder_dim=768, encoder_depth=12, num_prefix=1, base_grid=(14, 14), num_values=768
        )
    # Per block: two norms, q, kv at the encoder's width, proj, and an MLP of ratio 4; then the mixture.
    block = 2 * (2 * 512) + 2 * (512 * 512 + 512) + 768 * 1024 + 1024 + 2 * 512 * 2048 + 2048 + 512
    mixture = 12 * 13 + 12 * 2 * 768
    expected = 512 + 12 * block + mixture + 2 * 512 + (512 * 768 + 768)
    assert sum(p.numel() for p in decoder.parameters()) == expected


@pytest.mark.parametrize(
    ("width", "heads", "message"),
    [
        (12, 5, r"model\.decoder\.num_heads 5 does not divide model\.decoder\.embed_dim 12"),
        (6, 3, r"model\.decoder\.embed_dim 6 is not a multiple of 4"),
    ],
)
def test_a_width_that_does_not_divide_gets_a_sentence(width: int, heads: int, message: str) -> None:
    config = CrossDecoderConfig(embed_dim=width, depth=1, num_heads=heads)
    with pytest.raises(UserError, match=message):
        config.build(encoder_dim=8, encoder_depth=1, num_prefix=1, base_grid=BASE, num_values=4)
