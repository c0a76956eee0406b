"""Encoders of other libraries by their weights alone: features are the library's own, to 1e-5."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published_layouts import StateDict, plain_tokens, published_encoder, published_mae
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn
from torch.nn import functional as F

import etpp_ssl
from etpp_ssl.model.encoders import maskable
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.weights.architecture import Architecture, _ratio, architecture_of, licence_of
from etpp_ssl.weights.layouts import in_timm_names, recognise
from etpp_ssl.weights.loading import load_classifier_init, load_init, read_init

DIMS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**DIMS, "intermediate_size": 96}
SIZE, OF_14 = {"image_size": 32, "patch_size": 8}, {"image_size": 28, "patch_size": 14}
SIGLIP = "so400m_patch16_siglip_256"
THEIRS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "dinov2": (
        "Dinov2",
        {**DIMS, "mlp_ratio": 2, **OF_14},
        "DINOv2",
        "small_patch14_dinov2",
    ),
    "dinov2_registers": (
        "Dinov2WithRegisters",
        {**DIMS, "mlp_ratio": 2, **OF_14, "num_register_tokens": 2},
        "DINOv2",
        "small_patch14_reg4_dinov2",
    ),
    "dinov2_giant": (
        "Dinov2",
        {**DIMS, **OF_14, "use_swiglu_ffn": True},
        "DINOv2",
        "giant_patch14_dinov2",
    ),
    "dinov3": (
        "DINOv3ViT",
        {**WIDE, **SIZE, "num_register_tokens": 3},
        "DINOv3",
        "small_patch16_dinov3_qkvb",
    ),
    "dinov3_plus": (
        "DINOv3ViT",
        {**WIDE, **SIZE, "use_gated_mlp": True, "hidden_act": "silu"},
        "DINOv3",
        "small_plus_patch16_dinov3_qkvb",
    ),
    "pixio": ("Pixio", {**DIMS, "mlp_ratio": 2, **SIZE}, "Pixio", "vit"),
    "vit": ("ViT", {**WIDE, **SIZE, "layer_norm_eps": 1e-6}, "ViT", "vit"),
    "siglip": (
        "SiglipVision",
        {**WIDE, **SIZE},
        "SigLIP",
        "so400m_patch16_siglip_256",
    ),
    "siglip2": (
        "Siglip2Vision",
        {**WIDE, "num_patches": 16, "patch_size": 8},
        "SigLIP",
        "so400m_patch16_siglip_256",
    ),
    "clip": (
        "CLIPVision",
        {**WIDE, **SIZE},
        "CLIP",
        "base_patch16_clip_quickgelu_224",
    ),
}
"""transformers' class, its config, the family and the end of timm's name that are read off."""


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def images_of(size: int, num: int = 2) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


def features_of(model: Any, kind: str, images: Tensor) -> Tensor:
    """The library's tokens after its final norm."""
    if kind == "Siglip2Vision":
        patch, h = 8, images.shape[-1] // 8
        cut = images.unflatten(2, (h, patch)).unflatten(4, (h, patch))
        patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[h, h]] * len(images))
        given = {"pixel_attention_mask": torch.ones(patches.shape[:2]), "spatial_shapes": shapes}
        return model(pixel_values=patches, **given).last_hidden_state
    tokens = model(images).last_hidden_state
    return model.post_layernorm(tokens) if kind == "CLIPVision" else tokens


def started(init: Path, size: int = 32) -> tuple[MaskedAutoencoder, Architecture, list[str]]:
    """A masked autoencoder whose recipe names nothing but the weights."""
    found = read_init(str(init), print)
    named = recognise(found.tensors, "it")
    activation = found.activation or named.activation
    architecture = architecture_of(replace(found, tensors=named.tensors, activation=activation), "it")
    decoder = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    config = ModelConfig(**architecture.keys, decoder=decoder)
    model = config.build(image_size=(size, size), in_chans=3, num_values=9)
    said: list[str] = []
    load_init(model, str(init), said.append)
    return model.eval(), architecture, said


