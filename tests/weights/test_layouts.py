"""Published checkpoints give what their own formulas give; anything else is refused in a sentence."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from published_layouts import (
    StateDict,
    plain_mae,
    plain_tokens,
    published_classifier,
    published_encoder,
    published_mae,
    sincos_with_cls,
)
from safetensors.torch import save_file
from torch.nn import functional as F

import etpp_ssl
from etpp_ssl.config import UserError
from etpp_ssl.export.official import official_names, to_huggingface
from etpp_ssl.model.decoders import MAEDecoderConfig
from etpp_ssl.model.mae import ModelConfig
from etpp_ssl.model.masking import random_masking
from etpp_ssl.model.pos_embed import sincos_pos_embed
from etpp_ssl.targets.pixels import PixelObjective
from etpp_ssl.weights.architecture import architecture_of
from etpp_ssl.weights.layouts import recognise
from etpp_ssl.weights.names import from_huggingface
from etpp_ssl.weights.official import load_official_mae
from etpp_ssl.weights.reading import read_state_dict
from etpp_ssl.weights.tensors import UNSET_POSITIONS

silent = partial(load_official_mae, say=lambda line: None)


def images(size: tuple[int, int] = (16, 16), in_chans: int = 3) -> torch.Tensor:
    return torch.randn(3, in_chans, *size, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_a_mae_with_decoder_predicts_what_its_formula_gives(grid: tuple[int, int], in_chans: int) -> None:
    state = published_mae(grid=grid, in_chans=in_chans)
    model = silent(state, num_heads=4)
    batch = images((4 * grid[0], 4 * grid[1]), in_chans)
    ids_keep = random_masking(torch.arange(3), grid[0] * grid[1], 5, seed=0)
    values, ids_removed = model(batch, ids_keep)
    expected = plain_mae(state, batch, ids_keep, num_heads=4, decoder_heads=16)
    index = ids_removed[:, :, None].expand(-1, -1, values.shape[-1])
    torch.testing.assert_close(values, expected.gather(1, index), rtol=1e-5, atol=1e-5)
    assert model.fixed_positions
    assert not model.encoder.pos_embed.requires_grad


def test_an_encoder_alone_gets_a_new_decoder_and_says_so() -> None:
    state, said = published_encoder(), []
    model = load_official_mae(state, num_heads=4, say=said.append)
    expected = F.layer_norm(
        plain_tokens(state, images(), 4), (64,), state["norm.weight"], state["norm.bias"], eps=1e-6
    )
    torch.testing.assert_close(model.encoder.forward_features(images()), expected, rtol=1e-5, atol=1e-5)
    assert (model.decoder.embed.out_features, len(model.decoder.blocks)) == (512, 8)
    assert "the state dict is an encoder without decoder" in said
    assert any("initialised anew" in line for line in said)


def test_a_classifiers_features_are_those_its_head_saw() -> None:
    state, said = published_classifier(), []
    model = load_official_mae(state, num_heads=4, say=said.append)
    pooled = plain_tokens(state, images(), 4)[:, 1:].mean(1)
    expected = F.layer_norm(pooled, (64,), state["fc_norm.weight"], state["fc_norm.bias"], eps=1e-6)
    torch.testing.assert_close(model.encoder(images()), expected, rtol=1e-5, atol=1e-5)
    assert not model.fixed_positions
    assert any("head.bias, head.weight" in line for line in said)
    assert any("taken for a square's: 16 px" in line for line in said)
    assert model(images()).values_BMV.shape == (3, 12, 48)


def test_a_linear_probes_batch_norm_goes_with_its_head() -> None:
    head = {"head.0.running_mean": torch.zeros(64), "head.1.weight": torch.zeros(5, 64)}
    assert torch.equal(
        silent({**published_encoder(), **head}, num_heads=4).encoder(images()),
        silent(published_encoder(), num_heads=4).encoder(images()),
    )


def test_deits_learned_positions_stay_learned() -> None:
    state = {
        **published_encoder(learned=True),
        "head.weight": torch.zeros(5, 64),
        "head.bias": torch.zeros(5),
    }
    model = silent(state, num_heads=4)
    assert not model.fixed_positions
    assert torch.equal(model.encoder.pos_embed, state["pos_embed"])
    assert model.encoder.pos_embed.requires_grad


def test_timms_own_model_gives_the_same_bits() -> None:
    args: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    theirs = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=3, **args).eval()
    ours = silent(theirs.state_dict(), num_heads=2).encoder.eval()
    batch = images((32, 32))
    assert torch.equal(ours(batch), theirs.forward_head(theirs.forward_features(batch), pre_logits=True))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "patch", "grid"),
    [(768, 12, 12, 16, 14), (1024, 24, 16, 16, 14), (1280, 32, 16, 14, 16), (384, 12, 6, 16, 14)],
    ids=["B", "L", "H", "S"],
)
def test_the_published_architectures_are_read_off_their_shapes(
    width: int, depth: int, heads: int, patch: int, grid: int
) -> None:
    # Expanded zeros have these shapes and no memory.
    block = {"mlp.fc1.weight": (4 * width, width), "attn.qkv.weight": (3 * width, width)}
    state = {f"blocks.{i}.{k}": torch.zeros(1, 1).expand(v) for i in range(depth) for k, v in block.items()}
    state["patch_embed.proj.weight"] = torch.zeros(1, 1, 1, 1).expand(width, 3, patch, patch)
    state |= {"pos_embed": sincos_with_cls((grid, grid), width), "cls_token": torch.zeros(1, 1, width)}
    shape = architecture_of(recognise(state), "it")
    dims = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 4, "class_token": True}
    assert shape.dims == {**dims, "reg_tokens": 0}
    assert (shape.image_size, shape.patch_size, shape.in_chans) == ((224, 224), (patch, patch), 3)
    assert shape.position_grid == (grid, grid)


def test_heads_follow_the_rule_unless_they_are_given() -> None:
    assert silent(published_encoder()).encoder.blocks[0].attn.num_heads == 1
    assert silent(published_encoder(width=192)).encoder.blocks[0].attn.num_heads == 3
    model = silent(published_mae(), num_heads=8, decoder_num_heads=4)
    assert model.encoder.blocks[0].attn.num_heads == 8
    assert model.decoder.blocks[0].attn.num_heads == 4
    with pytest.raises(UserError, match="width 40, which 16 heads do not divide; decoder_num_heads must"):
        silent(published_mae(decoder_width=40))
    with pytest.raises(UserError, match="width 40, which tells no number of heads; num_heads must be given"):
        silent(published_encoder(width=40))


def test_a_rectangle_of_learned_positions_is_never_guessed() -> None:
    state = published_encoder(grid=(3, 5), learned=True)
    with pytest.raises(UserError, match="15 patch positions, which are not a square grid"):
        silent(state, num_heads=4)
    with pytest.raises(UserError, match="15 patch positions, which are not those of 16x20 px"):
        silent(state, num_heads=4, image_size=(16, 20))
    assert silent(state, num_heads=4, image_size=(12, 20)).encoder.patch_embed.grid_size == (3, 5)
    # 4 x 9 patches are as many as 6 x 6, but the table tells which.
    assert silent(published_encoder(grid=(4, 9)), num_heads=4).encoder.patch_embed.grid_size == (4, 9)


def test_ours_to_mae_and_back_is_bitwise() -> None:
    model = silent(published_mae(grid=(3, 5)), num_heads=4)
    official = official_names(model)
    assert official.keys() == published_mae().keys()
    assert torch.equal(official["decoder_pos_embed"], sincos_with_cls((3, 5), 32))
    again = silent(official, num_heads=4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_hugging_face_checkpoint_is_the_same_model() -> None:
    state = published_mae()
    theirs = to_huggingface(state)
    assert theirs["vit.encoder.layer.1.attention.attention.value.bias"].shape == (64,)
    assert theirs["decoder.decoder_layers.0.intermediate.dense.weight"].shape == (128, 32)
    back = from_huggingface(theirs, "it")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    encoder = to_huggingface(published_encoder())
    pooler = {"pooler.dense.weight": torch.zeros(64, 64), "pooler.dense.bias": torch.zeros(64)}
    said: list[str] = []
    model = load_official_mae({**encoder, **pooler}, num_heads=4, say=said.append)
    assert torch.equal(
        model.encoder.blocks[1].attn.qkv.weight, published_encoder()["blocks.1.attn.qkv.weight"]
    )
    assert any("dropped (pooler.dense.bias, pooler.dense.weight)" in line for line in said)
    del theirs["vit.encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(UserError, match=r"has no key of blocks\.1\.attn\.qkv\.bias"):
        silent(theirs)


def test_positions_of_another_scene_are_written_as_they_count() -> None:
    config = ModelConfig(
        name="vit", patch_size=4, embed_dim=16, depth=1, num_heads=2, position_grid=(2, 3)
    ).model_copy(update={"decoder": MAEDecoderConfig(embed_dim=8, depth=1, num_heads=2)})
    model = config.build(image_size=(16, 24), in_chans=3, num_values=48)
    official = official_names(model)
    for name, width in (("pos_embed", 16), ("decoder_pos_embed", 8)):
        assert torch.equal(official[name][0, 1:], sincos_pos_embed((4, 6), (2, 3), width))
        assert not official[name][0, 0].any()
    again = load_official_mae(official, num_heads=2, decoder_num_heads=2, say=lambda _: None)
    assert again.position_grid == (2, 3)
    images, ids = torch.rand(2, 3, 16, 24), torch.tensor([[1, 7, 22], [0, 9, 13]])
    assert torch.equal(again(images, ids).values_BMV, model(images, ids).values_BMV)


def test_decoder_positions_that_no_table_has_are_named() -> None:
    state = published_mae()
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + torch.linspace(0, 1, 8).repeat(4)
    lines: list[str] = []
    load_official_mae(state, num_heads=2, decoder_num_heads=2, say=lines.append)
    assert "its decoder's positions are not a sin-cos table; they are replaced by one" in lines


def test_a_vitmae_that_transformers_builds_itself_gets_positions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTMAEConfig(
        image_size=16, patch_size=4, **sizes, **{f"decoder_{key}": value for key, value in decoder.items()}
    )
    transformers.ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    encoder = etpp_ssl.load(tmp_path, device="cpu")
    assert torch.equal(encoder.model.pos_embed, sincos_with_cls((4, 4), 64))
    # 4.57 fills the encoder's table in; 5.24 fills in neither.
    table = read_state_dict(tmp_path / "model.safetensors")["vit.embeddings.position_embeddings"]
    assert (f"its positions {UNSET_POSITIONS}" in encoder.notes) != bool(table.any())


def write_namespace(state: StateDict, file: Path) -> None:
    arguments = argparse.Namespace(lr=1.5e-4, model="mae_vit_base_patch16", resume="", output_dir="./out")
    torch.save({"model": state, "optimizer": {}, "epoch": 3, "scaler": {}, "args": arguments}, file)


def write_old_pickle(state: StateDict, file: Path) -> None:
    torch.save({"model": state}, file, _use_new_zipfile_serialization=False)


def write_distributed(state: StateDict, file: Path) -> None:
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)


@pytest.mark.parametrize(
    "write",
    [write_namespace, write_old_pickle, write_distributed, torch.save, save_file],
    ids=lambda w: w.__name__,
)
def test_every_way_to_save_it_reads_the_same(
    write: Callable[[StateDict, Path], None], tmp_path: Path
) -> None:
    state = published_mae()
    # The name says nothing; what is in it does.
    write(state, tmp_path / "weights.bin")
    model, expected = silent(tmp_path / "weights.bin"), silent(state)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())


class Payload:
    """Runs a command where an unpickler does what it is told."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_refused_and_nothing_is_executed(zipped: bool, tmp_path: Path) -> None:
    made = tmp_path / "made"
    for where in ("args", "model"):
        content: dict[str, Any] = {"model": dict(published_encoder()), "args": argparse.Namespace()}
        if where == "args":
            content["args"].x = Payload(f"touch {made}")
        else:
            content["model"]["cls_token"] = Payload(f"touch {made}")
        torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            UserError, match=r"was refused and nothing in it was run: .*asks for \w+\.system"
        ) as e:
            load_official_mae(tmp_path / "bad.pth")
        assert "\n" not in str(e.value)
    assert not made.exists()


