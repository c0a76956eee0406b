"""The model card of an export: what it is, what it saw, how to load it."""

from __future__ import annotations

import yaml

from etpp_ssl import __version__
from etpp_ssl.config import show_size
from etpp_ssl.recipe import Recipe

CARD = """---
library_name: timm
license: {license}
tags:
- image-feature-extraction
- self-supervised
- masked-autoencoder
---

# {title}

An image encoder, pre-trained by etpp_ssl {version} as a masked autoencoder under the `{curriculum}`
curriculum: {budget}, {step:,} optimizer steps. It has no classifier. The decoder
of pre-training is not part of it.

## Load

```python
import timm
import torch

model = timm.create_model("local-dir:/path/to/this/folder", pretrained=True).eval()
config = timm.data.resolve_data_config({{}}, model=model)  # size, mean, std and interpolation
with torch.inference_mode():
    features = model(torch.zeros(1, {in_chans}, {height}, {width}))  # (1, {pooled})
```

Pass `num_classes=N` to put a new classifier on it. For other image sizes pass `img_size=...` or
`dynamic_img_size=True`: timm resamples the position embedding.

## Data

{data}

Input: {in_chans} channels of {size} px, scaled to [0, 1], mean {mean}, standard deviation {std}.

## Limits

Self-supervised features reflect the data they come from, its biases included. Nothing was measured on
other data than what the run's own log says.

## Recipe

```yaml
{recipe}```
"""


def model_card(recipe: Recipe, step: int, num_features: int, license_name: str) -> str:
    """A card in the Hugging Face hub's format (Markdown with YAML front matter)."""
    mean, std = recipe.data.statistics(recipe.in_chans)
    data = recipe.data.description or (
        f"A `{recipe.data.name}` data set; its recipe describes it no further (`data.description`)."
    )
    return CARD.format(
        license=license_name,
        title=f"{recipe.model.name}, MAE, {show_size(recipe.size)} px",
        version=__version__,
        curriculum=recipe.curriculum.name,
        budget=(
            f"{recipe.budget_epochs:g} equivalent epochs"
            if recipe.budget_epochs is not None
            else f"{recipe.budget_hours:g} hours"
        ),
        step=step,
        in_chans=recipe.in_chans,
        height=recipe.size[0],
        width=recipe.size[1],
        pooled=num_features,
        data=data,
        size=show_size(recipe.size),
        mean=list(mean),
        std=list(std),
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )
