"""LARS, by which MAE's linear probe is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the weights.

    For a parameter w of two or more dimensions, with gradient g: u = g + weight_decay * w, scaled by
    trust_coefficient * |w| / |u|, or by 1 where one of the norms is 0. One-dimensional parameters are
    neither decayed nor scaled: u = g. Then v = momentum * v + u and w = w - lr * v, with v = 0 at first.

    timm's `Lars` scales only where weight_decay > 0, or with `always_adapt` one-dimensional parameters
    too, and divides by |g| + weight_decay * |w| + eps.

    Args:
        params: parameters or groups of them; a group may have its own `lr` and other settings.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: >= 0.
        trust_coefficient: > 0.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        update = gradient if parameter.ndim <= 1 else _scaled(parameter, gradient, group)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(velocity, alpha=-group["lr"])


def _scaled(parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    update = gradient.add(parameter, alpha=group["weight_decay"])
    size, change = parameter.norm(), update.norm()
    # On the device, without waiting for it: the quotient that is not taken may be infinite.
    ratio = torch.where(
        (size > 0) & (change > 0), group["trust_coefficient"] * size / change, torch.ones_like(size)
    )
    return update.mul_(ratio)