def test_only_the_one_class_is_allowed_and_only_while_reading(tmp_path: Path) -> None:
    torch.save({"model": published_encoder(), "out": Path("/x")}, tmp_path / "path.pth")
    with pytest.raises(UserError, match=r"asks for pathlib\.\w*PosixPath"):
        load_official_mae(tmp_path / "path.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_what_is_no_checkpoint_is_told_in_one_sentence(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(published_encoder(), whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:500])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name, words in {
        "nowhere.pth": "No such file",
        "cut.pth": "cannot be read as a file of torch.save",
        "page.pth": "neither safetensors nor a file of torch.save",
        "empty.pth": "does not hold a state dict",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            load_official_mae(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_another_architecture_names_five_tensors_and_how_many_more() -> None:
    resnet = timm.create_model("resnet18").state_dict()
    with pytest.raises(UserError, match=r"has bn1\.bias, .*, and \d+ more"):
        silent(resnet)
    one = torch.ones(64)
    gated = {**published_encoder(depth=6), **{f"blocks.{i}.attn.gate.bias": one for i in range(6)}}
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.gate\.bias is not part of.*, and 1 more$"):
        silent(gated)
    other_decoder = {k: v for k, v in published_mae().items() if not k.startswith("decoder_blocks")}
    with pytest.raises(UserError, match=r"another decoder than MAE's: decoder\.blocks\.0\.mlp"):
        silent(other_decoder)
    with pytest.raises(UserError, match="distilled DeiT: its dist_token has no place"):
        silent({**published_encoder(), "dist_token": torch.zeros(1, 1, 64)})


def test_the_original_class_loads_ours_and_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    clone = os.environ.get("ETPP_MAE_CLONE")
    if not clone:
        pytest.skip("ETPP_MAE_CLONE does not point at a clone of facebookresearch/mae")
    import timm.models.vision_transformer as timm_vit

    class Block(timm_vit.Block):
        def __init__(self, *args: Any, qk_scale: None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(timm_vit, "Block", Block)
    monkeypatch.setattr(np, "float", float, raising=False)
    monkeypatch.syspath_prepend(clone)
    import models_mae

    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1}
    theirs = models_mae.MaskedAutoencoderViT(**sizes, **decoder, norm_layer=norm, norm_pix_loss=True)
    ours = silent(published_mae(), num_heads=4)
    theirs.load_state_dict(official_names(ours), strict=True)
    torch.manual_seed(0)
    loss, _, mask = theirs(images())
    ids_keep = torch.stack([(row == 0).nonzero()[:, 0] for row in mask])
    prediction = ours(images(), ids_keep)
    objective = PixelObjective((4, 4), 3, norm_pix=True)
    assert objective(*prediction, images()).item() == pytest.approx(loss.item(), rel=1e-6)
    assert silent(theirs.state_dict(), num_heads=4).state_dict().keys() == ours.state_dict().keys()
