"""Weights that a new pre-training run starts from: `init`, be it a run, an export or somebody else's file."""

from __future__ import annotations

from collections.abc import Callable

from etpp_ssl.engine.stored_weights import read_stored
from etpp_ssl.model.adapt import adapt_weights
from etpp_ssl.model.interop import recognise
from etpp_ssl.model.mae import MaskedAutoencoder


def load_init(model: MaskedAutoencoder, init: str, say: Callable[[str], None]) -> None:
    """Start a model from other weights, as far as they serve; see `etpp_ssl.model.adapt`.

    Args:
        model: freshly initialised; changed in place.
        init: a run folder (all of the model), the folder of an export, or a `.pth` or safetensors file
            in one of the layouts of `etpp_ssl.model.interop`.
        say: told what was loaded, converted, dropped and initialised anew.

    Raises:
        UserError: if there is nothing to read, it is refused, or it is of another model.
    """
    source = f"init {init!r}"
    stored = read_stored(init, say)
    weights = stored.told(recognise(stored.tensors, source))
    state, notes = adapt_weights(weights, model, source)
    model.load_state_dict(state)
    for line in (f"{source} is {weights.layout}", *notes):
        say(line)
