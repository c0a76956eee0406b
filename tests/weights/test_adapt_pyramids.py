"""PVT's positions, one table for each stage, as the start of a PVT of another size."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

import etpp_ssl.model.zoo.cswin
import etpp_ssl.model.zoo.pvt  # noqa: F401  These register what timm lacks.
from etpp_ssl.weights.adapt_classifier import adapt_classifier
from etpp_ssl.weights.layouts import Weights
from etpp_ssl.weights.tensors import adapt_channels

SIZES: dict[str, dict[str, Any]] = {
    "pvt_tiny": {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "cswin_tiny": {},
}


def make_net(name: str, seed: int, **args: Any) -> nn.Module:
    torch.manual_seed(seed)
    net: nn.Module = timm.create_model(name, pretrained=False, **{"num_classes": 4, **SIZES[name], **args})
    return net.eval()


@pytest.mark.parametrize("known", [True, False])
def test_each_stages_positions_are_resampled_and_the_cls_tokens_kept(known: bool) -> None:
    old: tuple[int, int] = (64, 256) if known else (128, 128)
    theirs = make_net("pvt_tiny", 1, img_size=old).state_dict()
    net = make_net("pvt_tiny", 2, img_size=(96, 160), in_chans=1, num_classes=3)
    weights = Weights(theirs, "it", image_size=old if known else None)
    adapted, notes = adapt_classifier(weights, net, "it")
    net.load_state_dict(adapted)
    for stage, stride in enumerate((4, 8, 16, 32), start=1):
        expected = resample_abs_pos_embed(
            theirs[f"pos_embed{stage}"],
            [96 // stride, 160 // stride],
            [old[0] // stride, old[1] // stride],
            num_prefix_tokens=int(stage == 4),
        )
        assert torch.equal(adapted[f"pos_embed{stage}"], expected)
    weight = "patch_embed1.proj.weight"
    assert torch.equal(adapted[weight], adapt_channels(theirs[weight], 1))
    assert "the head is initialised anew: 3 classes, not 4" in notes
    assert sum("learned positions of stage" in note for note in notes) == 4


@pytest.mark.parametrize("name", SIZES)
def test_the_same_pyramid_takes_everything(name: str) -> None:
    theirs, net = make_net(name, 1, img_size=64), make_net(name, 2, img_size=64)
    adapted, notes = adapt_classifier(Weights(dict(theirs.state_dict()), "it"), net, "it")
    net.load_state_dict(adapted)
    assert notes == ["its head of 4 classes is kept: they are taken for the same ones"]
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(images), theirs(images))
