"""A run's encoder, or its classifier, as a folder that stock timm loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.export.card import CLASSIFIER_TASK, ENCODER_TASK, final_norm, model_card
from etpp_ssl.export.folder import CARD_FILE, contiguous, export_folder, for_encoders_only
from etpp_ssl.files import replaced, save_tensors, write_json
from etpp_ssl.model.class_tokens import num_class_tokens
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import MODEL_FILE, RunFolder
from etpp_ssl.weights.loading import load_trained

MARKER = "config.json"
LOAD = """```python
{imports}import timm
import torch

model = timm.create_model("local-dir:/path/to/this/folder", pretrained=True).eval()
config = timm.data.resolve_data_config({{}}, model=model)  # size, mean, std and interpolation
with torch.inference_mode():
    {output} = model(torch.zeros(1, {shape}))  # (1, {width})
{names}```

transformers opens this folder, too, {after_import}with the same numbers:
`{auto_model}.from_pretrained(...)` with `AutoImageProcessor`, or
`pipeline("{task}", model=...)`; {where}.{advice}"""
NAMES = 'names = model.pretrained_cfg["label_names"]\n'
ADVICE = """

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

    `timm.create_model("local-dir:" + str(folder), pretrained=True)` then gives the features of our own
    extraction, or the logits of our classifier in eval mode, to the last bit. The decoder is not part of it.
    A classifier's weights are their moving average where the run keeps one.

    Args:
        run_dir: a run with at least one checkpoint; the newest whole one is taken.
        out: the folder to write; by default `RUN/export/timm`. An earlier export there is replaced.
        pool: an encoder's cls token or the mean of its patch tokens; None is the encoder's own.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints, of a final norm that nothing trained, and of a module that must be
            imported before timm knows the model.

    Returns:
        The folder.

    Raises:
        UserError: if there is no run or no checkpoint, `out` holds something else, or `pool` does not fit.
    """
    run = RunFolder(run_dir)
    recipe = run.any_recipe()
    classifies = isinstance(recipe, FinetuneRecipe)
    if classifies and pool is not None:
        raise for_encoders_only(f"--pool {pool}")
    checkpoint = run.trained(say)
    folder = export_folder(run, out, "timm", MARKER)
    classes = checkpoint.classes()
    if isinstance(recipe, FinetuneRecipe):
        num_classes = recipe.num_classes(classes or None)
        classifier = freshly_initialised(recipe.seed, lambda: recipe.build_model(num_classes))
        load_trained(classifier, checkpoint)
        net: Any = classifier.net
        if num_class_tokens(net) > 1 and net.global_pool == "token":
            raise UserError(
                f"the classifier reads the mean of {num_class_tokens(net)} class tokens, which stock timm "
                f"cannot pool; etpp_ssl.load and etpp evaluate read the run, and model.global_pool=avg "
                f"trains a classifier that timm has"
            )
        architecture, args = recipe.model.timm_args(recipe.size, recipe.in_chans, num_classes)
        which = "their moving average" if checkpoint.has_average else "those of the last step"
        contents = f"The weights are {which}."
    else:
        model = freshly_initialised(recipe.seed, recipe.build_model)
        load_trained(model, checkpoint)
        net = model.encoder
        if pool == "token" and net.cls_token is None:
            raise UserError("the encoder has no cls token to pool; use avg")
        if recipe.model.decoder.reads_blocks:
            say(f"about the exported encoder: {final_norm(True, recipe.init)}")
        architecture, args = recipe.model.encoder_args(recipe.size, recipe.in_chans)
        args = {**args, "global_pool": pool or net.global_pool}
        contents = "It has no classifier. The decoder of pre-training is not part of it."
        number = num_class_tokens(net)
        if number > 1:
            feature = f"model.forward_features(images)[:, :{number}].mean(dim=1)"
            contents += (
                f" It has {number} class tokens, in timm's names `cls_token` and the first {number - 1} of "
                f"`reg_token`. Their mean is the feature of an image: `{feature}`, as `etpp_ssl.load` "
                f"gives it; timm's own `token` pooling takes the first alone."
            )
            say(f"of {number} class tokens timm pools the first alone; their mean is {feature}")
    module = module_to_import(architecture)
    if module is not None:
        say(f"timm has no {architecture}: `import {module}` before timm.create_model")
    mean, std = recipe.data.statistics(recipe.in_chans)
    input_size = (recipe.in_chans, *recipe.size)
    preprocessing = {
        "input_size": list(input_size),
        "interpolation": "bicubic",
        "crop_pct": recipe.data.crop_pct,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
    }
    values = recipe.data.reading(recipe.in_chans).settings()
    load = LOAD.format(
        imports=f"import {module}  # registers a model that timm lacks\n" if module else "",
        output="logits" if classifies else "features",
        shape=", ".join(map(str, input_size)),
        width=args["num_classes"] or net.num_features,
        names=NAMES if classifies else "",
        after_import=f"after `import {module}`, " if module else "",
        auto_model="AutoModelForImageClassification" if classifies else "AutoModel",
        task=CLASSIFIER_TASK if classifies else ENCODER_TASK,
        where="the classes are in its config" if classifies else "the features are its `pooler_output`",
        advice="" if classifies else ADVICE,
    )
    card = model_card(run, checkpoint, license_name, library="timm", contents=contents, load=load)
    with replaced(folder) as aside:
        save_tensors(contiguous(net.state_dict()), aside / MODEL_FILE, {"format": "pt"})
        write_json(aside / MARKER, timm_config(net, architecture, args, preprocessing, classes, values))
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def timm_config(
    net: nn.Module,
    architecture: str,
    args: dict[str, Any],
    preprocessing: dict[str, Any],
    classes: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `config.json` from which timm rebuilds a network.

    Args:
        net: the network; the description of its family is taken over.
        architecture, args: timm's name and arguments that build it.
        preprocessing: what timm's `pretrained_cfg` says of the images.
        classes: names of the outputs, where they are known.
        values: see `Reading.settings`; timm itself takes no notice of them.
    """
    family: dict[str, Any] = getattr(net, "default_cfg", {})
    same_size = list(family.get("input_size", ()))[1:] == preprocessing["input_size"][1:]
    pool = getattr(net, "global_pool", "avg")
    own_pool = pool if isinstance(pool, str) else getattr(pool, "pool_type", "avg")
    return {
        "architecture": architecture.split(".")[0],
        "num_classes": args["num_classes"],
        "num_features": net.num_features,
        "global_pool": args.get("global_pool", own_pool),
        **({"label_names": list(classes)} if classes else {}),
        **({"values": dict(values)} if values else {}),
        # For `etpp_ssl.load`, as the values; timm takes them for registers.
        **({"class_tokens": num_class_tokens(net)} if num_class_tokens(net) > 1 else {}),
        # transformers passes the number of classes beside these, and takes no argument twice.
        "model_args": {key: value for key, value in args.items() if key != "num_classes"},
        "pretrained_cfg": {
            "tag": "etpp_ssl",
            "custom_load": False,
            **preprocessing,
            "fixed_input_size": family.get("fixed_input_size", False),
            "num_classes": args["num_classes"],
            # That of another input size would be wrong.
            "pool_size": family.get("pool_size") if same_size else None,
            # timm before 1.0.31 would start it anew, without an error, for channels it cannot convert to.
            "first_conv": family.get("first_conv") if preprocessing["input_size"][0] in (1, 3) else None,
            "classifier": family.get("classifier"),
        },
    }


def module_to_import(architecture: str) -> str | None:
    """The module of ours that registers a model which stock timm lacks, or None for timm's own."""
    module = timm.model_entrypoint(architecture.split(".")[0]).__module__
    return module if module.startswith("etpp_ssl.") else None
