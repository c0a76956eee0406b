"""The model card of an export: what it is, what it saw, how to load it."""

from __future__ import annotations

import textwrap

import yaml

from etpp_ssl import __version__
from etpp_ssl.config import show_size
from etpp_ssl.recipe import Recipe

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
