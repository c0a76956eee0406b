"""A run's encoder, or its classifier, as a folder that stock timm loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from etpp_ssl.config import UserError
from etpp_ssl.export.card import final_norm, model_card
from etpp_ssl.export.classifier import export_classifier, refuse_classifier
from etpp_ssl.export.folder import CARD_FILE, TrainedModel, contiguous, export_folder
from etpp_ssl.files import replaced, write_json
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import MODEL_FILE, RunFolder

MARKER = "config.json"
LOAD = """```python
import timm
import torch

model = timm.create_model("local-dir:/path/to/this/folder", pretrained=True).eval()
config = timm.data.resolve_data_config({{}}, model=model)  # size, mean, std and interpolation
with torch.inference_mode():
    features = model(torch.zeros(1, {in_chans}, {size[0]}, {size[1]}))  # (1, {pooled})
```

Pass `num_classes=N` to put a new classifier on it. For other image sizes pass `img_size=...` or
`dynamic_img_size=True`: timm resamples the position embedding."""


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
    own extraction gives, to the last bit. The decoder stays behind. For a run that trains a classifier see
    `etpp_ssl.export.classifier.export_classifier`.

    Args:
        run_dir: a run with at least one checkpoint; the newest whole one is taken.
        out: the folder to write; by default `RUN/export/timm`. An earlier export there is replaced.
        pool: cls token or mean of the patch tokens; None is the encoder's own.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints, and of a final norm that nothing trained.

    Returns:
        The folder.

    Raises:
        UserError: if there is no run, no checkpoint, `out` holds something else, or `pool` is given for a
            classifier.
    """
    run = RunFolder(run_dir)
    any_recipe = run.any_recipe()
    if isinstance(any_recipe, FinetuneRecipe):
        if pool is not None:
            refuse_classifier(any_recipe, f"--pool {pool}")
        return export_classifier(run, any_recipe, out, license_name=license_name, say=say)
    trained = TrainedModel.read(run_dir, say)
    folder = export_folder(trained.run, out, "timm", MARKER)
    recipe, encoder = trained.recipe, trained.model.encoder
    if pool == "token" and not encoder.has_class_token:
        raise UserError("the encoder has no cls token to pool; use avg")
    if recipe.model.decoder.reads_blocks:
        say(f"about the exported encoder: {final_norm(recipe)}")
    card = model_card(
        recipe,
        trained.step,
        license_name,
        library="timm",
        contents="It has no classifier. The decoder of pre-training is not part of it.",
        load=LOAD.format(in_chans=recipe.in_chans, size=recipe.size, pooled=encoder.num_features),
    )
    with replaced(folder) as aside:
        save_file(contiguous(encoder.state_dict()), aside / MODEL_FILE, metadata={"format": "pt"})
        config = timm_config(recipe, encoder.num_features, pool or encoder.global_pool)
        write_json(aside / MARKER, config)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
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
