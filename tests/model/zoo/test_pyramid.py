"""timm's conventions, which PVT and CSWin keep alike."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import etpp_ssl.model.zoo.cswin
import etpp_ssl.model.zoo.pvt  # noqa: F401
from etpp_ssl.config import UserError

NAMES = ["pvt_tiny", "pvt_small", "pvt_medium", "pvt_large", "cswin_tiny", "cswin_small", "cswin_base"]
TINY: dict[str, dict[str, Any]] = {
    "pvt_tiny": {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 2, 1, 2)},
    "cswin_tiny": {"embed_dim": 8, "num_heads": (2, 2, 4, 4), "depths": (1, 2, 1, 2)},
}
WIDTH = {"pvt_tiny": 32, "cswin_tiny": 64}
families = pytest.mark.parametrize("name", TINY)


def tiny(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        name, **{"img_size": (64, 96), "num_classes": 5, **TINY[name], **changes}
    )
    return model


def images_of(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def test_importing_the_files_adds_each_name_once_and_without_a_warning() -> None:
    code = (
        "import warnings, timm; known = set(timm.list_models()); warnings.simplefilter('error');"
        "import etpp_ssl.model.zoo.pvt, etpp_ssl.model.zoo.cswin;"
        "print(*sorted(set(timm.list_models()) - known))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(NAMES)
    assert "warn" not in done.stderr.lower()


@pytest.mark.parametrize("name", NAMES)
def test_what_timm_is_told_names_modules_that_exist(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    config = model.default_cfg
    assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert (
        (config["num_classes"], config["input_size"])
        == (model.num_classes, (3, 224, 224))
        == (
            model.get_classifier().out_features,
            (3, *model.img_size),
        )
    )
    for info in model.feature_info:
        norm = model.get_submodule(info["module"])[-1].norm2
        assert info["num_chs"] == norm.weight.numel()
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


@families
def test_features_head_and_pooling(name: str) -> None:
    model = tiny(name).eval()
    images = images_of(2, 3, 64, 96)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, model.num_prefix_tokens + 2 * 3, WIDTH[name])
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(features), model(images))

    model.reset_classifier(7, "avg")
    assert (model.num_classes, model.global_pool) == (7, "avg")
    assert model(images).shape == (2, 7)
    torch.testing.assert_close(
        model.forward_head(tokens, pre_logits=True), tokens[:, model.num_prefix_tokens :].mean(1)
    )
    model.reset_classifier(0, "")
    assert torch.equal(model(images), tokens)
    assert not [key for key in model.state_dict() if key.startswith("head")]
    model.double().eval().reset_classifier(3)
    assert model.global_pool == ""
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training


@families
def test_arguments_of_create_model(name: str) -> None:
    model = tiny(name, in_chans=5, num_classes=0, img_size=32)
    assert model(images_of(2, 5, 64, 32)).shape == (2, WIDTH[name])
    assert tiny(name, global_pool="avg").global_pool == "avg"
    assert tiny(name).global_pool == ("token" if name.startswith("pvt") else "avg")


@families
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_drop_path_grows_linearly_over_all_blocks(name: str, rate: float) -> None:
    drops = [module for module in tiny(name, drop_path_rate=rate).modules() if isinstance(module, DropPath)]
    # Six blocks of two branches each, and every branch draws for itself.
    assert [drop.drop_prob for drop in drops] == pytest.approx(
        [rate * block / 5 for block in range(6) for _ in range(2)]
    )


@families
def test_drop_path_acts_in_training_only(name: str) -> None:
    model = tiny(name, drop_path_rate=0.5)
    images = images_of(4, 3, 64, 64)
    assert torch.equal(model.eval()(images), tiny(name).eval()(images))
    assert not torch.equal(model.train()(images), model.eval()(images))


@families
def test_recomputing_the_blocks_changes_nothing(name: str) -> None:
    plain = tiny(name)
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing()
    calls: list[int] = []
    first_block = recomputed.get_submodule(recomputed.feature_info[0]["module"])[0]
    first_block.register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, recomputed):
        model(images_of(2, 3, 64, 32)).square().sum().backward()
    assert len(calls) == 2
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@families
@pytest.mark.parametrize("size", [(64, 96), (32, 64)])
def test_half_precision(name: str, size: tuple[int, int]) -> None:
    model, images = tiny(name).eval(), images_of(2, 3, *size)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
        half = model.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    for logits in (mixed, half):
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02)


@families
def test_the_same_seed_gives_the_same_network(name: str) -> None:
    first, second = tiny(name).state_dict(), tiny(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    biases = [value for key, value in first.items() if key.endswith("mlp.fc1.bias") or key == "head.bias"]
    assert all((bias == 0).all() for bias in biases)
    weights = torch.cat([value.flatten() for key, value in first.items() if key.endswith("mlp.fc1.weight")])
    assert weights.std() == pytest.approx(0.02, rel=0.1)


@families
def test_timms_layer_decay_gives_every_parameter_a_group(name: str) -> None:
    model = tiny(name)
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    # The stem, six blocks and the head.
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(8)}


@pytest.mark.parametrize("name", NAMES)
def test_there_are_no_weights_to_download(name: str) -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)


@families
def test_weights_of_a_file_are_loaded_as_timm_loads_them(name: str, tmp_path: Path) -> None:
    source = tiny(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = tiny(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "num_classes": 5},
    )
    images = images_of(1, 3, 32, 64)
    assert torch.equal(model.eval()(images), source.eval()(images))


@families
@pytest.mark.parametrize("size", [(64, 90), (48, 64), (100, 100)])
def test_a_size_that_32_does_not_divide_gets_a_sentence(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"multiples of 32 pixels, not (64x90|48x64|100)$"):
        tiny(name)(images_of(1, 3, *size))
    with pytest.raises(UserError, match="multiples of 32 pixels"):
        tiny(name, img_size=size)


@families
def test_another_pooling_gets_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"global_pool of \w+ is one of .*'avg', '', not 'max'"):
        tiny(name, global_pool="max")


@families
def test_features_only_gets_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} gives features of its last stage only"):
        tiny(name, features_only=True)
