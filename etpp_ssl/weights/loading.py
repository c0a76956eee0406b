"""Weights into a model: those that a run has trained, or those that a new run starts from (`init`).

`init` points at a run, at the folder of an export, or at a file of ours or of others. A masked autoencoder
may start from one of another resolution, patch size, channels or decoder: every rule of that is one function,
here or in `etpp_ssl.weights.tensors`. Loading tells, line by line, what was loaded, converted, dropped and
initialised anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError, as_pair
from etpp_ssl.files import read_text
from etpp_ssl.model.encoders import VIT_DIMS, encoder_of
from etpp_ssl.model.lora import merged, plain_tensors, without_adapters
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.patches import grid_of
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.weights.adapt_classifier import adapt_classifier, position_conversion
from etpp_ssl.weights.architecture import architecture_of, licence_of
from etpp_ssl.weights.layouts import Weights, in_timm_names, recognise
from etpp_ssl.weights.reading import (
    FILES_OF_A_FOLDER,
    load_weights,
    read_state_dict,
    require_finite,
    weights_in,
)
from etpp_ssl.weights.tensors import (
    UNSET_POSITIONS,
    adapt_input,
    adapt_patch,
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
        if name in tensors.keys() & expected.keys() and is_resizable(tensors[name], expected[name])
    }
    if POSITIONS in tensors and POSITIONS not in expected:
        raise UserError(
            f"{source} has absolute positions (pos_embed), and the model has rotary ones alone"
            f"{_hint(weights, source)}"
        )
    try:
        load_weights(expected, {**tensors, **converted}, source)
    except UserError as error:
        raise UserError(f"{error}{_hint(weights, source)}") from error
    encoder = encoder_of(model.encoder)
    check_heads(weights.num_heads, encoder.num_heads, model.encoder.embed_dim, source, notes)
    projection = adapt_input(tensors[PROJECTION], expected[PROJECTION].shape[1], source, notes)
    tensors[PROJECTION] = adapt_patch(projection, model.patch_size, notes)
    if POSITIONS in expected:
        tensors[POSITIONS] = _positions(weights, model, source, notes)
    known = weights.decoder_position_grid
    kept = any(tensors[name] is weights.tensors.get(name) for name in tensors if name.startswith("decoder."))
    # For fixed positions the encoder's note says it.
    if kept and known is not None and known != model.position_grid and not model.fixed_positions:
        notes.append(_counts("decoder's", model, known))
    return load_weights(expected, tensors, source), notes


def _hint(weights: Weights, source: str) -> str:
    """The network that the weights are of, as the end of a message; nothing where they do not tell it."""
    try:
        keys = architecture_of(weights, source).keys
    except UserError:
        return ""
    told = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return f"; the weights are those of model={{{told}}}, which a recipe without model.name takes from them"


def _norm_of_tokens(tensors: dict[str, Tensor], notes: list[str]) -> None:
    """Turn a classifier's norm after the pooling into the norm of every token."""
    if "encoder.norm.weight" in tensors or "encoder.fc_norm.weight" not in tensors:
        return
    for part in ("weight", "bias"):
        tensors[f"encoder.norm.{part}"] = tensors.pop(f"encoder.fc_norm.{part}")
    notes.append("the norm after its pooling (fc_norm) becomes the norm of every token")


def _positions(weights: Weights, model: MaskedAutoencoder, source: str, notes: list[str]) -> Tensor:
    encoder = encoder_of(model.encoder)
    positions = weights.tensors[POSITIONS]
    own: Tensor = encoder.net.pos_embed.detach()
    prefix, old = encoder.num_prefix_positions, weights.grid_of(weights.tensors[PROJECTION])
    if not model.fixed_positions:
        return position_conversion(weights, own, encoder.grid, prefix, source, old)(positions, notes)
    if positions.shape[1] > prefix and not positions.any():
        notes.append(f"its positions {UNSET_POSITIONS}")
        return own
    table = sincos_table(positions, prefix, old)
    counted = weights.position_grid or (table.position_grid if table else None)
    if counted is None:
        raise UserError(
            f"{source} has learned positions, which model.pos_embed=sincos would throw away; "
            f"use model.pos_embed=learned"
        )
    if counted != model.position_grid:
        notes.append(_counts("sin-cos", model, counted))
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
    why = "init has none" if not theirs else "its own is of another size"
    notes.append(f"the decoder is initialised anew: {why}")
    return {**rest, **ours}


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


