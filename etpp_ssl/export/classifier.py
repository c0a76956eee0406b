"""A run's classifier as a folder that stock timm loads, class names included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.export.card import classifier_card
from etpp_ssl.export.folder import CARD_FILE, contiguous, export_folder
from etpp_ssl.files import replaced, write_json
from etpp_ssl.model.classifier import Classifier
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import MODEL_FILE, Checkpoint, RunFolder
from etpp_ssl.weights.loading import load_trained

MARKER = "config.json"


def export_classifier(
    run: RunFolder,
    recipe: FinetuneRecipe,
    out: str | Path | None,
    *,
    license_name: str,
    say: Callable[[str], None],
) -> Path:
    """Write `model.safetensors`, timm's `config.json` and a model card.

    `timm.create_model("local-dir:" + str(folder), pretrained=True)` then gives the logits of our
    classifier in eval mode, to the last bit. The weights are the moving average where the run keeps one.

    Args:
        run: a run that trains a classifier, with at least one checkpoint; the newest whole one is taken.
        recipe: its own.
        out: the folder to write; by default `RUN/export/timm`. An earlier export there is replaced.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints, and of what has to be imported before timm knows the model.

    Returns:
        The folder.

    Raises:
        UserError: if there is no checkpoint, or `out` holds something else.
    """
    checkpoint = run.trained(say)
    folder = export_folder(run, out, "timm", MARKER)
    classes = [str(name) for name in checkpoint.state().get("classes") or ()] or None
    num_classes = recipe.num_classes(classes)
    average = checkpoint.average()
    net = _trained_net(recipe, num_classes, checkpoint, average)
    config = classifier_config(recipe, net, num_classes, classes)
    module = module_to_import(config["architecture"])
    if module is not None:
        say(f"timm has no {config['architecture']}: `import {module}` before timm.create_model")
    card = classifier_card(
        recipe,
        run,
        checkpoint.step,
        license_name,
        classes=classes or [],
        averaged=average is not None,
        module=module,
    )
    with replaced(folder) as aside:
        save_file(contiguous(net.state_dict()), aside / MODEL_FILE, metadata={"format": "pt"})
        write_json(aside / MARKER, config)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def classifier_config(
    recipe: FinetuneRecipe, net: nn.Module, num_classes: int, classes: list[str] | None
) -> dict[str, Any]:
    """The `config.json` from which timm rebuilds the classifier.

    Args:
        recipe: the run.
        net: the timm network, as its family's own description is taken over.
        num_classes: outputs.
        classes: their names, or None where the data has none.
    """
    architecture, args = recipe.model.timm_args(recipe.size, recipe.in_chans, num_classes)
    mean, std = recipe.data.statistics(recipe.in_chans)
    family: dict[str, Any] = getattr(net, "default_cfg", {})
    own_size = tuple(family.get("input_size", ())[1:])
    pool = getattr(net, "global_pool", "avg")
    named = {"label_names": classes} if classes else {}
    return {
        "architecture": architecture.split(".")[0],
        "num_classes": num_classes,
        "num_features": net.num_features,
        "global_pool": args.get(
            "global_pool", pool if isinstance(pool, str) else getattr(pool, "pool_type", "avg")
        ),
        **named,
        "model_args": args,
        "pretrained_cfg": {
            "tag": "etpp_ssl",
            "custom_load": False,
            "input_size": [recipe.in_chans, *recipe.size],
            "fixed_input_size": family.get("fixed_input_size", False),
            "interpolation": "bicubic",
            "crop_pct": recipe.data.crop_pct,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": num_classes,
            # That of another input size would be wrong.
            "pool_size": family.get("pool_size") if own_size == recipe.size else None,
            "first_conv": family.get("first_conv"),
            "classifier": family.get("classifier"),
        },
    }


def module_to_import(architecture: str) -> str | None:
    """The module of ours that registers a model which stock timm lacks, or None for timm's own."""
    module = timm.model_entrypoint(architecture).__module__
    return module if module.startswith("etpp_ssl.") else None


def refuse_classifier(recipe: object, wanted: str) -> None:
    """Refuse what can be done with an encoder only.

    Args:
        recipe: of a run of any task.
        wanted: what was asked for, for the message.

    Raises:
        UserError: if the run trains a classifier.
    """
    if isinstance(recipe, FinetuneRecipe):
        raise UserError(
            f"{wanted} is for the encoder of a pre-training run; export a classifier by --to timm"
        )


def _trained_net(
    recipe: FinetuneRecipe, num_classes: int, checkpoint: Checkpoint, average: dict[str, Tensor] | None
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model: Classifier = recipe.build_model(num_classes)
    load_trained(model, checkpoint)
    return model.net
