"""Weights as the start of a timm classifier of another size, patch size, channels, pooling or classes.

Tensors whose shape depends on the size are converted: the input convolution, learned positions (a ViT's, and
those of PVT's stages), and tables of relative positions (Swin, BEiT). The head and the norm before it follow
the pooling and the classes. Everything else has to fit.

Legend: N patches, P prefix tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.model.encoders import transformer_of
from etpp_ssl.model.lora import plain_tensors
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.model.trained_parts import heads_of
from etpp_ssl.weights.layouts import Weights
from etpp_ssl.weights.reading import load_weights
from etpp_ssl.weights.tensors import (
    UNSET_POSITIONS,
    adapt_input,
    adapt_patch,
    adapt_positions,
    check_heads,
    is_resizable,
)

_TABLE = "relative_position_bias_table"
_NORM = ("norm.weight", "norm.bias")
_FC_NORM = ("fc_norm.weight", "fc_norm.bias")
Conversion = Callable[[Tensor, list[str]], Tensor]


def adapt_classifier(
    weights: Weights, net: nn.Module, source: str, *, keep_head: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict that starts the classifier `net` from `weights`.

    A network that pools before its last norm (`fc_norm`) starts with a new one, and the pre-trained `norm` of
    every token is dropped, as in MAE's fine-tuning; with token pooling it is kept. Weights that have an
    `fc_norm` keep it. A head is kept if it has as many classes and reads the same features.

    Args:
        weights: from `etpp_ssl.weights.layouts.in_timm_names`.
        net: a freshly initialised timm model at base resolution.
        source: names the weights in messages.
        keep_head: False starts with a new head in any case.

    Returns:
        A state dict for `net`, and one line for everything that was converted, dropped or stays new.

    Raises:
        UserError: for another architecture (naming up to five tensors), a channel count without a rule,
            or positions of an unknown grid.
    """
    expected = plain_tensors(net)
    notes = list(weights.notes)
    tensors = adapt_head(weights.tensors, net, notes, keep_head=keep_head)
    conversions = {
        name: conversion
        for name, conversion in _conversions(weights, net, source)
        if name in tensors.keys() & expected.keys() and is_resizable(tensors[name], expected[name])
    }
    # Another architecture shows in the tensors that are not converted, so these are checked first.
    load_weights(expected, {**tensors, **{name: expected[name] for name in conversions}}, source)
    encoder = transformer_of(net)
    if encoder is not None:
        check_heads(weights.num_heads, encoder.num_heads, encoder.net.embed_dim, source, notes)
    for name, conversion in conversions.items():
        tensors[name] = conversion(tensors[name], notes)
    # A note that every block adds is told once.
    return load_weights(expected, tensors, source), list(dict.fromkeys(notes))


def _conversions(weights: Weights, net: nn.Module, source: str) -> Iterator[tuple[str, Conversion]]:
    """Names of the tensors whose shape depends on a size, and how to convert each."""
    yield from _input_convolution(net, source)
    yield from _vit_positions(weights, net, source)
    yield from _stage_positions(weights, net, source)
    for name in net.state_dict():
        if name.endswith(f".{_TABLE}"):
            yield name, _table_conversion(net.get_submodule(name.removesuffix(f".{_TABLE}")), source)


def _input_convolution(net: nn.Module, source: str) -> Iterator[tuple[str, Conversion]]:
    config: Any = getattr(net, "default_cfg", None) or {}
    first = config.get("first_conv")
    layer = dict(net.named_modules()).get(first) if isinstance(first, str) else None
    if not isinstance(layer, nn.Conv2d):
        return
    patch = (layer.kernel_size[0], layer.kernel_size[1])
    # A convolution that overlaps does not project patches: its size belongs to the architecture.
    is_projection = tuple(layer.stride) == patch
    what, in_chans = "patch projection" if is_projection else "first convolution", layer.weight.shape[1]

    def convert(weight: Tensor, notes: list[str]) -> Tensor:
        weight = adapt_input(weight, in_chans, source, notes, what=what)
        return adapt_patch(weight, patch, notes) if is_projection else weight

    yield f"{first}.weight", convert


def _vit_positions(weights: Weights, net: Any, source: str) -> Iterator[tuple[str, Conversion]]:
    grid: tuple[int, int] | None = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    prefix = 0 if getattr(net, "no_embed_class", False) else int(getattr(net, "num_prefix_tokens", 0))
    positions: Tensor | None = getattr(net, "pos_embed", None)
    # Other architectures have a map of positions under this name, or count other tokens.
    if grid and positions is not None and positions.shape[1:-1] == (prefix + grid[0] * grid[1],):
        projection = weights.tensors.get("patch_embed.proj.weight")
        known = projection is not None and is_resizable(projection, net.patch_embed.proj.weight)
        old = weights.grid_of(projection) if projection is not None and known else None
        yield "pos_embed", position_conversion(weights, positions, (grid[0], grid[1]), prefix, source, old)