@pytest.mark.parametrize("example", THEIRS)
def test_transformers_features_from_its_folder_alone(example: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, config, family, name = THEIRS[example]
    if not hasattr(transformers, f"{kind}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}Model")
    theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
    shaken(theirs).save_pretrained(tmp_path)
    model, architecture, said = started(tmp_path, config.get("image_size", 32))
    assert (architecture.family, architecture.name.removeprefix("vit_")) == (family, name)
    images = images_of(config.get("image_size", 32))
    with torch.inference_mode():
        expected = features_of(theirs, kind, images)
        torch.testing.assert_close(model.encoder.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        opened = etpp_ssl.load(tmp_path, device="cpu").model
        torch.testing.assert_close(opened.forward_features(images), expected, rtol=1e-5, atol=1e-5)
    assert not isinstance(maskable(model.encoder), str)
    if example != "dinov2_giant":
        files, memory = (
            recognise(s).tensors for s in (read_init(str(tmp_path), print).tensors, theirs.state_dict())
        )
        assert all(torch.equal(value, memory[name]) for name, value in files.items())
        assert files.keys() == memory.keys()
    assert "an encoder without decoder in the names of transformers'" in said[0]
    assert "the decoder is initialised anew: init has none" in said


def metas(state: StateDict) -> StateDict:
    """timm's names of DINOv2 and DINOv3 as Meta's, with what only pre-training has."""
    is_three = any(name.endswith("gamma_1") for name in state)
    token = "storage_tokens" if is_three else "register_tokens"
    gated = any(".fc1_g." in name for name in state)
    swaps = {
        "reg_token": token,
        ".gamma_1": ".ls1.gamma",
        ".gamma_2": ".ls2.gamma",
        ".fc1_g.": ".w1.",
        ".fc1_x.": ".w2.",
    }
    swaps |= {".mlp.fc2.": ".mlp.w3."} if gated else {}
    found: StateDict = {"mask_token": torch.randn(1, 64)}
    for name, value in state.items():
        for ours, theirs in swaps.items():
            name = name.replace(ours, theirs)
        if name.endswith("attn.q_bias"):
            v = state[name.replace("q_bias", "v_bias")]
            found[name.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.randn(64), v])
            found[name.replace("q_bias", "qkv.bias_mask")] = torch.ones(192)
        elif not name.endswith("attn.v_bias"):
            found[name] = value
    if is_three:
        found["rope_embed.periods"] = torch.randn(4)
    elif token in found:
        found["pos_embed"] = torch.cat([torch.randn(1, 1, 64), found["pos_embed"]], dim=1)
    return found


@pytest.mark.parametrize(
    ("name", "size", "family"),
    [
        ("vit_small_patch14_reg4_dinov2", 28, "DINOv2"),
        ("vit_giant_patch14_dinov2", 28, "DINOv2"),
        ("vit_small_patch16_dinov3", 32, "DINOv3"),
        ("vit_small_patch16_dinov3_qkvb", 32, "DINOv3"),
        ("vit_huge_plus_patch16_dinov3_qkvb", 32, "DINOv3"),
    ],
)
def test_metas_files_are_what_timm_makes_of_them(name: str, size: int, family: str, tmp_path: Path) -> None:
    dims = {"img_size": size, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0, "mlp_ratio": 4}
    theirs = shaken(timm.create_model(name, **dims))
    published = {key: value.clone() for key, value in metas(theirs.state_dict()).items()}
    convert = eva_filter if "dinov3" in name else vit_filter
    theirs.load_state_dict(convert(dict(published), theirs))
    torch.save(
        {"teacher": {f"backbone.{key}": value for key, value in published.items()}}, tmp_path / "w.pth"
    )
    model, architecture, _ = started(tmp_path / "w.pth", size)
    assert architecture.family == family
    with torch.inference_mode():
        ours = model.encoder.forward_features(images_of(size))
        torch.testing.assert_close(ours, theirs.forward_features(images_of(size)), rtol=1e-5, atol=1e-5)


def test_ibots_teacher_is_a_plain_vit(tmp_path: Path) -> None:
    state = published_encoder(learned=True)
    extra = {"masked_embed": torch.zeros(1, 64)}
    teacher = {f"backbone.{key}": value for key, value in {**state, **extra}.items()}
    torch.save(
        {"student": teacher, "teacher": {**teacher, "head.mlp.0.weight": torch.zeros(3, 64)}},
        tmp_path / "w.pth",
    )
    model, architecture, said = started(tmp_path / "w.pth", 16)
    assert (architecture.name, architecture.keys["pos_embed"]) == ("vit", "learned")
    assert "the mask token of its pre-training is dropped" in said
    with torch.inference_mode():
        plain = F.layer_norm(
            plain_tokens(state, images_of(16), 1), (64,), state["norm.weight"], state["norm.bias"], eps=1e-6
        )
        torch.testing.assert_close(model.encoder.forward_features(images_of(16)), plain, rtol=1e-5, atol=1e-5)


def test_open_clips_tower_is_timms(tmp_path: Path) -> None:
    """Names of OpenAI's and OpenCLIP's vision tower; timm converts them with its own rules."""
    theirs = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", img_size=32, embed_dim=64, depth=2, num_heads=1, num_classes=0
    )
    shaken(theirs)
    swaps = {"patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre.", "blocks.": "transformer.resblocks.",
             "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.",
             "mlp.fc2.": "mlp.c_proj.", "norm1.": "ln_1.", "norm2.": "ln_2."}  # fmt: skip
    state: StateDict = {"visual.proj": torch.zeros(64, 8), "logit_scale": torch.ones(1)}
    for name, value in theirs.state_dict().items():
        new = name if not name.startswith("norm.") else name.replace("norm.", "ln_post.")
        for ours, others in swaps.items():
            new = new.replace(ours, others)
        state[f"visual.{new}"] = value
    state["visual.class_embedding"] = state.pop("visual.cls_token").flatten()
    state["visual.positional_embedding"] = state.pop("visual.pos_embed")[0]
    converted = vit_filter({"visual.class_embedding": state["visual.class_embedding"], **state}, theirs)
    theirs.load_state_dict({k: v for k, v in converted.items() if not k.startswith("head.")})
    torch.save(state, tmp_path / "w.pth")
    model, architecture, _ = started(tmp_path / "w.pth")
    assert any("QuickGELU, is assumed" in note for note in architecture.notes)
    with torch.inference_mode():
        ours = model.encoder.forward_features(images_of(32))
        torch.testing.assert_close(ours, theirs.forward_features(images_of(32)), rtol=1e-5, atol=1e-5)


