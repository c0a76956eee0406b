"""State dicts against the model that is to take them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from etpp_ssl.config import UserError, listed

FINE_TUNED = "net."
"""In front of timm's names in the checkpoints of a fine-tuning run."""


def load_weights(
    model_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """`tensors`, checked to be those of a model.

    Args:
        model_state: the model's `state_dict`.
        tensors: what a file holds.
        source: names the file in the message.

    Raises:
        UserError: naming up to five tensors that are missing, too many, or of another shape or type.
    """
    wrong = [f"{name} is missing" for name in model_state if name not in tensors]
    wrong += [f"{name} is not part of the model" for name in tensors if name not in model_state]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in model_state.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    wrong += [
        f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}"
        for name, value in model_state.items()
        if name in tensors and tensors[name].is_floating_point() != value.is_floating_point()
    ]
    if wrong:
        raise UserError(f"{source} is of another model: {listed(wrong, '; ')}")
    return dict(tensors)


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """See that weights to start from are numbers; one that is not spoils every loss after it.

    Args:
        tensors: by name.
        source: names them in the message.

    Raises:
        UserError: naming up to five tensors that hold NaN or infinity, and how many values.
    """
    wrong = []
    for name, value in tensors.items():
        count = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
        if count:
            wrong.append(f"{name} ({count:,} of {value.numel():,} values)")
    if wrong:
        raise UserError(f"{source} holds NaN or infinity, and no run can start from it: {listed(wrong)}")


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with `prefix` taken off their names where all of them have it."""
    if all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)
