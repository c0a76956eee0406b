"""The model card of an export: what it is, what it was trained on, how to load it."""

from __future__ import annotations

import textwrap
from pathlib import Path
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
{{- " fine-tuned from `" ~ init ~ "`," if init else " trained from scratch on labels," }} by
{%- else %}
An image encoder, pre-trained as a masked autoencoder by
{%- endif %}
 etpp_ssl {{ version }} under the `{{ recipe.curriculum.name }}`
curriculum: {{ budget }}, {{ "{:,}".format(step) }} optimizer steps. {{ contents }}
{% if final_norm %}

{{ final_norm }}
{% endif %}
{% if start_kept %}

Training had made it worse on the holdout, images that it never saw: these are the weights that it began with.
{% endif %}

## Load

{{ load }}

## Results

{{ results }}

## Data

{{ data }}
{% if init %}

Training started from other weights, `{{ init }}`: their data and their licence count here, too.
{% if recipe.init_licence %}
{{ recipe.init_licence }}
{% endif %}
{% endif %}

Input: {{ recipe.in_chans }} channels of {{ size }} px, {{ values }}, mean {{ mean }}, standard deviation {{ std }}.
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
    "macro_top1": "macro top-1, the mean of the classes' recalls (%)",
    "top5": "top-5 (%)",
    "eval_loss": "loss (nats)",
    # Until version 0.5.
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
    published = _without_places(recipe.model_dump(mode="json"))
    init = published["init"]
    norm = "" if isinstance(recipe, FinetuneRecipe) else final_norm(recipe.model.decoder.reads_blocks, init)
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
        start_kept=any(row.get("start_kept") for row in run.metrics() if row["step"] == checkpoint.step),
        init=init,
        results=results(run, checkpoint.step),
        data=recipe.data.description
        or f"A `{recipe.data.name}` data set; its recipe does not describe it further (`data.description`).",
        values=recipe.data.reading(recipe.in_chans).described(),
        mean=list(mean),
        std=list(std),
        # Indented in the card, so that no letter of a name is read as markup.
        classes=classes,
        recipe_text=dump_yaml(published),
    )
    return card


def _without_places(value: Any) -> Any:
    """A recipe's values with the names of files and folders in place of their places on this machine."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    is_place = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(value).name if is_place else value


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


def results(run: RunFolder, step: int) -> str:
    """What was measured of a step's weights, as Markdown: by later commands, or else during training.

    Numbers on images that the weights were trained on are not results, and are left out.
    """
    parts = []
    for numbers, how, data in _classified(run, step) or _probed(run, step):
        lines = [
            f"| {LABELS.get(key, key)} | {value:.6g} |" for key, value in numbers.items() if value is not None
        ]
        on = f", on {in_words(data, whole_path=False)}" if data else ""
        parts.append("\n".join(["| | |", "|---|---|", *lines, "", f"Measured at {how}{on}."]))
    if parts:
        return "\n\n".join(parts)
    command = "evaluate" if isinstance(run.any_recipe(), FinetuneRecipe) else "probe"
    return (
        f"Nothing was measured with these weights on images that they were not trained on; "
        f"`etpp {command} RUN` does it."
    )


_Result = tuple[dict[str, Any], str, dict[str, Any] | None]
"""Numbers, the settings that they are of, and the images."""


def _classified(run: RunFolder, step: int) -> list[_Result]:
    """A classifier's results, by `etpp evaluate` or else at the end of training."""
    found: list[_Result] = []
    for evaluation in run.evaluations():
        protocol, data = evaluation["protocol"], evaluation.get("data")
        if protocol.get("step") == step and not _of_training(protocol.get("split"), data):
            settings = {key: value for key, value in protocol.items() if key != "split" or data is None}
            found.append((_labelled(evaluation["numbers"]), _in_words(settings), data))
    recipe = run.any_recipe()
    rows = [row for row in run.metrics() if row.get("step") == step and "top1" in row]
    if rows and not found and isinstance(recipe, FinetuneRecipe):
        data = rows[-1].get("data")
        if not _of_training(recipe.evaluate.split, data):
            found.append((_labelled(rows[-1]), f"step {step}", data))
    return found


def _probed(run: RunFolder, step: int) -> list[_Result]:
    """Results of probes, by `etpp probe` and at the end of training."""
    recipe = run.any_recipe()
    own = {} if isinstance(recipe, FinetuneRecipe) else recipe.probe.model_dump()
    rows = [{**row, "protocol": own} for row in run.metrics() if "probe_seconds" in row]
    found: dict[str, _Result] = {}
    for row in (*rows, *run.later_probes()):
        data = row.get("data")
        if row.get("step") == step and not training_mark(data):
            numbers = {
                key: value
                for key, value in row.items()
                if isinstance(value, int | float) and key not in ("step", "probe_seconds")
            }
            settings = {key: value for key, value in row["protocol"].items() if value is not None}
            how = _in_words({"step": step, **settings})
            found[f"{how} {data}"] = (numbers, how, data)
    return list(found.values())


def _labelled(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: numbers.get(key) for key in LABELS}


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _of_training(split: object, data: dict[str, Any] | None) -> bool:
    """Whether a number is of training images, some of them included; up to 0.5 the split alone says so."""
    return split == "train" if data is None else bool(training_mark(data))
