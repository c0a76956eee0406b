"""A recipe that names no network takes that of the weights that `init` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from etpp_ssl.model.encoders import EncoderConfig
from etpp_ssl.recipe import Recipe
from etpp_ssl.recipe_base import RunRecipe
from etpp_ssl.recipe_file import RecipeText
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.weights.architecture import architecture_of
from etpp_ssl.weights.layouts import recognise
from etpp_ssl.weights.loading import read_init


def with_network_of_init(text: RecipeText, kind: type[RunRecipe]) -> RecipeText:
    """A recipe without `model.name` with the network of the weights that `init` names.

    What `model` says beside that stands above it. A run that has begun keeps the network that it has, and a
    classifier's recipe takes that of a run by itself, see `FinetuneRecipe.adapted`.

    Args:
        text: of a recipe that is about to be run or planned.
        kind: of recipe.

    Raises:
        UserError: if the weights cannot be read or do not tell their architecture.
    """
    values = text.values(kind)
    init, model, output = values.get("init"), values.get("model", {}), values.get("output")
    if text.stored or not isinstance(init, str) or not isinstance(model, dict) or "name" in model:
        return text
    if not issubclass(kind, Recipe) and RunFolder(Path(init).expanduser()).exists():
        # A classifier's recipe takes more over from a run than its network, and by itself.
        return text
    begun = Path(output).expanduser() / "recipe.yaml" if isinstance(output, str) else Path()
    if begun.is_file():
        theirs = RecipeText.read(begun.parent).values(BaseModel)
        if theirs.get("init") == init and isinstance(theirs.get("model"), dict):
            own = (*EncoderConfig.model_fields, "pos_embed", "position_grid")
            return _with_model(text, {key: theirs["model"][key] for key in own if key in theirs["model"]})
    source = f"init {init!r}"
    found = read_init(init, lambda _: None)
    if "name" in found.network and not issubclass(kind, Recipe):
        # A classifier may be any network of timm.
        return _with_model(text, dict(found.network))
    named = recognise(found.tensors, source)
    activation = found.activation or named.activation
    known = replace(found, tensors=named.tensors, activation=activation)
    architecture = architecture_of(known, source)
    fields = type(kind.model_fields["model"].default).model_fields
    keys = {key: value for key, value in architecture.keys.items() if key in fields}
    shown = ", ".join(f"{key}: {value}" for key, value in keys.items())
    note = f"model.name is not given: {source} is of family {architecture.family}, model={{{shown}}}"
    return replace(_with_model(text, keys), notes=(*text.notes, note, *architecture.notes))


def _with_model(text: RecipeText, keys: dict[str, Any]) -> RecipeText:
    return replace(text, layers=({"model": keys}, *text.layers))
