"""Layer decay and weight decay: what every parameter of every family really gets, against plain code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from timm.models.metaformer import Attention, MetaFormer, SepConv
from timm.optim import param_groups_layer_decay
from torch import nn

import etpp_ssl.model.zoo.cswin
import etpp_ssl.model.zoo.pvt  # noqa: F401  These register what timm lacks.
from etpp_ssl.config import UserError
from etpp_ssl.optim.groups import layer_ids, parameter_groups
from etpp_ssl.optim.optimizers import ClassifierOptimConfig
from etpp_ssl.optim.schedules import set_learning_rate

DECAY = 0.7


def metaformer() -> nn.Module:
    mixers: list[Any] = [SepConv, SepConv, Attention, Attention]
    return MetaFormer(depths=(1, 1, 2, 1), dims=(8, 8, 32, 32), token_mixers=mixers, num_classes=5)


def vit_layer(name: str, net: Any) -> tuple[int, int]:
    depth = len(net.blocks)
    head, *rest = name.split(".")
    if head == "blocks":
        return int(rest[0]) + 1, depth + 1
    first = ("cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed", "norm_pre")
    return (0 if head in first else depth + 1), depth + 1


def stages_layer(name: str, net: Any) -> tuple[int, int]:
    """ConvNeXt, MetaFormer and Swin: stages of a downsampling module and blocks."""
    stages = net.layers if hasattr(net, "layers") else net.stages
    depths = [len(stage.blocks) for stage in stages]
    head, *rest = name.split(".")
    if head in ("stages", "layers"):
        block = int(rest[2]) if rest[1] == "blocks" else 0
        return 1 + sum(depths[: int(rest[0])]) + block, sum(depths) + 1
    return (0 if head in ("stem", "patch_embed") else sum(depths) + 1), sum(depths) + 1


def resnet_layer(name: str, net: Any) -> tuple[int, int]:
    depths = [len(net.layer1), len(net.layer2), len(net.layer3), len(net.layer4)]
    head, *rest = name.split(".")
    if head in ("layer1", "layer2", "layer3", "layer4"):
        return 1 + sum(depths[: int(head[-1]) - 1]) + int(rest[0]), sum(depths) + 1
    return (0 if head in ("conv1", "bn1", "maxpool") else sum(depths) + 1), sum(depths) + 1


def pvt_layer(name: str, net: Any) -> tuple[int, int]:
    # Depths 1, 2, 1, 1: the stages' first blocks are layers 1, 2, 4 and 5, and 6 is the top.
    firsts = {"1": 1, "2": 2, "3": 4, "4": 5}
    head, *rest = name.split(".")
    if head in ("patch_embed1", "pos_embed1"):
        return 0, 6
    if head in ("norm", "head"):
        return 6, 6
    if head == "cls_token":  # It joins in the last stage.
        return 5, 6
    return firsts[head[-1]] + (int(rest[0]) if head.startswith("block") else 0), 6


def cswin_layer(name: str, net: Any) -> tuple[int, int]:
    # Depths 1, 2, 2, 1: blocks are layers 1 | 2, 3 | 4, 5 | 6, and 7 is the top.
    head = ".".join(name.split(".")[:2]) if name.startswith("stage") else name.split(".")[0]
    layers = {"merge1": 2, "merge2": 4, "merge3": 6, "norm": 7, "head": 7}
    layers |= {"stage1.0": 1, "stage2.0": 2, "stage2.1": 3, "stage3.0": 4, "stage3.1": 5, "stage4.0": 6}
    return (0 if head.startswith("stage1_conv_embed") else layers[head]), 7


@dataclass(frozen=True)
class Member:
    """A small model of a family, and its layers by plain code: (layer, number of the top layer)."""

    build: Callable[[], nn.Module]
    layer: Callable[[str, Any], tuple[int, int]]


def small(name: str, **args: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **args)


VIT = {"img_size": (32, 48), "depth": 3, "embed_dim": 16, "num_heads": 2}
CONVNEXT = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}
SWIN = {"img_size": (64, 96), "embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2)}
PVT = {"img_size": (64, 96), "depths": (1, 2, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2)}
CSWIN = {"img_size": (64, 96), "depths": (1, 2, 2, 1), "embed_dim": 16, "num_heads": (2, 2, 4, 4)}
RESNET = {"layers": (1, 2, 1, 1), "channels": (8, 8, 16, 16)}
MEMBERS = {
    "vit": Member(small("vit_tiny_patch16_224", **VIT, reg_tokens=2, init_values=0.1), vit_layer),
    "vit-avg": Member(small("vit_tiny_patch16_224", **VIT, global_pool="avg", fc_norm=True), vit_layer),
    "vit-map": Member(small("vit_tiny_patch16_224", **VIT, global_pool="map", pre_norm=True), vit_layer),
    "deit": Member(small("deit_tiny_distilled_patch16_224", **VIT), vit_layer),
    "convnext": Member(small("convnext_atto", **CONVNEXT), stages_layer),
    "convnext-grn": Member(small("convnextv2_atto", **CONVNEXT, head_norm_first=True), stages_layer),
    "swin": Member(small("swin_tiny_patch4_window7_224", **SWIN, window_size=2), stages_layer),
    "resnet": Member(small("resnet18", **RESNET), resnet_layer),
    "resnet-bottleneck": Member(
        small("resnet50", **RESNET, stem_type="deep", stem_width=8, replace_stem_pool=True), resnet_layer
    ),
    "caformer": Member(metaformer, stages_layer),
    "pvt": Member(small("pvt_tiny", **PVT), pvt_layer),
    "cswin": Member(small("cswin_tiny", **CSWIN), cswin_layer),
}
# ndim is no guide for these.
EXEMPT = (
    *("cls_token", "reg_token", "dist_token", "pos_embed", "relative_position_bias_table"),
    *("pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4"),
)


def is_exempt(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 1 or name.split(".")[-1] in EXEMPT


@pytest.mark.parametrize("layer_decay", [None, DECAY, 1.0])
@pytest.mark.parametrize("family", MEMBERS)
def test_every_parameter_gets_the_rate_and_the_decay_of_the_formula(
    family: str, layer_decay: float | None
) -> None:
    member = MEMBERS[family]
    net = member.build()
    config = ClassifierOptimConfig(weight_decay=0.3, layer_decay=layer_decay, base_lr=0.1, min_lr=1e-3)
    optimizer = config.build(net, torch.device("cpu"))
    effective: dict[int, tuple[float, float, int | None]] = {}
    for progress, lr in ((0.05, 0.1), (1.0, 1e-3)):
        set_learning_rate(optimizer, config.learning_rates(256)(progress))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                effective[id(parameter)] = group["lr"], group["weight_decay"], group["layer"]
        assert len(effective) == sum(len(group["params"]) for group in optimizer.param_groups)
        for name, parameter in net.named_parameters():
            layer, top = member.layer(name, net)
            scale = 1.0 if layer_decay is None else layer_decay ** (top - layer)
            decay = 0.0 if is_exempt(name, parameter) else 0.3
            found = effective[id(parameter)]
            assert found[0] == pytest.approx(lr * scale, rel=1e-12), name
            assert found[1] == decay, name
            assert found[2] == (None if layer_decay is None else layer), name


@pytest.mark.parametrize("family", MEMBERS)
def test_all_layers_have_parameters_and_groups_are_few_and_in_order_of_depth(family: str) -> None:
    net = MEMBERS[family].build()
    ids, top = layer_ids(net)
    assert set(ids.values()) == set(range(top + 1))
    groups = parameter_groups(net, weight_decay=0.05, layer_decay=DECAY)
    keys = [(group["layer"], group["weight_decay"] == 0) for group in groups]
    assert keys == sorted(set(keys))
    assert len(groups) <= 2 * (top + 1)
    assert len(parameter_groups(net, weight_decay=0.05, layer_decay=None)) == 2
    # A resumed run finds the state of groups by their place and of parameters by their name.
    places = {id(parameter): place for place, parameter in enumerate(net.parameters())}
    for group in groups:
        order = [places[id(parameter)] for parameter in group["params"]]
        assert order == sorted(order)


def test_maes_published_scales_of_a_vit_base() -> None:
    with torch.device("meta"):
        net = timm.create_model("vit_base_patch16_224", num_classes=7)
    ids, top = layer_ids(net)
    scales = {name: 0.65 ** (top - layer) for name, layer in ids.items()}
    assert scales["pos_embed"] == scales["cls_token"] == scales["patch_embed.proj.bias"]
    assert scales["pos_embed"] == pytest.approx(0.65**13)
    assert scales["blocks.0.attn.qkv.weight"] == pytest.approx(0.65**12)
    assert scales["blocks.11.mlp.fc2.bias"] == pytest.approx(0.65)
    assert scales["norm.weight"] == scales["head.weight"] == 1


@pytest.mark.parametrize("family", ["vit-avg", "convnext", "resnet", "vit", "swin"])
def test_timm_agrees_but_for_a_final_norm(family: str) -> None:
    net = MEMBERS[family].build()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    theirs, ours = (
        {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
        for groups in (
            param_groups_layer_decay(net, layer_decay=DECAY),
            parameter_groups(net, weight_decay=0.05, layer_decay=DECAY),
        )
    )
    final_norm = ("norm.weight", "norm.bias") if family in ("vit", "swin") else ()
    for name, scale in ours.items():
        assert theirs[name] == pytest.approx(DECAY if name in final_norm else scale), name
        assert name not in final_norm or scale == 1


def test_frozen_parameters_are_left_out_and_move_no_layer() -> None:
    net = MEMBERS["swin"].build()
    before = layer_ids(net)
    net.get_parameter("patch_embed.proj.weight").requires_grad_(False)
    net.get_submodule("layers.0").requires_grad_(False)
    assert layer_ids(net) == before
    for layer_decay in (None, DECAY):
        groups = parameter_groups(net, weight_decay=0.05, layer_decay=layer_decay)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_what_the_model_itself_exempts_is_exempt() -> None:
    class Own(timm.models.VisionTransformer):  # type: ignore[misc]
        def no_weight_decay(self) -> set[str]:
            return {"blocks.*.attn.proj.weight", "head.weight"}

    net = Own(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in parameter_groups(net, weight_decay=0.05, layer_decay=DECAY)
        for parameter in group["params"]
        if group["weight_decay"]
    }
    block = ("attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    assert decayed == {"patch_embed.proj.weight", *(f"blocks.{k}.{name}" for k in range(2) for name in block)}


def test_biases_and_scales_are_exempt_whatever_their_shape() -> None:
    net = nn.ParameterDict(
        {
            "weight": nn.Parameter(torch.ones(4, 1, 1)),
            **{name: nn.Parameter(torch.ones(4, 1, 1)) for name in ("bias", "gamma", "scale", "logit_scale")},
        }
    )
    decayed, exempt = parameter_groups(net, weight_decay=0.05, layer_decay=None)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert (len(decayed["params"]), len(exempt["params"])) == (1, 4)
    assert decayed["params"][0] is net["weight"]


@pytest.mark.parametrize("family", MEMBERS)
def test_a_name_that_matches_no_rule_is_an_error(family: str) -> None:
    net = MEMBERS[family].build()
    net.adapter = nn.Linear(2, 2)
    # A prefix of a known name is not that name.
    net.headless = nn.Parameter(torch.ones(2))
    strange = "headless, adapter.weight, adapter.bias; layer_decay=null trains any model"
    with pytest.raises(UserError, match=strange):
        parameter_groups(net, weight_decay=0.05, layer_decay=DECAY)
    groups = parameter_groups(net, weight_decay=0.05, layer_decay=None)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_up_to_five_strange_names_are_listed() -> None:
    net = MEMBERS["vit"].build()
    for i in range(7):
        net.register_parameter(f"prompt{i}", nn.Parameter(torch.ones(2)))
    sentence = (
        r"optim.layer_decay knows no layer of VisionTransformer for "
        r"prompt0, prompt1, prompt2, prompt3, prompt4, and 2 more; layer_decay=null trains any model"
    )
    with pytest.raises(UserError, match=sentence):
        layer_ids(net)


def test_a_model_without_known_layers_is_told_what_is_known() -> None:
    net = timm.create_model("ghostnet_050", num_classes=3)
    with pytest.raises(
        UserError, match=r"GhostNet is none of VisionTransformer, Eva, ConvNeXt, .*; layer_decay=null"
    ):
        ClassifierOptimConfig(layer_decay=0.65).build(net, torch.device("cpu"))
    groups = ClassifierOptimConfig().build(net, torch.device("cpu")).param_groups
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]
