"""What training scripts put around a model's state dict: keys above it, and words in front of its names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from etpp_ssl.config import UserError, listed

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder")
"""Keys of a moving average of the weights, which is what such scripts evaluate."""
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "student", "encoder")
"""Keys under which training scripts keep the state dict, beside optimizer and arguments."""
_DEEPEST = 4
"""Keys above a state dict; a pickle can hold a mapping that contains itself."""

_INSIDE = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
"""What `torch.compile`, FSDP1 and activation checkpointing insert in front of whatever module they wrap."""
_COUNTER = "n_averaged"
"""Of `torch.optim.swa_utils.AveragedModel`, beside `module.*`."""
_SECOND = re.compile(r"momentum|encoder_k|target|student|ema\b")
"""In the name of the encoder that a method of two encoders does not evaluate."""


def tensors_of(content: Any, notes: list[str]) -> dict[str, Tensor]:
    """The state dict in a loaded checkpoint; empty where there is none.

    Args:
        content: a state dict, or mappings around one, under keys of `AVERAGES` and `WRAPPERS`.
        notes: gets a line if a moving average is taken.
    """
    path, tensors = _found(content, _DEEPEST)
    average = next((key for key in path if key in AVERAGES), None)
    if average is not None:
        above = content
        for key in path[: path.index(average)]:
            above = above[key]
        others = [key for key in (*AVERAGES, *WRAPPERS) if key != average and _found(above.get(key), 2)[1]]
        beside = f", not {' or '.join(map(repr, others))}" if others else ""
        notes.append(f"its moving average, {average!r}, is taken{beside}")
    return _without_inserted(tensors)


def _found(content: Any, depth: int) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The keys above the first state dict in mappings, averages first, and its tensors."""
    if not isinstance(content, Mapping) or not depth:
        return (), {}
    for key in (*AVERAGES, *WRAPPERS):
        path, tensors = _found(content.get(key), depth - 1)
        if tensors:
            return (key, *path), tensors
    return (), {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _without_inserted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrapping modules add to their names, as in `module._orig_mod.`."""
    renamed = {_INSIDE.sub(r"\1", name): value for name, value in tensors.items()}
    if len(renamed) < len(tensors):
        # Two modules of the same name: the file means something else.
        return tensors
    weights = {name: value for name, value in renamed.items() if name != _COUNTER}
    stripped = without_prefix(weights, "module.")
    return _without_inserted(stripped) if stripped and stripped.keys() != weights.keys() else renamed


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with `prefix` removed from their names if all of them have it."""
    if all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def prefix_of(names: Collection[str], wanted: Collection[str], source: str, notes: list[str]) -> str | None:
    """What stands in front of a model's names, such as "backbone." or "module.encoder_q."; often nothing.

    Args:
        names: of the tensors that there are.
        wanted: of the model.
        source: names the weights in the message.
        notes: gets a line if there are several such models and one was taken.

    Returns:
        A prefix, empty or with its dot; None if less than half of the model is there.

    Raises:
        UserError: for several such models of which none is known to be the one to take.
    """
    counts: Counter[str] = Counter()
    for name in names:
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if name[start:] in wanted:
                counts[name[:start]] += 1
    most = max(counts.values(), default=0)
    if most == 0 or 2 * most < len(wanted):
        return None
    found = sorted(prefix for prefix, count in counts.items() if count == most)
    if "" in found:
        return ""
    first = [prefix for prefix in found if not _SECOND.search(prefix)] if len(found) > 1 else found
    if len(first) != 1:
        prefixes = listed([repr(prefix) for prefix in found])
        raise UserError(
            f"{source} holds {len(found)} such models, under {prefixes}, and nothing tells which to take; "
            f"save one of them alone"
        )
    if len(found) > 1:
        others = " or ".join(repr(prefix) for prefix in found if prefix not in first)
        notes.append(f"what is named {first[0]}* is taken, not {others}")
    return first[0]
