"""Weights as the start of a classifier of any family: every rule, told in a line, and every refusal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published_layouts import StateDict, published_classifier, published_encoder, published_mae
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import build_model_with_cfg, load_pretrained
from timm.models.metaformer import Attention, MetaFormer, SepConv
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.export.official import to_huggingface
from etpp_ssl.model.pos_embed import sincos_pos_embed
from etpp_ssl.weights.adapt_classifier import adapt_classifier
from etpp_ssl.weights.layouts import Weights, in_timm_names
from etpp_ssl.weights.tensors import UNSET_POSITIONS, adapt_channels

KEPT_HEAD = "its head of 5 classes is kept: they are taken for the same ones"
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": VIT,
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "swin_tiny_patch4_window7_224": {
        "depths": (1, 2),
        "num_heads": (2, 2),
        "embed_dim": 8,
        "img_size": 32,
        "window_size": 4,
    },
    # timm's function takes no sizes, its class does.
    "caformer_s18": {
        "model_cls": MetaFormer,
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 32, 32),
        "token_mixers": (SepConv, SepConv, Attention, Attention),
    },
    "beit_base_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
}
INPUTS = {
    "vit_base_patch16_224": "patch_embed.proj",
    "resnet18": "conv1",
    "convnext_atto": "stem.0",
    "swin_tiny_patch4_window7_224": "patch_embed.proj",
    "caformer_s18": "stem.conv",
    "beit_base_patch16_224": "patch_embed.proj",
    "deit_tiny_distilled_patch16_224": "patch_embed.proj",
}
LAST = {
    "vit_base_patch16_224": ("head",),
    "resnet18": ("fc",),
    "convnext_atto": ("head.fc",),
    "swin_tiny_patch4_window7_224": ("head.fc",),
    "caformer_s18": ("head.fc.fc2",),
    "beit_base_patch16_224": ("head",),
    "deit_tiny_distilled_patch16_224": ("head", "head_dist"),
}


def make_net(name: str = "vit_base_patch16_224", *, seed: int = 9, **changes: Any) -> nn.Module:
    """A tiny member of a family, with other values in every tensor than its initialisation gives."""
    args: dict[str, Any] = {"num_classes": 5, **FAMILIES[name], **changes}
    torch.manual_seed(seed)
    if "model_cls" in args:
        net: nn.Module = build_model_with_cfg(variant=name, pretrained=False, **args)
    else:
        net = timm.create_model(name, pretrained=False, **args)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
    return net.eval()


def start(
    net: nn.Module, state: StateDict, *, keep_head: bool = True, **known: Any
) -> tuple[StateDict, list[str], StateDict]:
    """The adapted state dict, which the net takes, the lines that tell of it, and the net as it was."""
    fresh = {name: value.clone() for name, value in net.state_dict().items()}
    weights = in_timm_names(state)
    weights = Weights(weights.tensors, weights.layout, weights.notes, **known)
    adapted, notes = adapt_classifier(weights, net, "init 'x.pth'", keep_head=keep_head)
    net.load_state_dict(adapted)
    return adapted, notes, fresh


def differing(one: StateDict, other: StateDict) -> set[str]:
    """Names of tensors that are not the same to the last bit."""
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_classifier_takes_everything_head_included(name: str) -> None:
    theirs, net = make_net(name, seed=1), make_net(name)
    assert differing(theirs.state_dict(), net.state_dict())
    _, notes, _ = start(net, theirs.state_dict())
    assert notes == [KEPT_HEAD]
    assert differing(theirs.state_dict(), net.state_dict()) == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_other_classes_and_channels_change_the_input_and_the_last_layer_only(name: str) -> None:
    theirs, net = make_net(name, seed=1), make_net(name, num_classes=7, in_chans=1)
    last = [f"{layer}.{part}" for layer in LAST[name] for part in ("weight", "bias")]
    state = theirs.state_dict()
    _, notes, fresh = start(net, state)
    weight = f"{INPUTS[name]}.weight"
    assert differing(net.state_dict(), {**state, weight: adapt_channels(state[weight], 1)}) == set(last)
    assert differing(net.state_dict(), {**net.state_dict(), **{k: fresh[k] for k in last}}) == set()
    head = "the last layer of the head" if name == "caformer_s18" else "the head"
    what = "first convolution" if name in ("resnet18", "caformer_s18") else "patch projection"
    assert notes == [
        f"{head} is initialised anew: 7 classes, not 5",
        f"the {what}'s 3 channels are summed for 1",
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("in_chans", [1, 5])
def test_it_is_what_timm_makes_of_its_own_weights(name: str, in_chans: int, tmp_path: Path) -> None:
    theirs = make_net(name, seed=1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    # Sizes whose grids and windows differ from the weights', of networks that have them.
    sizes = {key: 24 for key in FAMILIES[name] if key == "img_size"}
    if name.startswith("swin"):
        sizes = {"img_size": 48, "window_size": 6}
    changes = {**sizes, "in_chans": in_chans, "num_classes": 7}
    net, by_timm = make_net(name, **changes), make_net(name, **changes)
    config = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    config |= {key: by_timm.default_cfg[key] for key in ("first_conv", "classifier")}  # type: ignore[index]
    filter_fn = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    load_pretrained(by_timm, config, num_classes=7, in_chans=in_chans, filter_fn=filter_fn, strict=False)
    start(net, theirs.state_dict())
    assert differing(net.state_dict(), by_timm.state_dict()) == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_encoder_without_classes_leaves_the_head_new_and_a_net_without_takes_none(name: str) -> None:
    headless, net = make_net(name, seed=1, num_classes=0), make_net(name)
    state = headless.state_dict()
    _, notes, fresh = start(net, state)
    assert notes == ["the head is initialised anew: init has none"]
    expected = {key: state.get(key, fresh[key]) for key in fresh}
    assert differing(net.state_dict(), expected) == set()
    other = make_net(name, num_classes=0)
    _, notes, _ = start(other, net.state_dict())
    assert notes == ["its head is dropped: the model has none"]
    assert differing(other.state_dict(), state) == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_that_is_not_asked_for_is_new_as_a_whole(name: str) -> None:
    theirs, net = make_net(name, seed=1), make_net(name)
    _, notes, fresh = start(net, theirs.state_dict(), keep_head=False)
    assert notes == ["the head is initialised anew: its own is not asked for"]
    classifier = ("head.fc",) if name == "caformer_s18" else LAST[name]
    new = {key for key in fresh if key.startswith(tuple(f"{layer}." for layer in classifier))}
    assert differing(net.state_dict(), theirs.state_dict()) == new
    assert all(torch.equal(net.state_dict()[key], fresh[key]) for key in new)


def test_a_head_of_another_layout_goes() -> None:
    probe = {"head.0.running_mean": torch.zeros(64), "head.1.weight": torch.zeros(5, 64)}
    for head in (probe, {"head.weight": torch.zeros(())}, {"head.bias": torch.zeros(5)}):
        net = make_net()
        _, notes, fresh = start(net, {**published_encoder(), **head})
        assert notes == ["the head is initialised anew: its own is of another layout"]
        assert torch.equal(net.state_dict()["head.weight"], fresh["head.weight"])


def test_average_pooling_has_a_new_norm_as_in_mae_and_token_pooling_keeps_it() -> None:
    state = published_encoder()
    net = make_net(global_pool="avg")
    assert isinstance(net.norm, nn.Identity)
    adapted, notes, fresh = start(net, state)
    assert torch.equal(adapted["fc_norm.weight"], fresh["fc_norm.weight"])
    assert [note for note in notes if "fc_norm" in note] == [
        "the norm after the pooling (fc_norm) is initialised anew and the pre-trained norm of every token "
        "is dropped, as in MAE's fine-tuning"
    ]
    for pool in ({"global_pool": "token"}, {"global_pool": "avg", "fc_norm": False}):
        net = make_net(**pool)
        adapted, notes, _ = start(net, state)
        assert torch.equal(adapted["norm.weight"], state["norm.weight"])
        assert notes == ["the head is initialised anew: init has none"]


def test_a_classifiers_own_norm_is_kept_and_its_head_where_it_reads_the_same() -> None:
    state = published_classifier()
    net = make_net(global_pool="avg")
    adapted, notes, _ = start(net, state)
    assert notes == [KEPT_HEAD]
    assert differing(adapted, state) == set()
    adapted, notes, fresh = start(make_net(), state)
    assert torch.equal(adapted["norm.weight"], state["fc_norm.weight"])
    assert torch.equal(adapted["head.weight"], fresh["head.weight"])
    assert notes == [
        "the norm after its pooling (fc_norm) becomes the norm of every token",
        "the head is initialised anew: its own reads other features",
    ]
    token_pooled = {**published_encoder(), "head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
    assert (
        "the head is initialised anew: its own reads other features"
        in start(make_net(global_pool="avg"), token_pooled)[1]
    )


def test_a_mae_leaves_its_decoder_behind() -> None:
    state = published_mae()
    adapted, notes, _ = start(make_net(), state)
    assert all(torch.equal(value, state[name]) for name, value in adapted.items() if "head" not in name)
    assert notes[0].startswith("what pre-training adds to the encoder is dropped (decoder_blocks.*, decoder_")
    assert in_timm_names(state).layout == "an MAE with decoder"


def test_hugging_faces_names_are_the_same_weights_head_included() -> None:
    state = published_mae()
    net, other = make_net(), make_net()
    start(net, state)
    _, notes, _ = start(other, to_huggingface(state))
    assert differing(net.state_dict(), other.state_dict()) == set()
    assert notes[0].startswith("what pre-training adds to the encoder is dropped (decoder_blocks.*, decoder_")
    vit = {f"vit.{name}": value for name, value in to_huggingface(published_encoder()).items()}
    head = {"classifier.weight": torch.rand(5, 64), "classifier.bias": torch.rand(5)}
    adapted, notes, _ = start(make_net(), {**vit, **head})
    assert torch.equal(adapted["head.weight"], head["classifier.weight"])
    assert notes == [KEPT_HEAD]


def test_learned_positions_are_resampled_from_their_own_grid() -> None:
    # 2 x 8 positions are as many as 4 x 4: the old image's size counts, not the square root.
    state = published_encoder(grid=(2, 8), learned=True)
    net = make_net(img_size=(20, 24))
    adapted, notes, _ = start(net, state, image_size=(8, 32))
    expected = resample_abs_pos_embed(state["pos_embed"], [5, 6], [2, 8], num_prefix_tokens=1)
    assert torch.equal(adapted["pos_embed"], expected)
    assert torch.equal(adapted["pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert notes[1:] == ["the learned positions are resampled from 2x8 to 5x6 patches"]
    with pytest.raises(UserError, match="has 16 positions, but its config says 3x8 patches"):
        start(net, state, image_size=(12, 32))
    with pytest.raises(UserError, match="has 15 learned positions and nothing says of which grid"):
        start(net, published_encoder(grid=(3, 5), learned=True))


@pytest.mark.parametrize("units", [None, (3, 3)])
def test_a_sin_cos_table_is_computed_at_the_new_patch_centres(units: tuple[int, int] | None) -> None:
    state = published_encoder(grid=(4, 9))
    if units:
        state["pos_embed"][0, 1:] = sincos_pos_embed((4, 9), units, 64)
    net = make_net(img_size=(20, 24))
    adapted, notes, _ = start(net, state, position_grid=units, image_size=(16, 36) if units else None)
    assert torch.equal(adapted["pos_embed"][0, 1:], sincos_pos_embed((5, 6), units or (4, 9), 64))
    assert not adapted["pos_embed"][0, 0].any()
    assert net.pos_embed.requires_grad
    assert notes[1:] == [
        "the sin-cos positions are computed anew over the same scene, from 4x9 to 5x6 patches"
    ]


def test_registers_and_a_cls_token_keep_their_positions() -> None:
    theirs = make_net(seed=1, reg_tokens=2)
    net = make_net(reg_tokens=2, img_size=24)
    adapted, _, _ = start(net, theirs.state_dict())
    assert torch.equal(adapted["pos_embed"][:, :3], theirs.state_dict()["pos_embed"][:, :3])
    no_class = {"reg_tokens": 2, "no_embed_class": True}
    theirs, net = make_net(seed=1, **no_class), make_net(**no_class, img_size=24)
    adapted, _, _ = start(net, theirs.state_dict())
    expected = resample_abs_pos_embed(theirs.state_dict()["pos_embed"], [6, 6], [4, 4], num_prefix_tokens=0)
    assert torch.equal(adapted["pos_embed"], expected)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_base_patch16_224", {"img_size": 24, "patch_size": (6, 8)}),
        ("swin_tiny_patch4_window7_224", {"patch_size": (2, 2)}),
    ],
)
def test_another_patch_size_resamples_the_projection(name: str, args: dict[str, Any]) -> None:
    theirs, net = make_net(name, seed=1), make_net(name, **args)
    adapted, notes, _ = start(net, theirs.state_dict())
    weight, patch = f"{INPUTS[name]}.weight", args["patch_size"]
    assert torch.equal(adapted[weight], resample_patch_embed(theirs.state_dict()[weight], list(patch)))
    to = "6x8" if name.startswith("vit") else "2"
    assert f"the patch projection is resampled from 4 to {to} px" in notes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": (48, 96), "window_size": (6, 3)}),
        ("beit_base_patch16_224", {"img_size": 24, "use_rel_pos_bias": True}),
    ],
)
def test_tables_of_relative_positions_follow_timms_rule(name: str, changes: dict[str, Any]) -> None:
    theirs, net = make_net(name, seed=1), make_net(name, **changes)
    adapted, notes, _ = start(net, theirs.state_dict())
    tables = [key for key in adapted if key.endswith("relative_position_bias_table")]
    assert tables
    for key in tables:
        window = net.get_submodule(key.rpartition(".")[0]).window_size
        wanted = net.state_dict()[key].shape
        expected = resize_rel_pos_bias_table(theirs.state_dict()[key], window, tuple(wanted))
        assert torch.equal(adapted[key], expected)
    # Two blocks and more are converted in the same way, which is told once.
    assert sum("relative positions are resampled for windows of" in note for note in notes) == 1


@pytest.mark.parametrize(
    ("name", "others"), [("swin_tiny_patch4_window7_224", 0), ("beit_base_patch16_224", 3)]
)
def test_a_table_is_of_a_square_window_or_refused(name: str, others: int) -> None:
    state = make_net(name).state_dict()
    table = next(key for key in state if key.endswith("relative_position_bias_table"))
    for num_rows in (0, 1, 2, 3, 4, 8, 9, 16, 25, 81):
        rows = torch.ones(num_rows + others, state[table].shape[1])
        if num_rows in (1, 9, 25, 81):
            adapted, _, _ = start(make_net(name), {**state, table: rows})
            assert torch.allclose(adapted[table], torch.ones(()))
        else:
            with pytest.raises(UserError, match=r"relative.position"):
                start(make_net(name), {**state, table: rows})


def test_a_table_of_no_square_window_is_refused() -> None:
    theirs = make_net("swin_tiny_patch4_window7_224", seed=1, img_size=(32, 16), window_size=(4, 2))
    with pytest.raises(UserError, match="has 21 relative positions, not a square window's"):
        start(make_net("swin_tiny_patch4_window7_224"), theirs.state_dict())


def test_buffers_that_follow_from_the_architecture_are_ignored() -> None:
    theirs = make_net("swin_tiny_patch4_window7_224", seed=1)
    old_files_have: dict[str, Tensor] = {
        **theirs.state_dict(),
        **{name: value for name, value in theirs.named_buffers() if "relative_position_index" in name},
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
    }
    assert len(old_files_have) > len(theirs.state_dict()) + 1
    net = make_net("swin_tiny_patch4_window7_224")
    start(net, old_files_have)
    assert differing(net.state_dict(), theirs.state_dict()) == set()


def test_another_architecture_is_one_sentence_of_five_tensors_and_how_many_more() -> None:
    others = {
        "resnet": make_net("resnet18").state_dict(),
        "deeper": published_encoder(depth=3),
        "wider": published_encoder(width=128),
        "shallower": published_encoder(depth=1),
    }
    for state in others.values():
        with pytest.raises(
            UserError, match=r"^init 'x\.pth' is of another model: .*; .*, and \d+ more$"
        ) as e:
            start(make_net(), state)
        assert str(e.value).count(";") == 4
    with pytest.raises(UserError, match=r"blocks\.2\.norm1\.weight is not part of the model"):
        start(make_net(), others["deeper"])
    with pytest.raises(UserError, match=r"conv1\.weight is missing"):
        start(make_net("resnet18"), published_mae())
    # A wide first convolution is of the architecture, and no patch to resample.
    state = make_net("resnet18").state_dict()
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    with pytest.raises(UserError, match=r"conv1\.weight is \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)"):
        start(make_net("resnet18"), state)


def test_shapes_that_make_no_sense_are_refused_before_anything_is_computed() -> None:
    bad: dict[str, list[Tensor]] = {
        "pos_embed": [torch.zeros(64), torch.zeros(1, 1, 64), torch.zeros(1, 0, 64), torch.zeros(1, 17, 0)],
        "patch_embed.proj.weight": [torch.zeros(64), torch.zeros(64, 3, 0, 4), torch.zeros(64, 6, 4, 4)],
        "blocks.1.attn.qkv.weight": [torch.zeros(192, 64, dtype=torch.int64)],
    }
    for name, tensors in bad.items():
        for tensor in tensors:
            with pytest.raises(UserError, match=r"^init 'x\.pth'"):
                start(make_net(), {**published_encoder(), name: tensor})


def test_positions_for_a_network_without_them_are_refused() -> None:
    with pytest.raises(UserError, match=r"of another model: pos_embed is not part of the model$"):
        start(make_net(pos_embed="none"), published_encoder())
    distilled = make_net("deit_tiny_distilled_patch16_224").state_dict()
    with pytest.raises(UserError, match=r"dist_token is not part of the model; head_dist\.weight is not"):
        start(make_net(), distilled)


def test_channels_without_a_rule_are_refused() -> None:
    with pytest.raises(UserError, match="in_chans is 4, but the weights are for 6 channels"):
        start(make_net("resnet18", in_chans=4), make_net("resnet18", in_chans=6).state_dict())


def test_positions_of_zeros_are_named_and_the_nets_own_are_used() -> None:
    state = {**published_encoder(), "pos_embed": torch.zeros(1, 17, 64)}
    net = make_net()
    _, notes, fresh = start(net, state)
    assert notes == ["the head is initialised anew: init has none", f"its positions {UNSET_POSITIONS}"]
    assert torch.equal(net.get_parameter("pos_embed"), fresh["pos_embed"])


def test_another_number_of_heads_is_refused_where_it_is_known_and_told_where_it_is_likely() -> None:
    with pytest.raises(UserError, match=r"has 2 heads, but model\.num_heads is 4"):
        start(make_net(), published_encoder(), num_heads=2)
    _, notes, _ = start(make_net(embed_dim=192, num_heads=6), published_encoder(width=192))
    assert any("model.num_heads is 6, but published weights of width 192 have 3" in line for line in notes)


def test_half_precision_weights_are_widened() -> None:
    state = {name: value.half() for name, value in published_encoder(learned=True).items()}
    net = make_net(img_size=24)
    start(net, state)
    assert all(value.dtype == torch.float32 for value in net.state_dict().values())
    assert torch.equal(net.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"].float())
