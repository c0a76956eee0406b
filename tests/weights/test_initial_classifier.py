"""`init` of a classifier: from a run, an export or anybody's file, at any size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published_layouts import (
    StateDict,
    plain_tokens,
    published_classifier,
    published_encoder,
    published_mae,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import UserError
from etpp_ssl.export import official
from etpp_ssl.export import timm as timm_export
from etpp_ssl.model.pos_embed import sincos_pos_embed
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.checkpoint import save_checkpoint
from etpp_ssl.train.launch import pretrain
from etpp_ssl.weights.loading import load_classifier_init, load_init

KEPT_HEAD = "its head of 5 classes is kept: they are taken for the same ones"
NAME = "vit_base_patch16_224"
PUBLISHED: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
TINY: dict[str, Any] = {**PUBLISHED, "img_size": (16, 24), "embed_dim": 16, "depth": 1, "num_heads": 2}


def make_net(*, seed: int = 9, **args: Any) -> nn.Module:
    """A classifier, by default of `published_encoder`'s sizes, in eval mode."""
    torch.manual_seed(seed)
    chosen = {**PUBLISHED, "num_classes": 5, "global_pool": "token", **args}
    net: nn.Module = timm.create_model(NAME, pretrained=False, **chosen)
    return net.eval()


def start(net: nn.Module, init: Path) -> list[str]:
    """Start the net and return what was said, without the name of the source."""
    said: list[str] = []
    load_classifier_init(net, str(init), said.append)
    return [line.removeprefix(f"init {str(init)!r} ") for line in said]


def images(*size: int, in_chans: int = 3) -> Tensor:
    """Two images; 16 by 16 pixels by default."""
    return torch.randn(2, in_chans, *(size or (16, 16)), generator=torch.Generator().manual_seed(4))


def features(net: nn.Module, batch: Tensor) -> Tensor:
    """What the head reads, (B, D)."""
    with torch.inference_mode():
        read: Tensor = net.forward_head(net.forward_features(batch), pre_logits=True)  # type: ignore[operator]
    return read


