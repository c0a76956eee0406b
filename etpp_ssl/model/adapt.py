"""Weights of one model as the start of another: other resolution, patch size, channels or decoder.

Every rule is one function here, and each that was needed is told in one line.

Legend: N patches, P prefix tokens, D width, C channels, p, q patch size.
"""

from __future__ import annotations

import math

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.model.architecture import HEADS_OF_WIDTH
from etpp_ssl.model.interop import Weights
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.pos_embed import resampled_pos_embed, sincos_grid
from etpp_ssl.model.state_dict import load_weights
from etpp_ssl.model.vit import attention_heads, num_prefix_positions

PROJECTION = "encoder.patch_embed.proj.weight"
POSITIONS = "encoder.pos_embed"


def adapt_weights(
    weights: Weights, model: MaskedAutoencoder, source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict that starts `model` from `weights`.

    The encoder must be the same network up to its patch projection and positions. A decoder that does
    not fit, or is not there, stays as `model` initialised it; of one that fits, the last projection
    does where another target, patch size or channel count asks for other values.

    Args:
        weights: from `etpp_ssl.model.interop`.
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
    # Another architecture shows in the tensors that are not converted; those are looked at first.
    converted = {name: expected[name] for name in (PROJECTION, POSITIONS) if name in tensors}
    load_weights(expected, {**tensors, **converted}, source)
    _check_heads(weights, model, source, notes)
    tensors[PROJECTION] = _projection(tensors[PROJECTION], expected[PROJECTION], source, notes)
    tensors[POSITIONS] = _positions(weights, model, source, notes)
    return load_weights(expected, tensors, source), notes


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """A patch projection for another number of channels (timm's rule for input convolutions).

    One channel gets the sum over channels: the response to a grey image stays. From one or three
    channels to more or fewer, they are repeated in turn and scaled by old / new.

    Args:
        weight: (D, C_old, p, q).
        in_chans: C.

    Returns:
        (D, C, p, q).

    Raises:
        UserError: from another number of channels, whose order says nothing about the new ones.
    """
    old = weight.shape[1]
    if in_chans == old:
        return weight
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    if old not in (1, 3):
        raise UserError(
            f"in_chans is {in_chans}, but the weights are for {old} channels: there is a rule from 1 and 3 "
            f"channels, and to 1"
        )
    repeated = weight.repeat(1, math.ceil(in_chans / old), 1, 1)[:, :in_chans]
    return repeated * (old / in_chans)


def _norm_of_tokens(tensors: dict[str, Tensor], notes: list[str]) -> None:
    """A classifier's norm behind the pooling becomes the norm of every token."""
    if "encoder.norm.weight" in tensors or "encoder.fc_norm.weight" not in tensors:
        return
    for part in ("weight", "bias"):
        tensors[f"encoder.norm.{part}"] = tensors.pop(f"encoder.fc_norm.{part}")
    notes.append("the norm behind its pooling (fc_norm) becomes the norm of every token")


def _projection(weight: Tensor, wanted: Tensor, source: str, notes: list[str]) -> Tensor:
    in_chans, patch = wanted.shape[1], (wanted.shape[2], wanted.shape[3])
    old_chans, old_patch = weight.shape[1], (weight.shape[2], weight.shape[3])
    try:
        weight = adapt_channels(weight.float(), in_chans)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if in_chans != old_chans:
        how = "summed" if in_chans == 1 else "repeated in turn and scaled"
        notes.append(f"the patch projection's {old_chans} channels are {how} for {in_chans}")
    if patch != old_patch:
        # FlexiViT's rule: tokens of a resized patch stay as near as they can.
        weight = resample_patch_embed(weight, list(patch))
        notes.append(
            f"the patch projection is resampled from {show_size(old_patch)} to {show_size(patch)} px"
        )
    return weight


def _check_heads(weights: Weights, model: MaskedAutoencoder, source: str, notes: list[str]) -> None:
    """No shape tells the number of heads, and another one computes something else without a word."""
    width, heads = model.encoder.embed_dim, attention_heads(model.encoder)
    if weights.num_heads is not None and heads != weights.num_heads:
        raise UserError(f"{source} has {weights.num_heads} heads, but model.num_heads is {heads}")
    if weights.num_heads is None and HEADS_OF_WIDTH.get(width, heads) != heads:
        notes.append(
            f"warning: model.num_heads is {heads}, but published weights of width {width} have "
            f"{HEADS_OF_WIDTH[width]}; no tensor tells which these have"
        )


def _positions(weights: Weights, model: MaskedAutoencoder, source: str, notes: list[str]) -> Tensor:
    encoder = model.encoder
    positions = weights.tensors[POSITIONS]
    prefix = num_prefix_positions(encoder)
    grid: tuple[int, int] = tuple(encoder.patch_embed.grid_size)
    table = weights.position_grid or sincos_grid(positions, prefix, weights.grid)
    if model.fixed_positions:
        if table is None:
            raise UserError(
                f"{source} has learned positions, which model.pos_embed=sincos would throw away; "
                f"use model.pos_embed=learned"
            )
        if table != model.position_grid:
            notes.append(
                f"the sin-cos positions count {_show(model.position_grid)} patches, not {_show(table)}; "
                f"model.position_grid={list(table)} keeps the places that the weights know"
            )
        own: Tensor = encoder.pos_embed.detach()
        return own
    num_patches = positions.shape[1] - prefix
    old = weights.grid or table or _square(num_patches, grid, source)
    if old[0] * old[1] != num_patches:
        raise UserError(f"{source} has {num_patches} positions, but its config says {_show(old)} patches")
    if old != grid:
        notes.append(f"the learned positions are resampled from {_show(old)} to {_show(grid)} patches")
    return resampled_pos_embed(positions.float(), grid, old, prefix)


def _square(num_patches: int, grid: tuple[int, int], source: str) -> tuple[int, int]:
    """The square grid of learned positions that come without one."""
    side = math.isqrt(num_patches)
    square = side * side == num_patches
    if num_patches == grid[0] * grid[1] and not square:
        return grid
    if not square or (num_patches == grid[0] * grid[1] and grid != (side, side)):
        raise UserError(
            f"{source} has {num_patches} learned positions and nothing says of which grid; name a run "
            f"folder or the folder of an export, which say it"
        )
    return side, side


def _decoder(tensors: dict[str, Tensor], expected: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors with a decoder that fits: theirs, theirs but for the last projection, or the new one."""
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


def _show(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