MAX_CONFIG_BYTES = 1 << 20


def load_trained(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights: their moving average where the run keeps one, with adapters merged.

    Args:
        model: of the checkpoint's recipe; changed in place. Its adapters become plain layers.
        checkpoint: for instance from `RunFolder.trained`, which finds a run's newest.

    Raises:
        UserError: if it is of another model, or gone: an active run removes its old ones.
    """
    try:
        tensors = checkpoint.average() or checkpoint.model()
    except OSError as error:
        raise UserError(f"checkpoint {str(checkpoint.path)!r} cannot be read: {error}") from error
    source = f"checkpoint {checkpoint.path}"
    without_adapters(model)
    model.load_state_dict(load_weights(model.state_dict(), merged(tensors, source), source))


def load_init(model: MaskedAutoencoder, init: str, say: Callable[[str], None]) -> str | None:
    """Start a masked autoencoder from other weights, as far as they fit; see `etpp_ssl.weights.loading`.

    Args:
        model: freshly initialised; changed in place.
        init: a run folder (all of the model), the folder of an export, or a `.pth` or safetensors file
            in one of the layouts of `etpp_ssl.weights.layouts`.
        say: told what was loaded, converted, dropped and initialised anew, a line each.

    Returns:
        What is to be said of the licence of the weights; see `licence_of`.

    Raises:
        UserError: if there is nothing to read, it is refused, or it is of another model.
    """

    def adapt(weights: Weights, source: str) -> tuple[dict[str, Tensor], list[str]]:
        return adapt_weights(weights, model, source)

    return _load_adapted(model, init, recognise, adapt, say)


def load_classifier_init(
    net: nn.Module, init: str, say: Callable[[str], None], *, keep_head: bool = True
) -> str | None:
    """Start a classifier from other weights, as far as they fit; see `etpp_ssl.weights.adapt_classifier`.

    Args:
        net: a freshly initialised timm model at base resolution; changed in place.
        init: the folder of a pre-training or fine-tuning run, the folder of an export, or a `.pth` or
            safetensors file in timm's names or another layout of `etpp_ssl.weights.layouts`.
        say: told what was loaded, converted, dropped and initialised anew, a line each.
        keep_head: keep a head of as many classes. Say no where they are not the same classes.

    Raises:
        UserError: if there is nothing to read, it is refused, or it is of another network.
    """

    def adapt(weights: Weights, source: str) -> tuple[dict[str, Tensor], list[str]]:
        return adapt_classifier(weights, net, source, keep_head=keep_head)

    return _load_adapted(net, init, partial(in_timm_names, wanted=plain_tensors(net).keys()), adapt, say)


def _load_adapted(
    model: nn.Module,
    init: str,
    name: Callable[[Mapping[str, Tensor], str], Weights],
    adapt: Callable[[Weights, str], tuple[dict[str, Tensor], list[str]]],
    say: Callable[[str], None],
) -> str | None:
    """Read `init`, give its tensors the names of `model`, convert and load them; what `licence_of` says."""
    source = f"init {init!r}"
    found = read_init(init, say)
    named = name(found.tensors, source)
    weights = replace(
        found,
        tensors=named.tensors,
        layout=found.layout or named.layout,
        notes=(*found.notes, *named.notes),
        activation=found.activation or named.activation,
        decoder_position_grid=found.decoder_position_grid or named.decoder_position_grid,
    )
    tensors, notes = adapt(weights, source)
    # Adapters are not part of them, and stay as they start.
    model.load_state_dict({**model.state_dict(), **tensors})
    for line in (f"{source} is {weights.layout}", *notes):
        say(line)
    # A run of ours knows what it started from; its own weights have no other's licence.
    return found.licence if found.layout else licence_of(weights)


def read_init(init: str, say: Callable[[str], None]) -> Weights:
    """The weights that `init` points at, under the names that they have there.

    Args:
        init: a run folder, the folder of an export, or a `.pth` or safetensors file.
        say: told of damaged checkpoints that are passed over.

    Returns:
        Tensors, and what is known beside them; `layout` names a run and its step, and is empty otherwise.

    Raises:
        UserError: if there is nothing to read or it is refused.
    """
    path = Path(init).expanduser()
    notes: list[str] = []
    try:
        if os.path.isfile(path / "recipe.yaml"):
            return _of_run(RunFolder(path), say)
        if not os.path.isdir(path):
            return Weights(read_state_dict(path, notes), notes=tuple(notes))
        file = weights_in(path)
        if file is None:
            raise UserError(f"a folder without recipe.yaml and without {' or '.join(FILES_OF_A_FOLDER)}")
        tensors = read_state_dict(file, notes)
        return _with_config(Weights(tensors, notes=tuple(notes)), path / "config.json")
    except UserError as error:
        raise UserError(f"init {init!r}: {error}") from error


def _of_run(run: RunFolder, say: Callable[[str], None]) -> Weights:
    checkpoint = run.trained(say)
    source = f"checkpoint {str(checkpoint.path)!r}"
    tensors = merged(checkpoint.average() or checkpoint.model(), source)
    require_finite(tensors, source)
    recipe = run.any_recipe()
    if isinstance(recipe, FinetuneRecipe):
        _, args = recipe.model.timm_args(recipe.size, recipe.in_chans, num_classes=1)
        which = "averaged weights (EMA)" if checkpoint.has_average else "checkpoint"
        return Weights(
            tensors,
            f"a fine-tuning run's {which} of step {checkpoint.step}",
            image_size=recipe.size,
            num_heads=_one_number(args.get("num_heads")),
            network={**recipe.model.given_dims(), "name": recipe.model.name},
            licence=recipe.init_licence,
        )
    _, args = recipe.model.encoder_args(recipe.size, recipe.in_chans)
    counted = recipe.model.position_grid or grid_of(recipe.size, recipe.patch_size)
    return Weights(
        tensors,
        f"a run's checkpoint of step {checkpoint.step}",
        image_size=recipe.size,
        num_heads=args["num_heads"],
        network={**recipe.model.given_dims(), "name": recipe.model.name},
        licence=recipe.init_licence,
        position_grid=counted if recipe.model.pos_embed == "sincos" else None,
        decoder_position_grid=counted,
    )


def _with_config(weights: Weights, config_file: Path) -> Weights:
    """What a folder of timm or transformers says beside the tensors: sizes, heads, activation, name."""
    try:
        config: Any = json.loads(read_text(config_file, MAX_CONFIG_BYTES))
        config = config.get("vision_config") or config
        args = config.get("model_args") or {}
        size = args.get("img_size") or config.get("image_size")
        if size is None and "pretrained_cfg" in config:
            size = config["pretrained_cfg"]["input_size"][1:]
        height, width = (None, None) if size is None else as_pair(size)
        network = {}
        if isinstance(config.get("architecture"), str):
            renamed = {"num_reg_tokens": "reg_tokens"}
            given = {renamed.get(key, key): value for key, value in args.items()}
            network = {key: given[key] for key in VIT_DIMS if key in given} | {"name": config["architecture"]}
        return replace(
            weights,
            image_size=None if height is None or width is None else (int(height), int(width)),
            num_heads=_one_number(args.get("num_heads") or config.get("num_attention_heads")),
            network=network,
            activation=config.get("hidden_act"),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        # A config of another program; the tensors must do.
        return weights


def _one_number(num_heads: Any) -> int | None:
    """The number of heads, unless it is a pyramid's list with one number per stage."""
    return num_heads if isinstance(num_heads, int) else None
