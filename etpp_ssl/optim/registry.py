"""Optimizers by timm's names: what each reads, which are refused and why, and what a step of one costs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.cost import count_flops
from etpp_ssl.messages import close_names

OWN: dict[str, tuple[str, ...]] = {"adamw": ("betas", "eps"), "lamb": ("betas", "eps"), "sgd": ("momentum",)}
"""Known without timm, whose import takes seconds, with the keys they read; defaults are the Config's."""
MUON = ("muon", "nmuon", "adamuon", "nadamuon")
"""timm's `Muon`: the momentum of a weight matrix, orthogonalised by five Newton-Schulz steps, scaled so that
AdamW's learning rates carry over (`match_rms_adamw`); `ada` with a second moment, `n` with Nesterov momentum.
What is no hidden matrix goes to AdamW, with `n` to NAdamW."""
FUSED = ("adamw", "adam")
"""torch has one of SGD, too, which rounds otherwise: runs of version 0.5 would resume in other bits."""
_REFUSED = {
    "adahessian": "it needs second derivatives, which a training step does not compute",
    "kron": "it draws from torch's global generator, so that a run would not resume in the same bits",
    "kronw": "it draws from torch's global generator, so that a run would not resume in the same bits",
    "madgrad": "it takes no learning rate of 0, where a warm-up begins",
    "madgradw": "it takes no learning rate of 0, where a warm-up begins",
}
TIMMS_MOMENTUM = 0.9
"""Of timm's factory, for optimizers that are without momentum by themselves."""


def _info(name: str) -> Any:
    from timm.optim import get_optimizer_info

    return get_optimizer_info(name)


@cache
def refusal(name: str) -> str | None:
    """Why there is no optimizer of this name, in words that follow it; None where there is one."""
    if name in OWN:
        return None
    from timm.optim import list_optimizers

    known = list_optimizers()
    if name not in known:
        close = close_names(name, known, lambda other: refusal(other) is None, "adamw, muon, lion, sgd")
        return f"is not an optimizer of timm{close}"
    if (_info(name).defaults or {}).get("corrected_weight_decay"):
        return "is refused: it scales the weight decay by a learning rate that it keeps itself"
    return f"is refused: {_REFUSED[name]}" if name in _REFUSED else None


@cache
def keys_of(name: str) -> dict[str, Any]:
    """Keys that an optimizer reads beside its learning rate and weight decay, and its own defaults.

    Args:
        name: of an optimizer that is not refused.

    Returns:
        Some of `betas`, `eps`, `momentum` and `fallback_lr_scale`; None for a default that is the Config's.
    """
    if name in OWN:
        return dict.fromkeys(OWN[name])
    from timm.optim import get_optimizer_class

    info = _info(name)
    keys = [key for key in ("betas", "eps", "momentum") if getattr(info, f"has_{key}")]
    if isinstance(info.opt_class, str):  # The class is of a package that may not be here.
        return dict.fromkeys(keys)
    defaults = inspect.signature(get_optimizer_class(name)).parameters
    found = {key: defaults[key].default for key in keys if key in defaults}
    if found.get("momentum") == 0:
        found["momentum"] = TIMMS_MOMENTUM
    own = {key: value for key, value in found.items() if value is not None}
    return {**own, "fallback_lr_scale": None} if name in MUON else own


def num_betas(name: str) -> int:
    """How many `betas` an optimizer that reads them has."""
    return 2 if name in OWN else int(_info(name).num_betas)


def create(
    name: str, groups: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimizer over parameter groups, its learning rate still 0.

    Args:
        name: of an optimizer that is not refused.
        groups: each with its `weight_decay`.
        settings: of some of `betas`, `eps` and `momentum`.
        device: of the parameters.

    Raises:
        UserError: if it needs a package that is not installed, or a GPU.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_class

    opt_class = _info(name).opt_class
    options = {key: value for key, value in settings.items() if key in keys_of(name)}
    options.pop("fallback_lr_scale", None)
    if isinstance(opt_class, str):
        package = opt_class.split(".")[0]
        if find_spec(package) is None:
            raise UserError(f"optim.name {name} needs the package {package}, which is not installed")
        if device.type != "cuda":
            raise UserError(f"optim.name {name} is for GPUs, but this run is on {device.type}")
    else:
        parameters = inspect.signature(get_optimizer_class(name)).parameters
        if "max_grad_norm" in parameters:
            # LAMB's clips at 1. The loop clips; here it would be done a second time, and without being asked.
            options["max_grad_norm"] = None if parameters["max_grad_norm"].default == 1.0 else 0.0
    if name in FUSED and device.type in ("cpu", "cuda"):
        options["fused"] = True
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        [dict(group) for group in groups], name, lr=0.0, **options
    )
    return optimizer


@dataclass(frozen=True)
class OptimizerCost:
    """What an optimizer takes beside the gradients."""

    state_bytes: int
    """Of what it keeps between two steps."""
    flops: int
    """Of matrix products in one step, such as Newton-Schulz steps; element-wise work is not counted."""


ASSUMED_MOMENTS = 2
"""float32 numbers for each trained value, of optimizers that take no step where nothing is computed."""


def cost_of_step(
    name: str, groups: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> OptimizerCost:
    """What a step of an optimizer costs, from one that is taken on the meta device for each shape."""
    meta, state_bytes, flops = torch.device("meta"), 0, 0
    if isinstance(_info(name).opt_class, str):
        return OptimizerCost(sum(4 * ASSUMED_MOMENTS * p.numel() for g in groups for p in g["params"]), 0)
    for group in groups:
        for shape, count in Counter(tuple(parameter.shape) for parameter in group["params"]).items():
            parameter = nn.Parameter(torch.empty(shape, device=meta))
            parameter.grad = torch.empty(shape, device=meta)
            optimizer = create(name, [{**group, "params": [parameter]}], settings, meta)
            try:
                flops += count * count_flops(optimizer.step)
            except RuntimeError:  # It reads a number, which a tensor without numbers does not have.
                state_bytes += count * 4 * ASSUMED_MOMENTS * parameter.numel()
                continue
            state_bytes += count * sum(
                value.numel() * value.element_size()
                for value in optimizer.state[parameter].values()
                if isinstance(value, torch.Tensor)
            )
    return OptimizerCost(state_bytes, flops)
