"""The model card of an export: what it is, what it was trained on, how to load it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from jinja2 import StrictUndefined, Template

from etpp_ssl import __version__
from etpp_ssl.config import show_size
from etpp_ssl.evaluation.measured_on import in_words, training_mark
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.recipe_yaml import dump_yaml
from etpp_ssl.run_folder import Checkpoint, RunFolder

CLASSIFIER_TASK, ENCODER_TASK = "image-classification", "image-feature-extraction"
"""The hub's names of what a model is for, which are those of transformers' pipelines."""
CARD = """---
library_name: {{ library }}
pipeline_tag: {{ task }}
license: {{ license }}
tags:
{% for tag in tags %}
- {{ tag }}
{% endfor %}
---

# {{ recipe.model.name }}, {{ kind }}, {{ size }} px

{% if classifies %}
An image classifier,
{{- " fine-tuned from `" ~ recipe.init ~ "`," if recipe.init else " trained from scratch on labels," }} by
{%- else %}
An image encoder, pre-trained as a masked autoencoder by
{%- endif %}
 etpp_ssl {{ version }} under the `{{ recipe.curriculum.name }}`
curriculum: {{ budget }}, {{ "{:,}".format(step) }} optimizer steps. {{ contents }}
{% if final_norm %}

{{ final_norm }}
{% endif %}

## Load

{{ load }}
{% if classifies %}

## Accuracy

{{ accuracy }}
{% endif %}

## Data

{{ data }}
{% if recipe.init and not classifies %}

Training started from other weights, `{{ recipe.init }}`: their data and their licence count here, too.
{% endif %}

Input: {{ recipe.in_chans }} channels of {{ size }} px, scaled to [0, 1], mean {{ mean }}, standard deviation {{ std }}.
{% if classifies %}

## Classes

By output:

{% for name in classes %}
    {{ loop.index0 }} {{ name }}
{% endfor %}
{% else %}

## Limits

Self-supervised features reflect the data they come from, including its biases. Nothing was measured on other
data than what the run's own log says.
{% endif %}

## Recipe

```yaml
{{ recipe_text }}```
"""  # noqa: E501  Lines of the card.
_TEMPLATE = Template(
    CARD, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
LABELS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "eval_loss": "loss (nats)",
    "mean_recall": "mean recall of the classes (%)",
    "calibration_error": "calibration error",
    "num_images": "images",
    "num_unreadable": "images that could not be read",
}


def model_card(
    run: RunFolder, checkpoint: Checkpoint, license_name: str, *, library: str, contents: str, load: str
) -> str:
    """A card in the Hugging Face hub's format (Markdown with YAML front matter).

    Args:
        run: an encoder's or a classifier's; its recipe and its log fill the card.
        checkpoint: the exported one.
        license_name: as the hub spells it.
        library: that opens the export, as the hub spells it.
        contents: what is in the export and what is not, in whole sentences.
        load: how to open it, as Markdown.
    """
    recipe = run.any_recipe()
    classifies = isinstance(recipe, FinetuneRecipe)
    classes = checkpoint.classes()
    mean, std = recipe.data.statistics(recipe.in_chans)
    hours = f"{recipe.budget_hours:g} hours" if recipe.budget_hours is not None else ""
    norm = (
        ""
        if isinstance(recipe, FinetuneRecipe)
        else final_norm(recipe.model.decoder.reads_blocks, recipe.init)
    )
    card: str = _TEMPLATE.render(
        recipe=recipe,
        classifies=classifies,
        library=library,
        license=license_name,
        task=CLASSIFIER_TASK if classifies else ENCODER_TASK,
        tags=[CLASSIFIER_TASK, "timm"]
        if classifies
        else [ENCODER_TASK, "self-supervised", "masked-autoencoder"],
        kind=f"{len(classes)} classes" if classifies else "MAE",
        size=show_size(recipe.size),
        version=__version__,
        budget=hours or f"{recipe.budget_epochs:g} equivalent epochs",
        step=checkpoint.step,
        contents=contents,
        final_norm=textwrap.fill(norm, 103),
        load=load,
        accuracy=accuracy(run, checkpoint.step) if classifies else "",
        data=recipe.data.description
        or f"A `{recipe.data.name}` data set; its recipe does not describe it further (`data.description`).",
        mean=list(mean),
        std=list(std),
        # Indented in the card, so that no letter of a name is read as markup.
        classes=classes,
        recipe_text=dump_yaml(recipe.model_dump(mode="json")),
    )
    return card


def final_norm(reads_blocks: bool, init: str | None) -> str:
    """Where the encoder's final norm comes from, as one sentence.

    Args:
        reads_blocks: whether the decoder reads the encoder's blocks. The norm follows them, so nothing
            trains it then.
        init: of the recipe.
    """
    if not reads_blocks:
        return "Its final norm was trained with it: the decoder read its output."
    values = "weight 1 and bias 0" if init is None else f"as it was in `init: {init}`"
    return (
        f"Its final norm is not trained ({values}): the decoder read the blocks before it; fine-tune it, or "
        f"pool without it."
    )


def accuracy(run: RunFolder, step: int) -> str:
    """What was measured at a step, as Markdown: by `etpp evaluate`, or else at the end of training.

    Numbers on images that the weights were trained on are not results, and are left out.
    """
    parts = []
    for numbers, how in _evaluated(run, step):
        lines = [
            f"| {label} | {numbers[key]:.6g} |"
            for key, label in LABELS.items()
            if numbers.get(key) is not None
        ]
        parts.append("\n".join(["| | |", "|---|---|", *lines, "", f"Measured at {how}."]))
    if parts:
        return "\n\n".join(parts)
    return (
        "Nothing was measured with these weights on images that they were not trained on; "
        "`etpp evaluate RUN` does it."
    )


def _evaluated(run: RunFolder, step: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Numbers, and how they were measured, in words."""
    found = False
    for evaluation in run.evaluations():
        protocol, data = evaluation["protocol"], evaluation.get("data")
        if protocol.get("step") != step or _of_training(protocol.get("split"), data):
            continue
        found = True
        settings = {key: value for key, value in protocol.items() if key != "split" or data is None}
        how = ", ".join(f"{key} {value}" for key, value in settings.items())
        yield evaluation["numbers"], how + (f", on {in_words(data, whole_path=False)}" if data else "")
    rows = [row for row in run.metrics() if row.get("step") == step and "top1" in row]
    if rows and not found:
        data, recipe = rows[-1].get("data"), run.any_recipe()
        split = recipe.evaluate.split if isinstance(recipe, FinetuneRecipe) else None
        if not _of_training(split, data):
            yield rows[-1], f"step {step}" + (f", on {in_words(data, whole_path=False)}" if data else "")


def _of_training(split: object, data: dict[str, Any] | None) -> bool:
    """Whether a number is of training images, some of them included; up to 0.5 the split alone says so."""
    return split == "train" if data is None else bool(training_mark(data))
