"""Whatever a training script puts around a model's weights, the weights that come out are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published_layouts import StateDict, published_encoder, published_mae
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.optim.swa_utils import AveragedModel

import etpp_ssl
from etpp_ssl.config import UserError
from etpp_ssl.export.official import to_huggingface
from etpp_ssl.weights.layouts import Weights, in_timm_names, recognise
from etpp_ssl.weights.loading import load_classifier_init, read_init
from etpp_ssl.weights.reading import read_state_dict

HEADS = {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}


def under(prefix: str, state: StateDict) -> StateDict:
    """The state dict with a prefix in front of every name."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def zeroed(state: StateDict) -> StateDict:
    """Weights that must not be the ones that are taken."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def in_every_block(word: str, state: StateDict) -> StateDict:
    """The names where each block, not the model, is wrapped."""
    return {
        k.replace("blocks.0.", f"blocks.0.{word}.").replace("blocks.1.", f"blocks.1.{word}."): v
        for k, v in state.items()
    }


def lightning(prefix: str, state: StateDict) -> dict[str, Any]:
    """A checkpoint of Lightning, whose module has a loss with a buffer beside the model."""
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**under(prefix, state), "criterion.weight": torch.ones(5)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    }


def mmpretrain(state: StateDict) -> dict[str, Any]:
    """A pre-training checkpoint of mmpretrain: its ViT, and MAE's decoder where there is one."""
    renamed: StateDict = {"data_preprocessor.mean": torch.ones(3)}
    for name, value in state.items():
        part = "neck" if name.startswith(("decoder_", "mask_token")) else "backbone"
        for ours, theirs in (
            ("patch_embed.proj", "patch_embed.projection"),
            ("decoder_norm", "ln1"),
            (".norm", ".ln"),
            (".mlp.fc1", ".ffn.layers.0.0"),
            (".mlp.fc2", ".ffn.layers.1"),
        ):
            name = name.replace(ours, theirs)
        if part == "backbone":
            name = name.replace("blocks.", "layers.", 1)
            name = f"ln1{name.removeprefix('norm')}" if name.startswith("norm.") else name
        renamed[f"{part}.{name}"] = value
    return {"meta": {"epoch": 300}, "state_dict": renamed}


AROUND: dict[str, Callable[[StateDict], Any]] = {
    "torch.compile": lambda s: under("_orig_mod.", s),
    "DDP around torch.compile": lambda s: under("module._orig_mod.", s),
    "torch.compile around DDP": lambda s: under("_orig_mod.module.", s),
    "blocks compiled": lambda s: in_every_block("_orig_mod", s),
    "blocks of FSDP1, recomputed": lambda s: in_every_block(
        "_fsdp_wrapped_module._checkpoint_wrapped_module", s
    ),
    "DeepSpeed": lambda s: {"module": s, "global_steps": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 1},
    "a wrapper in a wrapper": lambda s: {"model": {"state_dict": under("module.", s)}},
    "Lightning's net": lambda s: lightning("net.", s),
    "Lightning's model in a model": lambda s: lightning("model.model.", s),
    "Lightning's compiled encoder": lambda s: lightning("encoder._orig_mod.", s),
    "MoCo v3": lambda s: {
        "state_dict": {
            **under("module.base_encoder.", s),
            **under("module.momentum_encoder.", zeroed(s)),
            "module.predictor.0.weight": torch.ones(3, 3),
        }
    },
    "DINO": lambda s: {
        "student": under("module.backbone.", zeroed(s)),
        "teacher": {**under("backbone.", s), "head.last_layer.weight": torch.ones(3, 3)},
    },
    "mmpretrain": mmpretrain,
    "any prefix": lambda s: under("the.one.that.I.chose.", s),
    "timm's average": lambda s: {"state_dict": zeroed(s), "state_dict_ema": s, "arch": "vit"},
    "ConvNeXt's average": lambda s: {"model": zeroed(s), "model_ema": s},
    "torch's average": lambda s: {
        "model": zeroed(s),
        "model_ema": {**under("module.", s), "n_averaged": torch.tensor(7)},
    },
    "iBOT": lambda s: {
        "state_dict": {"module.backbone.mask_token": torch.ones(1, 64), **under("module.backbone.", s)}
    },
    "transformers, wrapped": lambda s: {"state_dict": under("model.", to_huggingface(s))},
}


@pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("make", [published_encoder, published_mae])
def test_what_is_around_a_state_dict_changes_nothing(
    make: Callable[[], StateDict], wrap: Callable[[StateDict], Any], tmp_path: Path
) -> None:
    state = make()
    torch.save(wrap(state), tmp_path / "w.pth")
    found, expected = read_init(str(tmp_path / "w.pth"), print), recognise(state)
    read = recognise(found.tensors, "it")
    assert read.layout.startswith(expected.layout)
    assert read.decoder_position_grid == expected.decoder_position_grid
    assert read.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(value, expected.tensors[name]) for name, value in read.tensors.items())


def said_of(content: Any, tmp_path: Path) -> tuple[str, ...]:
    """The notes on a checkpoint: of the file, then of its names."""
    torch.save(content, tmp_path / "w.pth")
    found = read_init(str(tmp_path / "w.pth"), print)
    return found.notes + recognise(found.tensors, "it").notes


def test_the_average_that_was_taken_is_named(tmp_path: Path) -> None:
    state = published_encoder()
    for around, line in (
        ("timm's average", "its moving average, 'state_dict_ema', is taken, not 'state_dict'"),
        ("ConvNeXt's average", "its moving average, 'model_ema', is taken, not 'model'"),
    ):
        assert said_of(AROUND[around](state), tmp_path) == (line,)
    assert said_of(AROUND["DINO"](state), tmp_path) == (
        "its moving average, 'teacher', is taken, not 'student'",
        "what pre-training adds to the encoder is dropped (head.last_layer.weight)",
    )
    # An average without weights is not one.
    empty = {"state_dict": state, "state_dict_ema": None, "model_ema": {}, "ema": {"decay": 0.999}}
    assert said_of(empty, tmp_path) == ()


def test_the_encoder_that_was_taken_of_two_is_named(tmp_path: Path) -> None:
    state = published_encoder()
    assert said_of(AROUND["MoCo v3"](state), tmp_path) == (
        "what is named base_encoder.* is taken, not 'momentum_encoder.'",
        "what pre-training adds to the encoder is dropped (momentum_encoder.*, predictor.*)",
    )
    with pytest.raises(
        UserError, match=r"it holds 2 such models, under 'left\.', 'right\.', and nothing tells"
    ):
        recognise({**under("left.", state), **under("right.", state)}, "it")


