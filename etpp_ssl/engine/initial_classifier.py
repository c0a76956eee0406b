"""Weights that fine-tuning starts from: `init`, be it a run, an export or somebody else's file."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from etpp_ssl.engine.stored_weights import read_stored
from etpp_ssl.model.adapt_classifier import adapt_classifier
from etpp_ssl.model.classifier_layouts import in_timm_names


def load_classifier_init(
    net: nn.Module, init: str, say: Callable[[str], None], *, keep_head: bool = True
) -> None:
    """Start a classifier from other weights, as far as they serve; see `etpp_ssl.model.adapt_classifier`.

    Args:
        net: a freshly initialised timm model at base resolution; changed in place.
        init: the folder of a pre-training or fine-tuning run, the folder of an export, or a `.pth` or
            safetensors file in timm's names or a layout of `etpp_ssl.model.classifier_layouts`.
        say: told what was loaded, converted, dropped and initialised anew, a line each.
        keep_head: take over a head of as many classes. Say no where they are not the same classes.

    Raises:
        UserError: if there is nothing to read, it is refused, or it is of another network.
    """
    source = f"init {init!r}"
    stored = read_stored(init, say)
    weights = stored.told(in_timm_names(stored.tensors, source))
    state, notes = adapt_classifier(weights, net, source, keep_head=keep_head)
    net.load_state_dict(state)
    for line in (f"{source} is {weights.layout}", *notes):
        say(line)
