"""A classifier's head and the norm in front of it, from weights of another number of classes or pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_NORM = ("norm.weight", "norm.bias")
_FC_NORM = ("fc_norm.weight", "fc_norm.bias")


def adapt_head(
    tensors: Mapping[str, Tensor], net: nn.Module, notes: list[str], *, keep_head: bool
) -> dict[str, Tensor]:
    """The tensors with the norm and the head that `net` is to start with; see `adapt_classifier`.

    Of a head with a hidden layer (CAFormer's), that layer is kept where only the classes are others, as
    timm does it.

    Args:
        tensors: under timm's names.
        net: a freshly initialised timm model.
        notes: gets a line for whatever is dropped, moved, kept or new.
        keep_head: False has the head initialised anew whatever it is.
    """
    expected = net.state_dict()
    rest, reads_the_same = _norms(tensors, expected, notes)
    last = _last_layers(net)
    prefixes = tuple(f"{name}." for name in (*last, *_head_modules(net)))
    theirs = {name: value for name, value in rest.items() if name.startswith(prefixes)}
    ours = {name: value for name, value in expected.items() if name.startswith(prefixes)}
    rest = {name: value for name, value in rest.items() if name not in theirs}
    fits = {name for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape}
    if not ours:
        if theirs:
            notes.append("its head is dropped: the model has none")
        return rest
    if not theirs or not keep_head or not reads_the_same:
        reason = "its own reads other features" if keep_head else "its own is not asked for"
        notes.append(f"the head is initialised anew: {reason if theirs else 'it has none'}")
        return {**rest, **ours}
    if fits == ours.keys() == theirs.keys():
        notes.append(f"its head of {net.num_classes} classes is kept: they are taken for the same ones")
        return {**rest, **theirs}
    old = next((theirs[f"{name}.bias"].numel() for name in last if f"{name}.bias" in theirs), None)
    other_classes = old not in (None, net.num_classes)
    reason = f"{net.num_classes} classes, not {old}" if other_classes else "its own is of another layout"
    hidden = {name for name in ours if name.rpartition(".")[0] not in last}
    if hidden and hidden <= fits:
        notes.append(f"the last layer of the head is initialised anew: {reason}")
        return {**rest, **ours, **{name: theirs[name] for name in hidden}}
    notes.append(f"the head is initialised anew: {reason}")
    return {**rest, **ours}


def _norms(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], notes: list[str]
) -> tuple[dict[str, Tensor], bool]:
    """The tensors with a ViT's last norm where `expected` has it, and whether a head would see the same."""
    tensors = dict(tensors)
    has_norm, has_fc_norm = ("norm.weight" in tensors, "fc_norm.weight" in tensors)
    wants_norm, wants_fc_norm = ("norm.weight" in expected, "fc_norm.weight" in expected)
    if wants_fc_norm and not wants_norm and has_norm and not has_fc_norm:
        for name in _NORM:
            tensors.pop(name, None)
        tensors |= {name: expected[name] for name in _FC_NORM if name in expected}
        notes.append(
            "the norm behind the pooling (fc_norm) is initialised anew and the pre-trained norm of every "
            "token is dropped, as in MAE's fine-tuning"
        )
        return tensors, False
    if wants_norm and not wants_fc_norm and has_fc_norm and not has_norm:
        for name, theirs in zip(_NORM, _FC_NORM, strict=True):
            if theirs in tensors:
                tensors[name] = tensors.pop(theirs)
        notes.append("the norm behind its pooling (fc_norm) becomes the norm of every token")
        return tensors, False
    return tensors, True


def _last_layers(net: Any) -> tuple[str, ...]:
    """The linear layers whose width is the number of classes; a distilled DeiT has two."""
    named: str | tuple[str, ...] | None = (getattr(net, "default_cfg", None) or {}).get("classifier")
    if named is None:
        return _head_modules(net)
    return (named,) if isinstance(named, str) else tuple(named)


def _head_modules(net: Any) -> tuple[str, ...]:
    """The names of what timm calls the classifier."""
    heads = net.get_classifier()
    parts = heads if isinstance(heads, tuple | list | nn.ModuleList) else (heads,)
    return tuple(name for name, module in net.named_modules() if any(module is part for part in parts))