def test_a_mapping_that_contains_itself_ends_in_a_sentence(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not hold a state dict: no tensor at the top or under model, "):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_any_network_is_found_below_a_prefix(name: str, tmp_path: Path) -> None:
    args = {"num_classes": 5}
    torch.manual_seed(0)
    theirs, ours = (timm.create_model(name, **args) for _ in range(2))
    state = theirs.state_dict()
    for wrapped in (
        {
            "state_dict": {
                **under("module.encoder_q.", state),
                **under("module.encoder_k.", zeroed(state)),
                "module.queue": torch.ones(4, 9),
            }
        },
        lightning("model.", state),
        {"backbone": torch.ones(1), **under("backbone.", state)},
        {**under("module.", state), "n_averaged": torch.tensor(3)},
    ):
        torch.save(wrapped, tmp_path / "w.pth")
        load_classifier_init(ours, str(tmp_path / "w.pth"), lambda line: None)
        assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
        nn.init.zeros_(ours.get_classifier().weight)


def test_torchs_own_wrappers_are_those_that_are_known(tmp_path: Path) -> None:
    net = timm.create_model("resnet18", num_classes=2)
    wrapped = AveragedModel(torch.compile(net))
    torch.save(wrapped.state_dict(), tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth").keys() - {"n_averaged"} == net.state_dict().keys()


def test_a_mmpretrain_classifier_keeps_its_head() -> None:
    state = mmpretrain({**published_encoder()})["state_dict"]
    weights = in_timm_names({**state, **{f"head.layers.{k}": v for k, v in HEADS.items()}})
    assert weights.tensors.keys() == published_encoder().keys() | HEADS.keys()
    assert weights.layout == "an encoder in the names of mmpretrain"


SIZES: dict[str, Any] = {"img_size": 28, "embed_dim": 64, "depth": 2, "num_heads": 4}


def dinov2(seed: int = 0) -> StateDict:
    """Names and shapes of `dinov2_*_reg4_pretrain.pth`."""
    net = timm.create_model("vit_small_patch14_dinov2", **SIZES, num_classes=0)
    generator = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in net.state_dict().items()}
    tokens = {"register_tokens": (1, 4, 64), "mask_token": (1, 64)}
    return state | {k: torch.randn(shape, generator=generator) for k, shape in tokens.items()}


def test_dinov2_with_registers_is_what_timm_makes_of_it(tmp_path: Path) -> None:
    name, state, batch = "vit_small_patch14_reg4_dinov2", dinov2(), torch.randn(2, 3, 28, 28)
    theirs = timm.create_model(name, **SIZES, num_classes=0).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    ours = timm.create_model(name, **SIZES, num_classes=0).eval()
    for content in (state, {"teacher": under("backbone.", state)}):
        torch.save(content, tmp_path / "w.pth")
        said: list[str] = []
        load_classifier_init(ours, str(tmp_path / "w.pth"), said.append)
        assert "the mask token of its pre-training is dropped" in said
        with torch.inference_mode():
            assert torch.equal(ours(batch), theirs(batch))
        nn.init.zeros_(ours.cls_token)
    assert recognise(state).tensors["encoder.reg_token"] is state["register_tokens"]


def test_hugging_faces_dinov2_gives_the_same_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    theirs = transformers.Dinov2WithRegistersModel(config).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            nn.init.normal_(value, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = timm.create_model("vit_small_patch14_reg4_dinov2", **SIZES, num_classes=0).eval()
    load_classifier_init(ours, str(tmp_path), lambda line: None)
    batch = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        features = theirs(batch).last_hidden_state
        torch.testing.assert_close(ours.forward_features(batch), features, rtol=1e-4, atol=1e-4)


def write_parts(folder: Path, state: StateDict, *, pickled: bool = False) -> Path:
    """A folder as `save_pretrained(max_shard_size=...)` leaves it; returns its index."""
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    parts = [f"{stem}-{i}-of-00003.{ending}" for i in ("00001", "00002", "00003")]
    weight_map = {name: parts[number % 3] for number, name in enumerate(state)}
    for part in parts:
        tensors = {name: state[name] for name in state if weight_map[name] == part}
        torch.save(tensors, folder / part) if pickled else save_file(tensors, folder / part)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_in_several_files_is_read_whole(pickled: bool, tmp_path: Path) -> None:
    state = published_mae()
    index = write_parts(tmp_path, to_huggingface(state), pickled=pickled)
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 16, "num_attention_heads": 4}))
    for place in (tmp_path, index):
        weights = recognise(read_init(str(place), print).tensors)
        assert all(torch.equal(v, weights.tensors[k]) for k, v in recognise(state).tensors.items())
    assert read_init(str(tmp_path), print).num_heads == 4
    images = torch.rand(2, 3, 16, 16)
    assert etpp_ssl.load(tmp_path, device="cpu").embed(images).shape == (2, 64)


def test_parts_that_are_missing_strange_or_alone_are_told(tmp_path: Path) -> None:
    index = write_parts(tmp_path, published_encoder())
    with pytest.raises(UserError, match=r"one of 3 files of a model; give their folder, or \*\.index\.json"):
        read_state_dict(tmp_path / "model-00002-of-00003.safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors' cannot be read: No such file"):
        read_state_dict(index)
    for content in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}', '{"a": 1}'):
        index.write_text(content)
        with pytest.raises(UserError, match="cannot be read as the index of a model's files: "):
            read_state_dict(index)


def test_notes_of_a_file_and_of_its_names_reach_the_user(tmp_path: Path) -> None:
    net = timm.create_model(
        "vit_base_patch16_224", **{**SIZES, "img_size": 16, "patch_size": 4}, num_classes=0
    )
    state = published_encoder()
    torch.save(
        {"state_dict": zeroed(state), "state_dict_ema": under("module.backbone.", state)}, tmp_path / "w.pth"
    )
    said: list[str] = []
    load_classifier_init(net, str(tmp_path / "w.pth"), said.append)
    assert "its moving average, 'state_dict_ema', is taken, not 'state_dict'" in said
    assert torch.equal(net.cls_token, state["cls_token"])
    assert isinstance(in_timm_names(state), Weights)
    notes = etpp_ssl.load(tmp_path / "w.pth", device="cpu").notes
    assert any("'state_dict_ema', is taken" in note for note in notes)