def test_pixios_own_file_has_eight_class_tokens(tmp_path: Path) -> None:
    state = published_mae(decoder_width=16)
    positions = torch.randn(1, 8 + 16, 64)
    state |= {"cls_token": torch.randn(1, 8, 64), "pos_embed": positions}
    state["decoder_pos_embed"] = torch.randn(1, 8 + 16, 16)
    torch.save({"model": state}, tmp_path / "w.pth")
    model, architecture, said = started(tmp_path / "w.pth", 16)
    assert (architecture.family, architecture.dims["reg_tokens"], architecture.grid) == ("Pixio", 7, (4, 4))
    assert "its decoder's positions are not a sin-cos table; they are replaced by one" in said
    tokens = torch.cat([model.encoder.cls_token, model.encoder.reg_token], dim=1)
    assert torch.equal(tokens, state["cls_token"])
    assert torch.equal(model.encoder.pos_embed, positions)
    assert torch.equal(model.decoder.mask_token, state["mask_token"])


def test_a_classifier_starts_from_transformers_dinov3(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**THEIRS["dinov3"][1]))
    shaken(theirs).save_pretrained(tmp_path)
    dims = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    net = timm.create_model(
        "vit_small_patch16_dinov3_qkvb", **dims, num_reg_tokens=3, num_classes=5, global_pool="token"
    ).eval()
    said: list[str] = []
    licence = load_classifier_init(net, str(tmp_path), said.append)
    assert "DINOv3 License" in (licence or "")
    assert "the head is initialised anew: init has none" in said
    with torch.inference_mode():
        expected = theirs(images_of(32)).pooler_output
        features = net.forward_head(net.forward_features(images_of(32)), pre_logits=True)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(1152, 4304), (384, 1536), (1536, 8192), (192, 511), (49, 59)])
def test_a_ratio_gives_the_width_back(width: int, hidden: int) -> None:
    assert int(width * _ratio(hidden, width)) == hidden


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (published_mae(), "MAE's. Those that Meta published are under CC BY-NC 4.0"),
        (published_encoder(), "CC BY-NC 4.0"),
        (published_encoder(learned=True), None),
        ({**published_encoder(learned=True), "cls_token": torch.zeros(1, 8, 64)}, "Pixio's. Those that Meta"),
    ],
)
def test_the_licence_that_tensors_hint_at(state: StateDict, words: str | None) -> None:
    for weights in (recognise(state), in_timm_names(state)):
        found = licence_of(weights)
        assert found is None if words is None else words in (found or "")
