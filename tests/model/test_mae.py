"""The whole model against MAE's formula: full embedding, full decoder, loss on removed patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.decoders import MAEDecoderConfig
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig, Prediction
from etpp_ssl.model.masking import random_masking
from etpp_ssl.targets.pixels import PixelObjective

SIZE, PATCH = (20, 28), (4, 4)
BASE = (5, 7)
TINY: dict[str, Any] = {
    "name": "vit",
    "patch_size": PATCH,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder": {"embed_dim": 12, "depth": 2, "num_heads": 3},
}
PREFIXES: dict[str, dict[str, Any]] = {
    "cls": {},
    "cls_and_registers": {"reg_tokens": 2},
    "no_prefix": {"class_token": False},
}


def make_model(in_chans: int = 3, shake: bool = True, **changes: Any) -> MaskedAutoencoder:
    """A tiny model; shaken, no parameter keeps the special value of its initialisation."""
    config = ModelConfig(**{**TINY, **changes})
    patch = config.resolved_patch(SIZE, in_chans)
    torch.manual_seed(0)
    num_values = patch[0] * patch[1] * in_chans
    model = config.build(image_size=SIZE, in_chans=in_chans, num_values=num_values)
    if shake:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(size: tuple[int, int] = SIZE, in_chans: int = 3, num: int = 3) -> tuple[Tensor, Tensor]:
    """Images, and the ids of a quarter of their patches."""
    generator = torch.Generator().manual_seed(1)
    num_patches = (size[0] // 4) * (size[1] // 4)
    images = torch.randn(num, in_chans, *size, generator=generator)
    return images, random_masking(torch.arange(num), num_patches, round(num_patches / 4), seed=0)


def sincos_table(dim: int) -> Tensor:
    """MAE's table at the base grid: column half before row half, [sin | cos] in each."""
    grid_w, grid_h = np.meshgrid(np.arange(BASE[1]), np.arange(BASE[0]))
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    angles = [np.outer(axis.ravel(), omega) for axis in (grid_w, grid_h)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(table).float()


def rows(tokens: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([token[i] for token, i in zip(tokens, ids, strict=True)])


def plain_mae_loss(model: MaskedAutoencoder, images: Tensor, ids_keep: Tensor, norm_pix: bool) -> Tensor:
    """MAE (He et al., CVPR 2022, section 3), every step on the full grid of patches."""
    encoder, decoder = model.encoder, model.decoder
    num_images, num_patches = len(images), BASE[0] * BASE[1]
    removed = torch.ones(num_images, num_patches).scatter(1, ids_keep, 0.0)

    tokens = encoder.patch_embed(images) + sincos_table(encoder.embed_dim)
    tokens = rows(tokens, ids_keep)
    # The positions of the prefix tokens are zero.
    prefix = [t for t in (encoder.cls_token, encoder.reg_token) if t is not None]
    num_prefix = sum(token.shape[1] for token in prefix)
    tokens = torch.cat([*(t.repeat(num_images, 1, 1) for t in prefix), tokens], dim=1)
    latent = encoder.norm(encoder.blocks(tokens))

    latent = decoder.embed(latent)
    full = decoder.mask_token.repeat(num_images, num_patches, 1)
    full = full.scatter(1, ids_keep[..., None].expand(-1, -1, full.shape[-1]), latent[:, num_prefix:])
    full = torch.cat([latent[:, :num_prefix], full + sincos_table(full.shape[-1])], dim=1)
    for block in decoder.blocks:
        full = block(full)
    prediction = decoder.head(decoder.norm(full))[:, num_prefix:]

    # Patch values in the order (row, column, channel).
    p, q = PATCH
    target = images.unfold(2, p, p).unfold(3, q, q).permute(0, 2, 3, 4, 5, 1)
    target = target.reshape(num_images, num_patches, -1)
    if norm_pix:
        mean = target.mean(dim=-1, keepdim=True)
        variance = ((target - mean) ** 2).sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    loss_per_patch = ((prediction - target) ** 2).mean(dim=-1)
    return (loss_per_patch * removed).sum() / removed.sum()


def loss_of(model: MaskedAutoencoder, images: Tensor, ids_keep: Tensor, norm_pix: bool) -> Tensor:
    objective = PixelObjective(model.patch_size, images.shape[1], norm_pix=norm_pix)
    prediction = model(images, ids_keep)
    return objective(prediction.values_BMV, prediction.ids_predicted, images)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_the_loss_and_its_gradients_are_maes(norm_pix: bool, prefix: str, in_chans: int) -> None:
    model = make_model(in_chans, **PREFIXES[prefix])
    images, ids_keep = batch(in_chans=in_chans)
    images = images * 2 + 0.5
    ours = loss_of(model, images, ids_keep, norm_pix)
    plain = plain_mae_loss(model, images, ids_keep, norm_pix)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours_grads = torch.autograd.grad(ours, list(trained.values()))
    plain_grads = torch.autograd.grad(plain, list(trained.values()))
    for name, fast, slow in zip(trained, ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
def test_every_bandwidth_runs_with_the_same_parameters(pos_embed: str) -> None:
    model = make_model(pos_embed=pos_embed)
    before = {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()}
    for size in ((8, 12), (12, 16), SIZE, (28, 20), (40, 56)):
        images, ids_keep = batch(size)
        model.zero_grad()
        values, ids_removed = model(images, ids_keep)
        num_patches = size[0] * size[1] // 16
        assert values.shape == (3, num_patches - ids_keep.shape[1], 48)
        everything = torch.cat([ids_keep, ids_removed], dim=1).sort(dim=1).values
        assert torch.equal(everything, torch.arange(num_patches).expand(3, -1))
        values.square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
    assert {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()} == before


def test_given_ids_make_the_forward_deterministic() -> None:
    model = make_model()
    images, ids_keep = batch()
    torch.manual_seed(1)
    first = model(images, ids_keep)
    torch.manual_seed(2)
    second = model(images, ids_keep)
    assert isinstance(first, Prediction)
    assert torch.equal(first.values_BMV, second.values_BMV)
    assert torch.equal(first.ids_predicted, second.ids_predicted)
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    model(images, ids_keep)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("mask_ratio", "num_masked"), [(0.75, 26), (0.5, 17), (0.8, 28)])
def test_without_ids_it_draws_a_mask_of_its_own_ratio_for_each_image(
    mask_ratio: float, num_masked: int
) -> None:
    model = make_model(mask_ratio=mask_ratio)
    images, _ = batch(num=8)
    torch.manual_seed(3)
    drawn = model(images)
    assert drawn.values_BMV.shape == (8, num_masked, 48)
    assert len(drawn.ids_predicted.unique(dim=0)) == 8
    torch.manual_seed(3)
    assert torch.equal(model(images).ids_predicted, drawn.ids_predicted)
    assert not torch.equal(model(images).ids_predicted, drawn.ids_predicted)
    kept = [sorted(set(range(35)) - set(row)) for row in drawn.ids_predicted.tolist()]
    again = model(images, torch.tensor(kept))
    torch.testing.assert_close(again.values_BMV, drawn.values_BMV)


def test_an_images_prediction_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = make_model()
    images, ids_keep = batch()
    together = model(images, ids_keep).values_BMV
    for number in range(3):
        alone = model(images[number : number + 1], ids_keep[number : number + 1]).values_BMV
        torch.testing.assert_close(alone[0], together[number])


def test_grad_checkpointing_recomputes_every_block_and_changes_no_gradient() -> None:
    images, ids_keep = batch()

    def run(checkpointing: bool) -> tuple[Tensor, list[Tensor], list[int]]:
        model = make_model(grad_checkpointing=checkpointing)
        blocks = [*model.encoder.blocks, *model.decoder.blocks]
        calls = [0] * len(blocks)
        for number, block in enumerate(blocks):

            def count(*_: Any, number: int = number) -> None:
                calls[number] += 1

            block.register_forward_pre_hook(count)
        loss = loss_of(model, images, ids_keep, norm_pix=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        return loss, list(torch.autograd.grad(loss, trained)), calls

    plain_loss, plain_grads, plain_calls = run(checkpointing=False)
    saved_loss, saved_grads, saved_calls = run(checkpointing=True)
    assert torch.equal(saved_loss, plain_loss)
    for saved, plain in zip(saved_grads, plain_grads, strict=True):
        assert torch.equal(saved, plain)
    assert plain_calls == [1, 1, 1, 1]
    assert saved_calls == [2, 2, 2, 2]


def test_autocast_gives_nearly_the_same_loss_and_float32_gradients() -> None:
    model = make_model()
    images, ids_keep = batch()
    exact = loss_of(model, images, ids_keep, norm_pix=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = loss_of(model, images, ids_keep, norm_pix=True)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    rough.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_a_model_of_half_precision_parameters_runs() -> None:
    model = make_model().bfloat16()
    for size in (SIZE, (12, 16)):
        images, ids_keep = batch(size)
        assert model(images.bfloat16(), ids_keep).values_BMV.dtype == torch.bfloat16


def test_a_model_may_change_its_precision_after_its_first_use() -> None:
    model = make_model()
    images, ids_keep = batch((12, 16))
    model(images, ids_keep)
    assert model.bfloat16()(images.bfloat16(), ids_keep).values_BMV.dtype == torch.bfloat16


def test_a_first_use_in_inference_mode_does_not_spoil_training() -> None:
    model = make_model()
    for size in (SIZE, (12, 16)):
        images, ids_keep = batch(size)
        with torch.inference_mode():
            seen = loss_of(model, images, ids_keep, norm_pix=True)
        loss = loss_of(model, images, ids_keep, norm_pix=True)
        loss.backward()
        assert loss.item() == seen.item()


def test_the_patch_size_is_the_named_models_unless_given() -> None:
    assert ModelConfig().resolved_patch((224, 224), 3) == (16, 16)
    assert ModelConfig(name="vit_huge_patch14_224").resolved_patch((224, 224), 3) == (14, 14)
    assert ModelConfig(patch_size=8).resolved_patch((96, 160), 3) == (8, 8)
    assert ModelConfig(patch_size=(8, 16)).resolved_patch((96, 160), 3) == (8, 16)


def test_a_rectangular_patch_trains() -> None:
    model = make_model(patch_size=(5, 4))
    assert model.patch_size == (5, 4)
    images, _ = batch()
    assert model(images).values_BMV.shape == (3, 28 - 7, 60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_smal_patch16_224"}, r"is not a timm model; close names: .*vit_small_patch16"),
        ({"name": "resnet50"}, r"'resnet50' is a ResNet, not a plain .*close names: vit_"),
        ({"name": "swin_tiny_patch4_window7_224"}, "is a SwinTransformer, not a plain Vision"),
        ({"embed_dim": None, "depth": None}, r"model\.embed_dim, model\.depth must be given"),
        ({"patch_size": None}, r"model\.patch_size must be given"),
        ({"patch_size": 8}, r"model\.patch_size 8 does not divide the image height 20"),
        ({"num_heads": 3}, r"model\.num_heads 3 does not divide model\.embed_dim 16"),
        ({"embed_dim": 18, "num_heads": 3}, r"model\.embed_dim 18 is not a multiple of 4"),
        ({"decoder": {"embed_dim": 12, "num_heads": 5}}, r"model\.decoder\.num_heads 5 does not"),
    ],
)
def test_a_model_that_cannot_be_built_gets_a_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**{**TINY, **changes}).build(image_size=SIZE, in_chans=3, num_values=48)


@pytest.mark.parametrize(
    "changes",
    [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"depth": 0}, {"pos_embed": "rope"}, {"dept": 3}],
)
def test_a_setting_outside_its_range_or_misspelt_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        ModelConfig(**{**TINY, **changes})


def test_fixed_positions_follow_the_grid_and_learned_ones_stay_learned_when_frozen() -> None:
    torch.manual_seed(0)
    sizes = {"image_size": (16, 24), "in_chans": 3, "num_values": 5}
    dims = {"name": "vit", "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    decoder = MAEDecoderConfig(embed_dim=8, depth=1, num_heads=2)
    images, ids = torch.randn(2, 3, 8, 12), torch.tensor([[0, 3], [1, 5]])
    for kind in ("sincos", "learned"):
        model = ModelConfig(**dims, pos_embed=kind, decoder=decoder).build(**sizes)
        seen: list[torch.Tensor | None] = []
        model.encoder.blocks[0].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        before = model(images, ids).values_BMV
        # A probe or a teacher may freeze everything; that must not change what the model computes.
        model.requires_grad_(False)
        assert torch.equal(model(images, ids).values_BMV, before)
        assert model.fixed_positions == (kind == "sincos")
        # Fixed positions do not come from the parameter off the base grid, learned ones do.
        model.encoder.pos_embed[:, 1:] += 1.0
        assert torch.equal(model(images, ids).values_BMV, before) == (kind == "sincos")
