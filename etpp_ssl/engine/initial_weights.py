"""Weights that a new run starts from: `init`, be it a run, an export or somebody else's file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from etpp_ssl.config import UserError, as_pair
from etpp_ssl.model.adapt import adapt_weights
from etpp_ssl.model.interop import Weights, read_weights
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.patches import grid_of
from etpp_ssl.run_folder import MODEL_FILE, RunFolder

FILES_OF_A_FOLDER = (MODEL_FILE, "model.pth")
"""What exports write."""


def load_init(model: MaskedAutoencoder, init: str, say: Callable[[str], None]) -> None:
    """Start a model from other weights, as far as they serve; see `etpp_ssl.model.adapt`.

    Args:
        model: freshly initialised; changed in place.
        init: a run folder (all of the model), the folder of an export, or a `.pth` or safetensors file
            in one of the layouts of `etpp_ssl.model.interop`.
        say: told what was loaded, converted, dropped and initialised anew.

    Raises:
        UserError: if there is nothing to read, it is refused, or it is of another model.
    """
    source = f"init {init!r}"
    try:
        weights = _weights_at(Path(init).expanduser(), say)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    state, notes = adapt_weights(weights, model, source)
    model.load_state_dict(state)
    for line in (f"{source} is {weights.layout}", *notes):
        say(line)


def _weights_at(path: Path, say: Callable[[str], None]) -> Weights:
    if (path / "recipe.yaml").is_file():
        return _weights_of_run(RunFolder(path), say)
    if not path.is_dir():
        return read_weights(path)
    files = [path / name for name in FILES_OF_A_FOLDER if (path / name).is_file()]
    if not files:
        raise UserError(f"a folder without recipe.yaml and without {' or '.join(FILES_OF_A_FOLDER)}")
    return _with_config(read_weights(files[0]), path / "config.json")


def _weights_of_run(run: RunFolder, say: Callable[[str], None]) -> Weights:
    checkpoint, recipe = run.trained(say), run.recipe()
    _, args = recipe.model.encoder_args(recipe.size, recipe.in_chans)
    grid, fixed = grid_of(recipe.size, recipe.patch_size), recipe.model.pos_embed == "sincos"
    return Weights(
        checkpoint.model(),
        f"a run's checkpoint of step {checkpoint.step}",
        grid=grid,
        num_heads=args["num_heads"],
        position_grid=(recipe.model.position_grid or grid) if fixed else None,
    )


def _with_config(weights: Weights, config_file: Path) -> Weights:
    """What a folder of timm or transformers says beside the tensors: grid and number of heads."""
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        if "model_args" in config:
            args = config["model_args"]
            size, heads = args["img_size"], args["num_heads"]
        else:
            args = config
            size, heads = args["image_size"], args["num_attention_heads"]
        (height, width), (p, q) = as_pair(size), as_pair(args["patch_size"])
        return replace(weights, grid=(height // p, width // q), num_heads=int(heads))
    except (OSError, ValueError, KeyError, TypeError):
        # Another's folder: the tensors have to do.
        return weights
