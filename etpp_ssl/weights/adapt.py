"""Weights as the start of a masked autoencoder of another resolution, patch size, channels or decoder.

Every rule is one function, here or in `etpp_ssl.weights.tensors`, and adds a note when it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.encoders import attention_heads, num_prefix_positions
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.weights.layouts import Weights
from etpp_ssl.weights.reading import load_weights
from etpp_ssl.weights.tensors import (
    adapt_input,
    adapt_patch,
    adapt_positions,
    check_heads,
    is_resizable,
    show_grid,
)

PROJECTION = "encoder.patch_embed.proj.weight"
POSITIONS = "encoder.pos_embed"


def adapt_weights(
    weights: Weights, model: MaskedAutoencoder, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict that starts `model` from `weights`.

    The encoder must be the same network except for its patch projection and positions. A decoder that is
    missing or does not fit stays as `model` initialised it. If only its last projection does not fit, because
    another target, patch size or channel count asks for other values, only that stays.

    Args:
        weights: from `etpp_ssl.weights.layouts.recognise`.
        model: freshly initialised.
        source: names the weights in messages.

    Returns:
        A state dict for `model`, and one line for everything that was converted, dropped or stays new.

    Raises:
        UserError: for another architecture (naming up to five tensors), a channel count without a rule,
            or learned positions for a model with fixed ones.
    """
    expected = model.state_dict()
    tensors = dict(weights.tensors)
    notes = list(weights.notes)
    _norm_of_tokens(tensors, notes)
    tensors = _decoder(tensors, expected, notes)
    # Another architecture shows in the tensors that are not converted, so these are checked first.
    converted = {
        name: expected[name]
        for name in (PROJECTION, POSITIONS)
        if name in tensors and is_resizable(tensors[name], expected[name])
    }
    load_weights(expected, {**tensors, **converted}, source)
    encoder = model.encoder
    check_heads(weights.num_heads, attention_heads(encoder), encoder.embed_dim, source, notes)
    projection = adapt_input(tensors[PROJECTION], expected[PROJECTION].shape[1], source, notes)
    tensors[PROJECTION] = adapt_patch(projection, model.patch_size, notes)
    tensors[POSITIONS] = _positions(weights, model, source, notes)
    known = weights.decoder_position_grid
    kept = any(tensors[name] is weights.tensors.get(name) for name in tensors if name.startswith("decoder."))
    # For fixed positions the encoder's note says it.
    if kept and known is not None and known != model.position_grid and not model.fixed_positions:
        notes.append(_counts("decoder's", model, known))
    return load_weights(expected, tensors, source), notes


def _norm_of_tokens(tensors: dict[str, Tensor], notes: list[str]) -> None:
    """Turn a classifier's norm after the pooling into the norm of every token."""
    if "encoder.norm.weight" in tensors or "encoder.fc_norm.weight" not in tensors:
        return
    for part in ("weight", "bias"):
        tensors[f"encoder.norm.{part}"] = tensors.pop(f"encoder.fc_norm.{part}")
    notes.append("the norm after its pooling (fc_norm) becomes the norm of every token")


def _positions(weights: Weights, model: MaskedAutoencoder, source: str, notes: list[str]) -> Tensor:
    encoder = model.encoder
    positions = weights.tensors[POSITIONS]
    prefix = num_prefix_positions(encoder)
    old = weights.grid_of(weights.tensors[PROJECTION])
    table = sincos_table(positions, prefix, old)
    counted = weights.position_grid or (table.position_grid if table else None)
    if not model.fixed_positions:
        grid: tuple[int, int] = tuple(encoder.patch_embed.grid_size)
        old = old or (table.grid if table else None)
        return adapt_positions(positions, grid, prefix, source, notes, old_grid=old, position_grid=counted)
    if counted is None:
        raise UserError(
            f"{source} has learned positions, which model.pos_embed=sincos would throw away; "
            f"use model.pos_embed=learned"
        )
    if counted != model.position_grid:
        notes.append(_counts("sin-cos", model, counted))
    own: Tensor = encoder.pos_embed.detach()
    return own


def _counts(whose: str, model: MaskedAutoencoder, old: tuple[int, int]) -> str:
    return (
        f"the {whose} positions count {show_grid(model.position_grid)} patches, not {show_grid(old)}; "
        f"model.position_grid={list(old)} keeps the places that the weights know"
    )


def _decoder(tensors: dict[str, Tensor], expected: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors with a decoder that fits: theirs, theirs except for the last projection, or the new one."""
    theirs = {name: value for name, value in tensors.items() if name.startswith("decoder.")}
    ours = {name: value for name, value in expected.items() if name.startswith("decoder.")}
    rest = {name: value for name, value in tensors.items() if name not in theirs}
    other = {name for name in ours.keys() | theirs.keys() if _shape(ours, name) != _shape(theirs, name)}
    head = {"decoder.head.weight", "decoder.head.bias"}
    if not other:
        return tensors
    if other <= head and head <= ours.keys() & theirs.keys():
        old, new = theirs["decoder.head.bias"].shape[0], ours["decoder.head.bias"].shape[0]
        notes.append(f"the decoder's last projection is initialised anew: {new} values per patch, not {old}")
        return {**rest, **theirs, **{name: ours[name] for name in head}}
    why = "it has none" if not theirs else "its own is of another size"
    notes.append(f"the decoder is initialised anew: {why}")
    return {**rest, **ours}


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
