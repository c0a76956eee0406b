"""A run's encoder as a folder that stock timm loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from etpp_ssl.config import UserError
from etpp_ssl.export.card import final_norm, model_card
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder, load_weights


def export(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    pool: Literal["token", "avg"] | None = None,
    license_name: str = "other",
    say: Callable[[str], None] = print,
) -> Path:
    """Write `model.safetensors`, timm's `config.json` and a model card.

    `timm.create_model("local-dir:" + str(folder), pretrained=True)` then gives the features that our
    own extraction gives, to the last bit. The decoder stays behind.

    Args:
        run_dir: a run with at least one checkpoint; the newest whole one is taken.
        out: the folder to write; by default `RUN/export/timm`. An earlier export there is replaced.
        pool: cls token or mean of the patch tokens; None is the encoder's own.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints, and of a final norm that nothing trained.

    Returns:
        The folder.

    Raises:
        UserError: if there is no run, no checkpoint, or `out` holds something else.
    """
    run = RunFolder(run_dir)
    recipe = run.recipe()
    checkpoint = run.trained(say)
    folder = Path(out) if out is not None else run.path / "export" / "timm"
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} holds something that is no export; choose another folder")

    with torch.random.fork_rng(devices=[]):
        model = recipe.build_model()
    weights = load_weights(model.state_dict(), checkpoint.model(), f"checkpoint {checkpoint.path}")
    model.load_state_dict(weights)
    encoder = model.encoder
    if pool == "token" and not encoder.has_class_token:
        raise UserError("the encoder has no cls token to pool; use avg")

    config = timm_config(recipe, encoder.num_features, pool or encoder.global_pool)
    card = model_card(recipe, checkpoint.step, encoder.num_features, license_name)
    if recipe.model.decoder.reads_blocks:
        say(f"about the exported encoder: {final_norm(recipe)}")
    aside = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from error
    return folder


def timm_config(recipe: Recipe, num_features: int, pool: str) -> dict[str, Any]:
    """The `config.json` from which timm rebuilds the encoder."""
    architecture, args = recipe.model.encoder_args(recipe.size, recipe.in_chans)
    mean, std = recipe.data.statistics(recipe.in_chans)
    return {
        "architecture": architecture.split(".")[0],
        "num_classes": 0,
        "num_features": num_features,
        "global_pool": pool,
        "model_args": {**args, "global_pool": pool},
        "pretrained_cfg": {
            "tag": "etpp_ssl",
            "input_size": [recipe.in_chans, *recipe.size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": recipe.data.crop_pct,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
