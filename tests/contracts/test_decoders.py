"""What every decoder promises; a new file in etpp_ssl/model with a `...DecoderConfig` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import timm
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

import etpp_ssl.model
from etpp_ssl.export.timm import export
from etpp_ssl.messages import members_at
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import MaskCounts, random_masking, removed_ids
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.mae import decoder_flops, other_decoders
from etpp_ssl.train.launch import pretrain

PATCH = (4, 3)
GRIDS = [(4, 6), (2, 3), (3, 5), (6, 4), (7, 8)]


def decoder_configs() -> list[type[BaseModel]]:
    """The Config classes of the model package that are decoders."""
    found = []
    for module_info in pkgutil.iter_modules(etpp_ssl.model.__path__, etpp_ssl.model.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for name, member in vars(module).items():
            if name.endswith("DecoderConfig") and member.__module__ == module.__name__:
                found.append(member)
    return found


def variants(config: type[BaseModel]) -> list[dict[str, Any]]:
    """Settings of a small decoder: the default, and each value of each choice of words."""
    small = {
        "name": config.model_fields["name"].default,
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 3,
    }
    choices = [
        {key: value}
        for key, field in config.model_fields.items()
        if key != "name" and get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)[1:]
    ]
    return [small, *({**small, **choice} for choice in choices)]


CONFIGS = decoder_configs()

every_decoder = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id="-".join(str(v) for v in settings.values() if isinstance(v, str)))
        for config in CONFIGS
        for settings in variants(config)
    ],
)
every_grid = pytest.mark.parametrize("grid", GRIDS)


def make_model(settings: dict[str, Any], **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = {"name": "vit", "patch_size": PATCH, "embed_dim": 16, "depth": 3, "num_heads": 2}
    config = ModelConfig(**{**encoder, "reg_tokens": 2, "decoder": settings, **changes})
    model = config.build(image_size=(16, 18), in_chans=3, num_values=7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(grid: tuple[int, int], num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, ids of visible patches, ids of half of the masked ones."""
    generator = torch.Generator().manual_seed(1)
    num_patches = grid[0] * grid[1]
    images = torch.randn(num, 3, grid[0] * PATCH[0], grid[1] * PATCH[1], generator=generator)
    ids_keep = random_masking(torch.arange(num), num_patches, max(1, num_patches // 4), seed=0)
    removed = removed_ids(ids_keep, num_patches)
    return images, ids_keep, removed[:, ::2]


def test_the_search_finds_the_decoders_that_recipes_know_and_no_name_twice() -> None:
    names = [config.model_fields["name"].default for config in CONFIGS]
    assert {"mae", "cross"} <= set(names)
    assert len(names) == len(set(names))
    assert set(CONFIGS) == set(members_at(ModelConfig, ["decoder"]))


@every_decoder
@every_grid
def test_it_predicts_what_is_asked_in_the_order_asked_on_any_grid(
    settings: dict[str, Any], grid: tuple[int, int]
) -> None:
    model = make_model(settings)
    images, ids_keep, ids = batch(grid)
    with torch.no_grad():
        everything = model(images, ids_keep)
        assert torch.equal(everything.ids_predicted, removed_ids(ids_keep, grid[0] * grid[1]))
        assert everything.values_BMV.shape == (*everything.ids_predicted.shape, 7)
        asked = model(images, ids_keep, ids)
        assert asked.values_BMV.shape == (*ids.shape, 7)
        assert torch.equal(asked.ids_predicted, ids)
        backward = model(images, ids_keep, ids.flip(1))
    assert asked.values_BMV.isfinite().all()
    torch.testing.assert_close(backward.values_BMV.flip(1), asked.values_BMV, rtol=1e-4, atol=1e-5)


@every_decoder
def test_masked_pixels_and_other_images_have_no_influence(settings: dict[str, Any]) -> None:
    model = make_model(settings)
    images, ids_keep, ids = batch((4, 6))
    hidden = images.clone().unflatten(2, (4, PATCH[0])).unflatten(4, (6, PATCH[1]))
    for image, row in enumerate(removed_ids(ids_keep, 24).tolist()):
        for patch in row:
            hidden[image, :, patch // 6, :, patch % 6] = float("nan")
    hidden = hidden.flatten(4, 5).flatten(2, 3)
    with torch.no_grad():
        seen = model(images, ids_keep, ids).values_BMV
        assert torch.equal(model(hidden, ids_keep, ids).values_BMV, seen)
        for i in range(len(images)):
            alone = model(images[i : i + 1], ids_keep[i : i + 1], ids[i : i + 1]).values_BMV
            torch.testing.assert_close(alone[0], seen[i], rtol=1e-4, atol=1e-5)


@every_decoder
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_reaches_every_parameter_that_is_trained(
    settings: dict[str, Any], checkpointing: bool
) -> None:
    model = make_model(settings, grad_checkpointing=checkpointing)
    for grid in GRIDS:
        images, ids_keep, ids = batch(grid)
        model.zero_grad()
        model(images, ids_keep, ids).values_BMV.square().mean().backward()
        for name, parameter in model.named_parameters():
            # What has no gradient must be frozen, or several processes wait for it for ever.
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name


@every_decoder
def test_grad_checkpointing_changes_no_gradient(settings: dict[str, Any]) -> None:
    images, ids_keep, ids = batch((4, 6))
    grads = []
    for checkpointing in (False, True):
        model = make_model(settings, grad_checkpointing=checkpointing)
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = model(images, ids_keep, ids).values_BMV.square().mean()
        grads.append(torch.autograd.grad(loss, trained))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_decoder
def test_autocast_and_half_precision_parameters_run(settings: dict[str, Any]) -> None:
    model = make_model(settings)
    images, ids_keep, ids = batch((4, 6))
    exact = model(images, ids_keep, ids).values_BMV
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(images, ids_keep, ids).values_BMV
    assert (rough.float() - exact).square().mean() < 0.02 * exact.square().mean()
    rough.float().square().mean().backward()
    half = model.bfloat16()
    assert half(images.bfloat16(), ids_keep, ids).values_BMV.dtype == torch.bfloat16


@every_decoder
def test_its_cost_is_counted_apart_and_grows_with_what_is_predicted(settings: dict[str, Any]) -> None:
    config = ModelConfig(decoder=settings).decoder
    assert {other.name for other in other_decoders(config)} == {
        c.model_fields["name"].default for c in CONFIGS
    } - {settings["name"]}
    with torch.device("meta"):
        model = make_model(settings)
    flops = [decoder_flops(config, model, (4, 6), MaskCounts(24, 6, num), 7) for num in (4, 9, 18)]
    assert 0 < flops[0] < flops[1] < flops[2]


def overrides(settings: dict[str, Any]) -> list[str]:
    small = {**settings, "embed_dim": 8, "depth": 1, "num_heads": 2}
    text = ", ".join(f"{key}: {value}" for key, value in small.items())
    return [f"model.decoder={{{text}}}", "budget_epochs=0.5"]


@every_decoder
def test_the_export_is_the_encoder_alone_and_opens_in_timm(
    settings: dict[str, Any], tiny_recipe: Callable[..., Recipe]
) -> None:
    run = pretrain(tiny_recipe(*overrides(settings)))
    said: list[str] = []
    folder = export(run.folder.path, say=said.append)
    exported = load_file(folder / "model.safetensors")
    plain = tiny_recipe().build_model().encoder
    assert {name: value.shape for name, value in exported.items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.inference_mode():
        assert torch.equal(opened(images), run.bare_model.eval().encoder(images))

    # The card says where the final norm comes from, and what it says is so.
    card = " ".join((folder / "README.md").read_text().split())
    trained = bool((exported["norm.weight"] != 1).any())
    assert ("Its final norm was trained with it" in card) == trained
    assert ("Its final norm is not trained (weight 1 and bias 0)" in card) == (not trained)
    assert bool(said) != trained
    assert trained != (not exported["norm.bias"].any())


@every_decoder
def test_a_run_with_it_resumes_to_the_same_bits(
    settings: dict[str, Any],
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    extra = overrides(settings)
    if "predict_ratio" in type(ModelConfig(decoder=settings).decoder).model_fields:
        extra.append("model.decoder.predict_ratio=0.4")
    pretrain(tiny_recipe(f"output={tmp_path / 'whole'}", *extra))
    recipe = tiny_recipe(f"output={tmp_path / 'cut'}", "checkpoint.every_steps=3", *extra)
    with crash_after(4):
        pretrain(recipe)
    pretrain(recipe)
    whole, cut = (RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
