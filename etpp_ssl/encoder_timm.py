"""Encoders of timm: by name, or whatever file or export holds one of timm's models.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import default_statistics
from etpp_ssl.encoder import Encoder
from etpp_ssl.messages import shown, shown_text
from etpp_ssl.model.timm_net import is_vit, size_switch
from etpp_ssl.model.zoo.swin import make_resizable
from etpp_ssl.weights.adapt_classifier import adapt_classifier
from etpp_ssl.weights.layouts import in_timm_names
from etpp_ssl.weights.reading import load_weights, read_state_dict


def encoder_of_export(file: Path, config: dict[str, Any]) -> Encoder:
    """The model of an export, `etpp export --to timm` or timm's own.

    Args:
        file: its weights.
        config: its `config.json`.

    Raises:
        UserError: if the file is refused or is of another model.
    """
    # Older exports of timm have one level.
    described: dict[str, Any] = dict(config.get("pretrained_cfg") or config)
    args = {"num_classes": config.get("num_classes", 1000), **config.get("model_args", {})}
    if "input_size" in described:
        args.setdefault("in_chans", described["input_size"][0])
    tensors, name = read_state_dict(file), str(config["architecture"])
    net = _new_net(name, pretrained_cfg=described, **args)
    net.load_state_dict(load_weights(net.state_dict(), tensors, repr(str(file))))
    return _described_by_timm(net, f"export {str(file.parent)!r}", classes=config.get("label_names"))


def encoder_of_file(file: Path, name: str) -> Encoder:
    """A file as the weights of a named model of timm, at that model's size and without a head.

    Raises:
        UserError: if timm does not know the name, or the file is refused or of another model.
    """
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"model is {shown(name)}, and timm has no model of that name{_close_to(name)}")
    notes: list[str] = []
    source = repr(str(file))
    net = _new_net(name, num_classes=0)
    weights = in_timm_names(read_state_dict(file, notes), source, net.state_dict().keys())
    first = weights.tensors.get(f"{net.default_cfg['first_conv']}.weight")
    if first is not None and first.ndim == 4:
        net = _new_net(name, num_classes=0, in_chans=first.shape[1])
    try:
        tensors, changes = adapt_classifier(weights, net, source, keep_head=False)
    except UserError as error:
        raise UserError(f"{error}; model is {name!r}") from error
    net.load_state_dict(tensors)
    lines = (f"{source} is {weights.layout}", *notes, *changes)
    return _described_by_timm(net, f"weights {source}", notes=lines)


def encoder_of_name(name: str, *, pretrained: bool) -> Encoder:
    """A model of timm without its head, with its weights or with random ones.

    Raises:
        UserError: if timm does not know the name, or its weights cannot be loaded.
    """
    if not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"{shown(name, 300)} does not exist, and timm has no model of that name{_close_to(name)}"
        )
    try:
        net = _new_net(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        # A download can end in anything.
        if not pretrained:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the weights of timm's {name} cannot be loaded: {shown_text(reason, 200)}; pretrained=False "
            f"builds it with random ones"
        ) from error
    return _described_by_timm(net, f"timm's {name}" if pretrained else f"timm's {name} with random weights")


def _close_to(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"; close names: {', '.join(close)}" if close else ""


def _new_net(name: str, **args: Any) -> Any:
    """timm's model of a name; one that resamples its positions runs at any size that it can take.

    A plain ViT does so in `etpp_ssl.evaluation.feature_maps`, as in pre-training.
    """
    switch = {} if is_vit(name) else size_switch(name)
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(name, **{**args, **switch})
    make_resizable(net)
    return net


def _described_by_timm(
    net: Any, origin: str, *, classes: list[str] | None = None, notes: Iterable[str] = ()
) -> Encoder:
    """With the size, normalisation and crop that timm's `pretrained_cfg` states."""
    config = resolve_model_data_config(net)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    layer = dict(net.named_modules()).get(str(net.pretrained_cfg.get("first_conv")))
    in_chans = layer.in_channels if isinstance(layer, nn.Conv2d) else config["input_size"][0]
    mean, std, assumed = known_statistics(
        in_chans, {"image_mean": config["mean"], "image_std": config["std"]}
    )
    own_way = config["interpolation"] != "bicubic" or config["crop_mode"] != "center"
    resized = f"timm resizes by {config['interpolation']} and crops by {config['crop_mode']}"
    return Encoder(
        net,
        image_size=(size[0], size[1]),
        mean=mean,
        std=std,
        crop_pct=config["crop_pct"],
        classes=classes,
        origin=origin,
        notes=(*notes, *assumed, *((f"{resized}; here it is bicubic, center",) if own_way else ())),
    )


def known_statistics(
    in_chans: int, config: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Mean and standard deviation per channel, and a note if they had to be assumed.

    Args:
        in_chans: C.
        config: which may say them as `image_mean` and `image_std`, transformers' words.
    """
    mean, std = config.get("image_mean"), config.get("image_std")
    if mean and std and len(mean) == len(std) == in_chans:
        return tuple(mean), tuple(std), ()
    mean, std = default_statistics(in_chans)
    return mean, std, (f"nothing tells the normalisation: mean {list(mean)} and std {list(std)} are assumed",)
