"""The model card of an export: what it is, what it saw, how to load it.

The model card of an exported classifier.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

import yaml

from etpp_ssl import __version__
from etpp_ssl.config import show_size
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import EVALUATION_FILE, RunFolder

CARD = """---
library_name: {library}
license: {license}
tags:
- image-feature-extraction
- self-supervised
- masked-autoencoder
---

# {title}

An image encoder, pre-trained by etpp_ssl {version} as a masked autoencoder under the `{curriculum}`
curriculum: {budget}, {step:,} optimizer steps. {contents}

{final_norm}

## Load

{load}

## Data

{data}{origin}

Input: {in_chans} channels of {size} px, scaled to [0, 1], mean {mean}, standard deviation {std}.

## Limits

Self-supervised features reflect the data they come from, its biases included. Nothing was measured on
other data than what the run's own log says.

## Recipe

```yaml
{recipe}```
"""

ORIGIN = """

Training went on from other weights, `{init}`: their data and their licence count here too."""


def final_norm(recipe: Recipe) -> str:
    """Where the encoder's final norm comes from, as one sentence.

    A decoder that reads the encoder's blocks never sees the norm behind them, so nothing trains it.
    """
    if not recipe.model.decoder.reads_blocks:
        return "Its final norm was trained with it: the decoder read its output."
    values = "weight 1 and bias 0" if recipe.init is None else f"as it was in `init: {recipe.init}`"
    return (
        f"Its final norm is not trained ({values}): the decoder read the blocks before it; fine-tune it, or "
        f"pool without it."
    )


def model_card(
    recipe: Recipe, step: int, license_name: str, *, library: str, contents: str, load: str
) -> str:
    """A card in the Hugging Face hub's format (Markdown with YAML front matter).

    Args:
        recipe: the run.
        step: optimizer steps of the exported checkpoint.
        license_name: as the hub spells it.
        library: that opens the export, likewise.
        contents: what is in it and what is not, in whole sentences.
        load: how to open it, as Markdown.
    """
    mean, std = recipe.data.statistics(recipe.in_chans)
    data = recipe.data.description or (
        f"A `{recipe.data.name}` data set; its recipe describes it no further (`data.description`)."
    )
    return CARD.format(
        license=license_name,
        library=library,
        contents=contents,
        load=load,
        origin=ORIGIN.format(init=recipe.init) if recipe.init is not None else "",
        title=f"{recipe.model.name}, MAE, {show_size(recipe.size)} px",
        version=__version__,
        curriculum=recipe.curriculum.name,
        budget=(
            f"{recipe.budget_epochs:g} equivalent epochs"
            if recipe.budget_epochs is not None
            else f"{recipe.budget_hours:g} hours"
        ),
        step=step,
        final_norm=textwrap.fill(final_norm(recipe), 103),
        in_chans=recipe.in_chans,
        data=data,
        size=show_size(recipe.size),
        mean=list(mean),
        std=list(std),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


CLASSIFIER_CARD = """---
library_name: timm
pipeline_tag: image-classification
license: {license}
tags:
- image-classification
- timm
---

# {title}

An image classifier, {origin}, by etpp_ssl {version} under the `{curriculum}`
curriculum: {budget:g} equivalent epochs, {step:,} optimizer steps. {weights}

## Load

```python
{imports}import timm
import torch

model = timm.create_model("local-dir:/path/to/this/folder", pretrained=True).eval()
config = timm.data.resolve_data_config({{}}, model=model)  # size, mean, std and interpolation
with torch.inference_mode():
    logits = model(torch.zeros(1, {in_chans}, {size[0]}, {size[1]}))
names = model.pretrained_cfg["label_names"]
```

## Accuracy

{accuracy}

## Data

{data}

Input: {in_chans} channels of {shown_size} px, scaled to [0, 1], mean {mean}, standard deviation {std}.

## Classes

By output:

{classes}

## Recipe

```yaml
{recipe}```
"""
LABELS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "eval_loss": "loss (nats)",
    "mean_recall": "mean recall of the classes (%)",
    "calibration_error": "calibration error",
    "num_images": "images",
    "num_unreadable": "images that could not be read",
}


def classifier_card(
    recipe: FinetuneRecipe,
    run: RunFolder,
    step: int,
    license_name: str,
    *,
    classes: list[str],
    averaged: bool,
    module: str | None,
) -> str:
    """A card in the Hugging Face hub's format (Markdown with YAML front matter).

    Args:
        recipe: the run.
        run: its folder, where numbers of the exported step are looked for.
        step: optimizer steps of the exported checkpoint.
        license_name: as the hub spells it.
        classes: names, in the order of the outputs.
        averaged: whether the weights are the moving average.
        module: to import before timm knows the model, or None.
    """
    mean, std = recipe.data.statistics(recipe.in_chans)
    return CLASSIFIER_CARD.format(
        license=license_name,
        title=f"{recipe.model.name}, {len(classes)} classes, {show_size(recipe.size)} px",
        origin=f"fine-tuned from `{recipe.init}`" if recipe.init else "trained from scratch on labels",
        version=__version__,
        curriculum=recipe.curriculum.name,
        budget=recipe.budget_epochs,
        step=step,
        weights=(
            "The weights are their moving average." if averaged else "The weights are those of the last step."
        ),
        imports=f"import {module}  # registers a model that timm lacks\n" if module else "",
        in_chans=recipe.in_chans,
        size=recipe.size,
        shown_size=show_size(recipe.size),
        accuracy=accuracy(run, step),
        data=recipe.data.description
        or f"A `{recipe.data.name}` data set; its recipe describes it no further (`data.description`).",
        mean=list(mean),
        std=list(std),
        # Indented, so that no letter of a name is read as markup.
        classes="\n".join(f"    {index} {name}" for index, name in enumerate(classes)),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def accuracy(run: RunFolder, step: int) -> str:
    """What was measured at a step, as Markdown: by `etpp evaluate`, or else at the end of training."""
    numbers, protocol = _evaluated(run, step)
    if not numbers:
        return "Nothing was measured of these weights; `etpp evaluate RUN` does it."
    lines = [
        f"| {label} | {numbers[key]:.6g} |" for key, label in LABELS.items() if numbers.get(key) is not None
    ]
    how = ", ".join(f"{key} {value}" for key, value in protocol.items())
    table = "\n".join(["| | |", "|---|---|", *lines])
    return f"{table}\n\nMeasured at {how}."


def _evaluated(run: RunFolder, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers and protocol, both empty where there are none of this step."""
    file = run.evaluation_folder / EVALUATION_FILE
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["protocol"].get("step") == step:
            return found["numbers"], found["protocol"]
    for row in reversed(run.metrics()):
        if row.get("step") == step and "top1" in row:
            return row, {"step": step}
    return {}, {}