def _stage_positions(weights: Weights, net: Any, source: str) -> Iterator[tuple[str, Conversion]]:
    """Positions of a PVT's stages, whose patches keep their size."""
    grids: list[tuple[int, int]] = getattr(net, "grids", [])
    for stage, (h, w) in enumerate(grids, start=1):
        old, size = None, weights.image_size
        if size is not None:
            old = size[0] * h // net.img_size[0], size[1] * w // net.img_size[1]
        prefix = int(net.num_prefix_tokens) if stage == len(grids) else 0
        what = f"positions of stage {stage}"
        own = getattr(net, f"pos_embed{stage}")
        yield f"pos_embed{stage}", position_conversion(weights, own, (h, w), prefix, source, old, what)


def position_conversion(
    weights: Weights,
    own: Tensor,
    grid: tuple[int, int],
    prefix: int,
    source: str,
    old: tuple[int, int] | None,
    what: str = "positions",
) -> Conversion:
    """How learned positions are converted for a grid of (h, w) patches; `own` are used in place of zeros."""

    def convert(positions: Tensor, notes: list[str]) -> Tensor:
        if positions.shape[1] > prefix and not positions.any():
            notes.append(f"its {what} {UNSET_POSITIONS}")
            return own.detach()
        table = sincos_table(positions, prefix, old)
        return adapt_positions(
            positions,
            grid,
            prefix,
            source,
            notes,
            old_grid=old or (table.grid if table else None),
            position_grid=weights.position_grid or (table.position_grid if table else None),
            name=what,
        )

    return convert


def _table_conversion(attention: Any, source: str) -> Conversion:
    """timm's rule for a table of relative positions, of windows of another size."""
    wanted: Tensor = attention.relative_position_bias_table
    window: tuple[int, int] = tuple(attention.window_size)

    def convert(table: Tensor, notes: list[str]) -> Tensor:
        if table.shape == wanted.shape or table.ndim != 2 or table.shape[1] != wanted.shape[1]:
            # The same, or of another architecture, which the check of all shapes tells.
            return table
        # A window of w x w has (2 w - 1)^2 of them; BEiT's have a few more, for the cls token.
        num_others = wanted.shape[0] - (2 * window[0] - 1) * (2 * window[1] - 1)
        num_positions = max(table.shape[0] - num_others, 0)
        if math.isqrt(num_positions) ** 2 != num_positions or num_positions % 2 == 0:
            raise UserError(f"{source} has {num_positions} relative positions, not a square window's")
        resized: Tensor = resize_rel_pos_bias_table(table.float(), window, tuple(wanted.shape))
        notes.append(
            f"the tables of {num_positions} relative positions are resampled for windows of "
            f"{window[0]}x{window[1]}"
        )
        return resized

    return convert


def adapt_head(
    tensors: Mapping[str, Tensor], net: nn.Module, notes: list[str], *, keep_head: bool
) -> dict[str, Tensor]:
    """The tensors with the norm and the head that `net` starts with; see `adapt_classifier`.

    If only the classes of a head with a hidden layer (CAFormer's) differ, that layer is kept, as timm does.

    Args:
        tensors: under timm's names.
        net: a freshly initialised timm model.
        notes: gets a line for everything that is dropped, moved, kept or new.
        keep_head: False starts with a new head in any case.
    """
    expected = plain_tensors(net)
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
        notes.append(f"the head is initialised anew: {reason if theirs else 'init has none'}")
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
    """The tensors with a ViT's last norm where `expected` has it; whether a head then reads the same."""
    tensors = dict(tensors)
    has_norm, has_fc_norm = ("norm.weight" in tensors, "fc_norm.weight" in tensors)
    wants_norm, wants_fc_norm = ("norm.weight" in expected, "fc_norm.weight" in expected)
    if wants_fc_norm and not wants_norm and has_norm and not has_fc_norm:
        for name in _NORM:
            tensors.pop(name, None)
        tensors |= {name: expected[name] for name in _FC_NORM if name in expected}
        notes.append(
            "the norm after the pooling (fc_norm) is initialised anew and the pre-trained norm of every "
            "token is dropped, as in MAE's fine-tuning"
        )
        return tensors, False
    if wants_norm and not wants_fc_norm and has_fc_norm and not has_norm:
        for name, theirs in zip(_NORM, _FC_NORM, strict=True):
            if theirs in tensors:
                tensors[name] = tensors.pop(theirs)
        notes.append("the norm after its pooling (fc_norm) becomes the norm of every token")
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
    parts = heads_of(net)
    return tuple(name for name, module in net.named_modules() if any(module is part for part in parts))
