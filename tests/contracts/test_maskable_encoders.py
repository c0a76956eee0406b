"""What every kind of encoder promises; a new class of `MaskableEncoder` needs a line in `EXAMPLES`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import etpp_ssl
from etpp_ssl.config import UserError
from etpp_ssl.dist.sharding import unit_names
from etpp_ssl.evaluation.feature_maps import tokens_of
from etpp_ssl.export.timm import export
from etpp_ssl.model.encoders import MaskableEncoder, encode_visible, encoder_of
from etpp_ssl.model.encoders.build import EXPLICIT_NAME, _kinds
from etpp_ssl.model.layers import layer_ids
from etpp_ssl.model.mae import ModelConfig
from etpp_ssl.model.masking import random_masking
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain
from etpp_ssl.train.plan import plan_run

SIZE, PATCH = (16, 24), (4, 4)
GRIDS = [(4, 6), (2, 3), (3, 5), (6, 4), (7, 8)]
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("VitEncoder", {"name": EXPLICIT_NAME, "reg_tokens": 1}),
    "dinov2": ("VitEncoder", {"name": "vit_small_patch14_reg4_dinov2", "pos_embed": "learned"}),
    "dinov3": ("EvaEncoder", {"name": "vit_small_plus_patch16_dinov3_qkvb"}),
    "eva02": ("EvaEncoder", {"name": "eva02_tiny_patch14_224", "pos_embed": "learned"}),
    "perception": ("EvaEncoder", {"name": "vit_pe_core_base_patch16_224", "class_token": False}),
}
"""The class's name, and what stands in `model`."""
every_encoder = pytest.mark.parametrize("example", EXAMPLES)


def config_of(example: str, **changes: Any) -> ModelConfig:
    tiny = {"patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2}
    decoder = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    return ModelConfig(**{**tiny, "decoder": decoder, **EXAMPLES[example][1], **changes})


@cache
def build(example: str) -> MaskableEncoder:
    """An encoder in evaluation mode with no parameter at the special value of its initialisation."""
    torch.manual_seed(0)
    net = config_of(example).build(image_size=SIZE, in_chans=3, num_values=48).encoder.eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return encoder_of(net)


def images_on(grid: tuple[int, int], num: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, grid[0] * PATCH[0], grid[1] * PATCH[1], generator=generator)


def test_every_kind_of_encoder_has_an_example() -> None:
    assert {kind.__name__ for kind in _kinds()} == {kind for kind, _ in EXAMPLES.values()}


@every_encoder
def test_with_everything_visible_the_tokens_are_timms_to_the_last_bit(example: str) -> None:
    encoder = build(example)
    architecture, args = config_of(example).encoder_args(SIZE, 3)
    stock = timm.create_model(architecture, pretrained=False, **args).eval()
    stock.load_state_dict(encoder.net.state_dict())
    with torch.no_grad():
        tokens = encode_visible(encoder.net, images_on(encoder.grid), None)
        assert torch.equal(tokens, stock.forward_features(images_on(encoder.grid)))
        pooled = stock.forward_head(tokens, pre_logits=True)
        assert torch.equal(encoder.pool(tokens), pooled)
        assert torch.equal(encoder.pool(tokens, "avg"), tokens[:, encoder.net.num_prefix_tokens :].mean(1))


@every_encoder
@pytest.mark.parametrize("grid", GRIDS)
def test_gathering_first_equals_gathering_in_front_of_the_blocks(example: str, grid: tuple[int, int]) -> None:
    encoder, images = build(example), images_on(grid, num=3)
    ids_keep = random_masking(torch.arange(3), grid[0] * grid[1], 3, seed=0)
    with torch.no_grad():
        fast = encode_visible(encoder.net, images, ids_keep)
        for row, ids in enumerate(ids_keep):
            alone = tokens_of_visible(encoder, images[row : row + 1], grid, ids.tolist())
            torch.testing.assert_close(fast[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def tokens_of_visible(
    encoder: MaskableEncoder, images: Tensor, grid: tuple[int, int], ids: list[int]
) -> Tensor:
    """One image's visible patches through timm's modules, patch by patch."""
    net, (p, q) = encoder.net, PATCH
    positions = encoder.positions(grid)
    prefix = encoder.num_prefix_positions
    rows = []
    for n in ids:
        top, left = n // grid[1] * p, n % grid[1] * q
        patch = images[:, :, top : top + p, left : left + q]
        token = net.patch_embed.norm(net.patch_embed.proj(patch).flatten(1))
        rows.append(token if positions.added is None else token + positions.added[:, prefix + n])
    front = [token[0] for token in (net.cls_token, net.reg_token) if token is not None]
    tokens = torch.cat([*front, *rows])[None]
    if positions.added is not None and prefix:
        tokens[:, :prefix] += positions.added[:, :prefix]
    tokens = net.norm_pre(tokens)
    for block in net.blocks:
        inputs = () if positions.rotary is None else (positions.rotary[ids],)
        tokens = block(tokens, *inputs)
    normed: Tensor = net.norm(tokens)
    return normed


@every_encoder
def test_features_at_another_size_are_those_of_pre_training(example: str) -> None:
    encoder, images = build(example), images_on((3, 5))
    grid, added = (3, 5), None
    if encoder.net.pos_embed is not None and not encoder.net.pos_embed.requires_grad:
        added = encoder.sincos_at(grid)
    everything = torch.arange(15).expand(2, -1)
    with torch.no_grad():
        trained = encode_visible(encoder.net, images, everything, positions=added)
        torch.testing.assert_close(tokens_of(encoder.net, images, SIZE), trained, rtol=1e-4, atol=1e-5)


@every_encoder
def test_masked_pixels_have_no_influence_and_every_parameter_a_gradient(example: str) -> None:
    torch.manual_seed(0)
    model = config_of(example).build(image_size=SIZE, in_chans=3, num_values=48).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images, ids_keep = images_on((3, 5)), torch.tensor([[0, 4, 11], [2, 3, 14]])
    changed = images.clone()
    changed[:, :, 4:8] = float("nan")
    first = encode_visible(model.encoder, images, ids_keep)
    assert torch.equal(encode_visible(model.encoder, changed, ids_keep), first)
    model(images, ids_keep).values_BMV.square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in trained.items() if gradient is None or not gradient.any()]


@every_encoder
def test_recomputed_blocks_change_no_gradient_and_autocast_little(example: str) -> None:
    gradients = []
    images, ids_keep = images_on((3, 5)), torch.tensor([[0, 4, 11], [2, 3, 14]])
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = config_of(example, grad_checkpointing=checkpointing)
        model = config.build(image_size=SIZE, in_chans=3, num_values=48).train()
        values = model(images, ids_keep).values_BMV
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(values.square().mean(), trained))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images, ids_keep).values_BMV
    assert (rough.float() - values).square().mean() < 0.02 * values.square().mean()