class FineTuned(nn.Module):
    """Keeps a network where the checkpoints of a fine-tuning run have it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


FINE_TUNING = """
task: finetune
output: unused
image_size: {size}
budget_epochs: 1
batch_size: 4
data: {{name: synthetic}}
model: {{name: vit, patch_size: 4, embed_dim: {width}, depth: {depth}, num_heads: {heads}}}
"""


def fine_tuning_run(path: Path, net: Any) -> Path:
    """A run folder as fine-tuning leaves it; returns its checkpoint."""
    path.mkdir()
    sizes = {"width": net.embed_dim, "depth": len(net.blocks), "heads": net.blocks[0].attn.num_heads}
    recipe = FINE_TUNING.format(size=list(net.patch_embed.img_size), **sizes)
    (path / "recipe.yaml").write_text(recipe)
    model = FineTuned(net)
    optimizer = torch.optim.SGD(model.parameters())
    return save_checkpoint(RunFolder(path), 7, model, optimizer, {}, keep=1)


def test_a_runs_encoder_gives_its_features_to_the_last_bit(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    run = pretrain(tiny_recipe("budget_epochs=0.3"))
    net = make_net(**TINY)
    said = start(net, run.folder.path)
    assert said[0] == f"is a run's checkpoint of step {run.state.step}"
    assert said[1] == "what pre-training adds to the encoder is dropped (decoder.*)"
    assert said[2:] == ["the head is initialised anew: init has none"]
    with torch.inference_mode():
        expected = run.bare_model.eval().encoder(images(16, 24))
    assert torch.equal(features(net, images(16, 24)), expected)
    assert net.pos_embed.requires_grad
    pooled = make_net(**TINY, global_pool="avg")
    assert any("as in MAE's fine-tuning" in line for line in start(pooled, run.folder.path))
    assert torch.equal(pooled.blocks[0].mlp.fc1.weight, net.blocks[0].mlp.fc1.weight)
    assert torch.equal(pooled.fc_norm.weight, torch.ones(16))


def test_a_runs_positions_are_those_of_its_scene_at_another_size(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    run = pretrain(tiny_recipe("model.position_grid=[3, 3]", "budget_epochs=0.3"))
    same = make_net(**TINY)
    start(same, run.folder.path)
    assert torch.equal(same.pos_embed[0, 1:], sincos_pos_embed((4, 6), (3, 3), 16))
    net = make_net(**{**TINY, "img_size": (30, 24), "patch_size": (6, 8), "in_chans": 1})
    said = start(net, run.folder.path)
    assert torch.equal(net.pos_embed[0, 1:], sincos_pos_embed((5, 3), (3, 3), 16))
    for words in ("channels are summed for 1", "from 4 to 6x8 px", "from 4x6 to 5x3 patches"):
        assert any(words in line for line in said)
    assert net(images(30, 24, in_chans=1)).isfinite().all()


def test_a_runs_learned_positions_know_their_rectangle(tiny_recipe: Callable[..., Recipe]) -> None:
    run = pretrain(tiny_recipe("model.pos_embed=learned", "budget_epochs=0.3"))
    said = start(make_net(**{**TINY, "img_size": 24}), run.folder.path)
    assert "the learned positions are resampled from 4x6 to 6x6 patches" in said
    with pytest.raises(UserError, match=r"has 2 heads, but model\.num_heads is 4"):
        start(make_net(**{**TINY, "num_heads": 4}), run.folder.path)


def test_every_export_of_a_run_is_a_start(tiny_recipe: Callable[..., Recipe]) -> None:
    square = ("image_size=24", "curriculum=constant", "model.pos_embed=learned")
    run = pretrain(tiny_recipe(*square, "budget_epochs=0.3"))
    path = run.folder.path
    reference = make_net(**{**TINY, "img_size": 24})
    start(reference, path)
    for export in (timm_export.export, official.export_mae, official.export_transformers):
        net = make_net(**{**TINY, "img_size": 24})
        start(net, export(path))
        assert torch.equal(features(net, images(24, 24)), features(reference, images(24, 24)))
    rectangle = make_net(**{**TINY, "num_heads": 4})
    with pytest.raises(UserError, match=r"has 2 heads, but model\.num_heads is 4"):
        start(rectangle, path / "export" / "timm")


def test_a_fine_tuning_run_starts_another_with_or_without_its_head(tmp_path: Path) -> None:
    trained = make_net(seed=1, global_pool="avg")
    fine_tuning_run(tmp_path / "run", trained)
    net = make_net(global_pool="avg")
    assert start(net, tmp_path / "run") == [
        "is a fine-tuning run's checkpoint of step 7",
        KEPT_HEAD,
    ]
    assert torch.equal(net(images()), trained(images()))
    other = make_net(global_pool="avg", num_classes=3)
    assert start(other, tmp_path / "run")[1:] == ["the head is initialised anew: 3 classes, not 5"]
    assert torch.equal(features(other, images()), features(trained, images()))
    said: list[str] = []
    fresh = make_net(global_pool="avg")
    before = fresh.head.weight.clone()
    load_classifier_init(fresh, str(tmp_path / "run"), said.append, keep_head=False)
    assert said[-1] == "the head is initialised anew: its own is not asked for"
    assert torch.equal(fresh.head.weight, before)


def test_averaged_weights_go_before_the_last_ones(tmp_path: Path) -> None:
    checkpoint = fine_tuning_run(tmp_path / "run", make_net(seed=1))
    averaged = make_net(seed=2)
    for prefix in ("net.", ""):
        tensors = {f"{prefix}{name}": value for name, value in averaged.state_dict().items()}
        save_file(tensors, checkpoint / "ema.safetensors")
        net = make_net()
        assert start(net, tmp_path / "run")[0] == "is a fine-tuning run's averaged weights (EMA) of step 7"
        assert torch.equal(net(images()), averaged(images()))


def test_pre_training_goes_on_from_a_fine_tuned_encoder(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    trained = make_net(**{**TINY, "img_size": 24}, seed=1, global_pool="avg")
    fine_tuning_run(tmp_path / "tuned", trained)
    model = tiny_recipe("model.pos_embed=learned", "image_size=24", "curriculum=constant").build_model()
    said: list[str] = []
    load_init(model, str(tmp_path / "tuned"), said.append)
    assert said[0].endswith("is a fine-tuning run's checkpoint of step 7")
    assert torch.equal(model.encoder.pos_embed, trained.pos_embed)
    assert torch.equal(model.encoder.norm.weight, trained.fc_norm.weight)


def write_folder(path: Path, net: nn.Module, config: dict[str, Any]) -> Path:
    """A folder as timm and we export one."""
    path.mkdir()
    save_file(net.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_classifiers_folder_says_its_size_and_keeps_its_head(tmp_path: Path) -> None:
    # 2 x 8 patches are as many as 4 x 4: the config tells which.
    trained = make_net(seed=1, img_size=(8, 32), global_pool="avg")
    model_args = {"img_size": [8, 32], "num_heads": 4, "num_classes": 5}
    configs: dict[str, dict[str, Any]] = {
        "ours": {"architecture": NAME, "model_args": model_args, "pretrained_cfg": {}},
        "timms": {"architecture": NAME, "pretrained_cfg": {"input_size": [3, 8, 32]}},
    }
    for name, config in configs.items():
        folder = write_folder(tmp_path / name, trained, config)
        net = make_net(img_size=(8, 32), global_pool="avg")
        assert start(net, folder)[1:] == [KEPT_HEAD]
        assert torch.equal(net(images(8, 32)), trained(images(8, 32)))
        other = make_net(img_size=24, global_pool="avg", num_classes=2)
        assert start(other, folder)[1:] == [
            "the head is initialised anew: 2 classes, not 5",
            "the learned positions are resampled from 2x8 to 6x6 patches",
        ]


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        "[]",
        '{"model_args": [1]}',
        '{"model_args": {"img_size": 1e999}}',
        '{"model_args": {"img_size": [16, 16, 16]}}',
        '{"pretrained_cfg": {"input_size": 3}}',
        '{"image_size": "ab", "num_attention_heads": 4}',
    ],
)
def test_a_config_that_makes_no_sense_says_nothing(config: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "export", make_net(seed=1), {})
    (folder / "config.json").write_text(config)
    net = make_net()
    start(net, folder)
    assert torch.equal(net(images()), make_net(seed=1)(images()))


def save_mae(state: StateDict, file: Path) -> None:
    torch.save({"model": state, "epoch": 3}, file)


@pytest.mark.parametrize("write", [save_mae, torch.save, save_file], ids=["model", "bare", "safetensors"])
@pytest.mark.parametrize("make", [published_encoder, published_mae])
def test_official_mae_weights_give_the_features_of_their_formula(
    make: Callable[[], StateDict], write: Callable[[StateDict, Path], None], tmp_path: Path
) -> None:
    state = make()
    write(state, tmp_path / "mae.pth")
    net = make_net()
    start(net, tmp_path / "mae.pth")
    tokens = plain_tokens(state, images(), 4)[:, 0]
    expected = F.layer_norm(tokens, (64,), state["norm.weight"], state["norm.bias"], eps=1e-6)
    torch.testing.assert_close(features(net, images()), expected, rtol=1e-5, atol=1e-5)


def test_an_official_fine_tuned_classifier_classifies_as_before(tmp_path: Path) -> None:
    state = published_classifier()
    save_mae(state, tmp_path / "tuned.pth")
    net = make_net(global_pool="avg")
    assert start(net, tmp_path / "tuned.pth")[1:] == [KEPT_HEAD]
    pooled = plain_tokens(state, images(), 4)[:, 1:].mean(1)
    pooled = F.layer_norm(pooled, (64,), state["fc_norm.weight"], state["fc_norm.bias"], eps=1e-6)
    expected = F.linear(pooled, state["head.weight"], state["head.bias"])
    torch.testing.assert_close(net(images()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_timms_training_checkpoint_of_another_family(key: str, tmp_path: Path) -> None:
    args: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    torch.manual_seed(1)
    trained = timm.create_model("convnext_atto", num_classes=4, **args).eval()
    torch.save({key: trained.state_dict(), "arch": "convnext_atto"}, tmp_path / "last.pth.tar")
    net = timm.create_model("convnext_atto", num_classes=6, **args).eval()
    assert start(net, tmp_path / "last.pth.tar") == [
        "is a state dict in timm's names",
        "the head is initialised anew: 6 classes, not 4",
    ]
    assert torch.equal(features(net, images(32, 32)), features(trained, images(32, 32)))


class Payload:
    """Runs a command where an unpickler does what it is told."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_weights_that_do_not_serve_are_one_sentence(tmp_path: Path) -> None:
    resnet = timm.create_model("resnet18", layers=(1, 1, 1, 1)).state_dict()
    made = tmp_path / "made"
    contents: dict[str, tuple[Any, str]] = {
        "payload": ({"model": Payload(f"touch {made}")}, "nothing in it was run"),
        "resnet": (resnet, r"is of another model: cls_token is missing; .*, and \d+ more$"),
        "deeper": (published_encoder(depth=3), "blocks.2.norm1.weight is not part of the model"),
        "channels": (published_encoder(in_chans=6), "in_chans is 3, but the weights are for 6 channels"),
        "grid": (published_encoder(grid=(3, 5), learned=True), "15 learned positions and nothing says"),
        "empty": ({"epoch": 3}, "does not hold a state dict"),
    }
    for name, (content, words) in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=words) as caught:
            start(make_net(), tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("init '")
    assert not made.exists()
    (tmp_path / "texts").mkdir()
    with pytest.raises(UserError, match=r"a folder without recipe\.yaml and without model\.safetensors"):
        start(make_net(), tmp_path / "texts")
    with pytest.raises(UserError, match="No such file"):
        start(make_net(), tmp_path / "nowhere.pth")
    (tmp_path / "texts" / "recipe.yaml").write_text("task: finetune\n")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        start(make_net(), tmp_path / "texts")


def test_a_refused_start_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    torch.save(published_encoder(depth=3), tmp_path / "deeper.pth")
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError):
        start(net, tmp_path / "deeper.pth")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path: Path) -> None:
    checkpoint = fine_tuning_run(tmp_path / "run", make_net(seed=1))
    newer = checkpoint.with_name("step-00000009")
    newer.mkdir()
    save_file(load_file(checkpoint / "model.safetensors"), newer / "model.safetensors")
    said = start(make_net(), tmp_path / "run")
    assert "step-00000009 is damaged" in said[0]
    assert said[1] == "is a fine-tuning run's checkpoint of step 7"


def test_a_fine_tuning_runs_recipe_says_its_rectangle_and_its_heads(tmp_path: Path) -> None:
    fine_tuning_run(tmp_path / "run", make_net(seed=1, img_size=(8, 32)))
    said = start(make_net(img_size=24), tmp_path / "run")
    assert "the learned positions are resampled from 2x8 to 6x6 patches" in said
    with pytest.raises(UserError, match=r"has 4 heads, but model\.num_heads is 8"):
        start(make_net(num_heads=8), tmp_path / "run")