@every_encoder
def test_its_layers_are_known_and_its_blocks_are_the_units_of_fsdp(example: str) -> None:
    encoder = build(example)
    layers, top = layer_ids(encoder.net)
    assert top == 3
    assert {layers[name] for name in layers if name.startswith("blocks.1.")} == {2}
    assert layers["patch_embed.proj.weight"] == 0
    model = config_of(example).build(image_size=SIZE, in_chans=3, num_values=48)
    names = {type(block).__name__ for block in encoder.net.blocks}
    assert set(unit_names(model)) == names | {"Block"}


@every_encoder
def test_a_run_resumes_to_the_same_bits_plans_and_exports_what_timm_opens(
    example: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    dims = ", ".join(f"{key}: {value}" for key, value in EXAMPLES[example][1].items())
    extra = [f"model={{{dims}, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}}"]
    extra += ["model.decoder={embed_dim: 8, depth: 1, num_heads: 2}", "budget_epochs=0.5"]
    whole = pretrain(tiny_recipe(f"output={tmp_path / 'whole'}", *extra))
    recipe = tiny_recipe(f"output={tmp_path / 'cut'}", "checkpoint.every_steps=3", *extra)
    with crash_after(4):
        pretrain(recipe)
    pretrain(recipe)
    ends = [RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("whole", "cut")]
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []

    assert plan_run(recipe).total_flops > 0

    opened = timm.create_model(f"local-dir:{export(whole.folder.path)}", pretrained=True).eval()
    with torch.inference_mode():
        images = torch.randn(2, 3, *SIZE)
        assert torch.equal(opened(images), whole.bare_model.eval().encoder(images))
        assert torch.equal(etpp_ssl.load(whole.folder.path, device="cpu").model(images), opened(images))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("naflexvit_base_patch16_gap", "is a NaFlexVit.*embeds patches with their places by itself"),
        ("hiera_tiny_224", "is a Hiera.*merges patches between its stages"),
        ("vit_small_patch16_rope_mixed_224", "RotaryEmbeddingMixed"),
    ],
)
def test_a_network_that_cannot_be_masked_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"model.name '{name}' .*{reason}"):
        ModelConfig(name=name).encoder_args((224, 224), 3)
